"""A run with a teacher on two ranks, by DDP and FSDP2: the losses of one process, however the batch is cut.

teacher_runs.py RECIPE TEACHER FOLDER
"""

import math
import sys
from pathlib import Path

import torch.distributed.fsdp  # noqa: F401 - loaded once for every fork
from forks import report, said, train
from run_folders import logged

import osler.train.run  # noqa: F401

COMPARED = ("train/loss", "train/grad_norm", "distill/kl", "eval/loss")


def same(command: list[str], folder: Path, alone: Path) -> None:
    assert train(command, folder, 2) == [0, 0], said(folder, 0)[-2000:]
    assert said(folder, 1) == "", "another rank than 0 spoke"
    found, expected = (
        [{name: line[name] for name in COMPARED if name in line} for line in logged(run)] for run in (folder, alone)
    )
    assert len(found) == len(expected) and sum("distill/kl" in line for line in found) == 3
    for line, other in zip(found, expected, strict=True):
        assert line.keys() == other.keys()
        assert all(math.isclose(line[name], other[name], rel_tol=1e-5) for name in other), f"{line} instead of {other}"


def main(recipe: str, teacher: str, root: Path) -> None:
    command = ["pretrain", recipe, f"teacher.path={teacher}", "teacher.temperature=2", "document_mask=true"]
    assert train(command, root / "alone", 1) == [0], said(root / "alone", 0)[-2000:]
    report("ddp", same, [*command, "parallel.type=ddp", "micro_batch_tokens=64"], root / "ddp", root / "alone")
    report("fsdp", same, [*command, "parallel.type=fsdp", "micro_batch_tokens=64"], root / "fsdp", root / "alone")


main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
