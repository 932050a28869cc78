"""A program for test_memory.py: forks runs in an address space that is too small for one pass, so that allocations really fail.

One process imports everything once and forks for every start. Prints ``ok <case>`` or ``FAILED <case>: why``.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch._dynamo  # torch.optim loads it, for seconds; here it is loaded once for every fork
from forks import codes, report, said, start
from run_folders import assert_same_run

import osler.rl.run
import osler.train.run  # noqa: F401
from osler.checkpoint import store
from osler.cli.main import main
from osler.records.jsonl import OUT_OF_MEMORY, read_events
from osler.runtime.world import EXIT_LOST

MEGABYTE = 2**20
TOKENS = 32_768  # of a batch, whose one pass takes about 450 MB
ROOM = 300  # megabytes, in which half a batch or a quarter of it has room
WIDE = [f"batch_tokens={TOKENS}", f"total_tokens={3 * TOKENS}", f"checkpoint.every_tokens={TOKENS}", "log_every_steps=1"]
WIDE += ["eval_every_tokens=100000000", "schedule.type=constant", "loader_workers=0", "model.max_seq_len=4096"]
WIDE += ["checkpoint.in_background=false"]  # else it is a matter of time whether a pass has to share the room with a save
MANY = ["steps=1", "eval_task=null", "algorithm.prompts_per_step=2", "algorithm.samples_per_prompt=150", "optim.lr=1e-4"]
MANY += ["micro_batch_tokens=100000", "preflight=off"]


def train(
    command: Sequence[str], folder: Path, room: int | None = None, *, rank: int = 0, size: int = 1, fault: str = ""
) -> list[int]:
    """Start the ranks of a run, of which one may use so many megabytes more than at its start; return their exit codes."""

    def program() -> int:
        if room is not None and int(os.environ.get("RANK", 0)) == rank:
            now = re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())
            assert now is not None
            limit = int(now[1]) * 1024 + room * MEGABYTE
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        return main([*command, "--run", str(folder)])

    return codes(start(program, folder, size, fault_rank=0 if fault else -1, fault=fault))


def limits(folder: Path) -> list[tuple[int, int]]:
    """The step of every time that memory ran out, and the tokens of a pass from there on."""
    events = [event for event in read_events(folder / "events.jsonl") if event.name == OUT_OF_MEMORY]
    return [(event.step, event.details["micro_batch_tokens"]) for event in events]


def goes_on(command: Sequence[str], whole: Path, folder: Path, **where: int) -> None:
    """Memory that runs out changes the size of the passes alone: all runs end with the same weights but for rounding."""
    assert set(train(command, folder, ROOM, **where)) == {0}, said(folder, 0)[-2000:]
    found = limits(folder)
    assert found and found == [(step, TOKENS // 2**number) for number, (step, _) in enumerate(found, start=1)], found
    near(folder, whole)


def near(folder: Path, whole: Path) -> None:
    found, expected = (store.load(store.resolve(run)) for run in (folder, whole))
    assert found.step == expected.step
    for name, value in expected.tensors["model"].items():
        torch.testing.assert_close(found.tensors["model"][name], value, rtol=1e-3, atol=1e-4)


def resumes(command: Sequence[str], small: Path, folder: Path) -> None:
    """A run that is killed after memory ran out keeps the size of its passes where there is room: it rounds as before."""
    assert train(command, folder, ROOM, fault="train-step:kill:2") == [-signal.SIGKILL], said(folder, 0)[-2000:]
    assert limits(folder) == limits(small), (limits(folder), limits(small))
    assert train(command, folder) == [0], said(folder, 0)[-2000:]
    assert_same_run(folder, small)


def ends(command: Sequence[str], folder: Path) -> None:
    """A row that does not fit ends the run with what helps."""
    long = [*command, "seq_len=4096", f"batch_tokens={2 * 4096}", "total_tokens=16384", "checkpoint.every_tokens=8192"]
    assert train(long, folder, 50) == [2]
    assert limits(folder) == [(1, 4096)]
    assert "too small for a step with one row at once" in said(folder, 0) and "recompute=selective" in said(folder, 0)


def learns(command: Sequence[str], root: Path) -> None:
    """GRPO draws the same completions, and learns from them in smaller passes."""
    assert train(command, root / "grpo") == [0], said(root / "grpo", 0)[-2000:]
    assert train(command, root / "grpo-small", ROOM) == [0], said(root / "grpo-small", 0)[-2000:]
    assert limits(root / "grpo-small") and not limits(root / "grpo")
    near(root / "grpo-small", root / "grpo")


def tells_the_next(command: Sequence[str], whole: Path, folder: Path) -> None:
    """Ranks that share weights in every pass cannot know that one has no memory: the same command goes on with less."""
    assert set(train(command, folder, ROOM, size=2, rank=1)) == {EXIT_LOST}
    assert limits(folder) == [(1, TOKENS // 2)]
    assert train(command, folder, size=2) == [0, 0], said(folder, 0)[-2000:]
    near(folder, whole)


if __name__ == "__main__":
    pretrain = ["pretrain", sys.argv[1], *WIDE]
    grpo = ["grpo", sys.argv[2], f"init_from={sys.argv[3]}", *MANY]
    root = Path(sys.argv[4])
    assert train(pretrain, root / "whole") == [0], said(root / "whole", 0)
    report("alone", goes_on, pretrain, root / "whole", root / "small")
    report("resumed", resumes, pretrain, root / "small", root / "killed")
    report("one row", ends, pretrain, root / "row")
    report("grpo", learns, grpo, root)
    wider = [*pretrain, f"micro_batch_tokens={TOKENS}", f"batch_tokens={2 * TOKENS}", f"total_tokens={6 * TOKENS}"]
    wider += [f"checkpoint.every_tokens={6 * TOKENS}"]  # a save takes memory too, and it comes when the ranks vote no more
    assert train(wider, root / "wide") == [0], said(root / "wide", 0)
    for rank in (0, 1):
        report(f"ddp, rank {rank}", goes_on, [*wider, "parallel.type=ddp"], root / "wide", root / f"ddp{rank}", size=2, rank=rank)
    report("fsdp", tells_the_next, [*wider, "parallel.type=fsdp"], root / "wide", root / "fsdp")
