"""The stages of sparse attention on two ranks, by DDP and FSDP2, and killed at their edges: the run of one process.

sparse_runs.py RECIPE DENSE_RUN FOLDER
"""

import json
import signal
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed.fsdp
from forks import codes, report, said, same_on_two_ranks, start, train
from run_folders import assert_same_run

import osler.train.run
from osler.checkpoint import store
from osler.cli.main import main as osler
from osler.model.init import is_of_indexer
from osler.model.sparse_attention import MEASURED

NAMES = ("train/loss", "train/grad_norm", *MEASURED, "eval/loss")
SPARSE = {"type": "sparse", "top_k": 8, "local_window": 2, "index_heads": 2, "index_head_dim": 8}


def moves_the_indexers_alone(folder: Path, dense: Path) -> None:
    after, before = (store.load(store.resolve(run)).tensors["model"] for run in (folder, dense))
    assert {name for name, value in after.items() if name not in before} == set(filter(is_of_indexer, after))
    assert all(torch.equal(after[name], value) for name, value in before.items())


def killed(recipe: Path, whole: Path, folder: Path, fault: str) -> None:
    command = ["pipeline", str(recipe), "--run", str(folder)]
    assert codes(start(partial(osler, command), folder, 1, fault_rank=0, fault=fault)) == [-signal.SIGKILL], "it did not strike"
    assert codes(start(partial(osler, command), folder, 1)) == [0], said(folder, 0)[-2000:]
    for stage in ("dense", "warmup", "sparse"):
        assert_same_run(folder / stage, whole / stage)


def main(recipe: str, dense: str, root: Path) -> None:
    attention = f"model.attention={json.dumps(SPARSE)}"
    warmup = ["pretrain", recipe, "trains=indexers", attention, "optim.lr=1e-2", f"init_from={dense}"]
    sparse = ["pretrain", recipe, f"init_from={root / 'warmup'}", "document_mask=true"]
    same = partial(same_on_two_ranks, names=NAMES, marked="index/kl", rel_tol=1e-4)
    for stage, command in {"warmup": warmup, "sparse": sparse}.items():
        assert train(command, root / stage, 1) == [0], said(root / stage, 0)[-2000:]
        for strategy in ("ddp", "fsdp"):
            shared = [*command, f"parallel.type={strategy}", "micro_batch_tokens=64", "recompute=full"]
            report(f"{stage} {strategy}", same, shared, root / f"{stage}-{strategy}", root / stage)
            if stage == "warmup":
                report(f"frozen {strategy}", moves_the_indexers_alone, root / f"{stage}-{strategy}", Path(dense))
    stages = json.loads(Path(recipe).read_text())
    begins = {"trains": "indexers", "init_from": "dense", "model": {**stages["model"], "attention": SPARSE}}
    pipeline = {"kind": "pipeline", "dense": stages, "warmup": stages | begins, "sparse": {**stages, "init_from": "warmup"}}
    file = root / "stages.yaml"
    file.write_text(json.dumps(pipeline))
    assert codes(start(partial(osler, ["pipeline", str(file), "--run", str(root / "whole")]), root / "whole", 1)) == [0]
    # Each stage has twelve steps, three checkpoints and two evaluations. The kills come in the last save and in the last
    # evaluation of the warm-up, and in the first step of the next stage.
    for fault in ("save-manifest:kill:6", "evaluate:kill:4", "train-step:kill:25"):
        report(fault, killed, file, root / "whole", root / fault.replace(":", "-"), fault)


main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
