"""A run with a teacher on two ranks, by DDP and FSDP2: the losses of one process, however the batch is cut.

teacher_runs.py RECIPE TEACHER FOLDER
"""

import sys
from functools import partial
from pathlib import Path

import torch.distributed.fsdp  # noqa: F401 - loaded once for every fork
from forks import report, said, same_on_two_ranks, train

import osler.train.run  # noqa: F401

NAMES = ("train/loss", "train/grad_norm", "distill/kl", "eval/loss")


def main(recipe: str, teacher: str, root: Path) -> None:
    command = ["pretrain", recipe, f"teacher.path={teacher}", "teacher.temperature=2", "document_mask=true"]
    assert train(command, root / "alone", 1) == [0], said(root / "alone", 0)[-2000:]
    same = partial(same_on_two_ranks, names=NAMES, marked="distill/kl", rel_tol=1e-5)
    report("ddp", same, [*command, "parallel.type=ddp", "micro_batch_tokens=64"], root / "ddp", root / "alone")
    report("fsdp", same, [*command, "parallel.type=fsdp", "micro_batch_tokens=64"], root / "fsdp", root / "alone")


main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
