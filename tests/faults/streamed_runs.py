"""A program for test_streaming.py: forks runs that train while their data are being prepared, kills them, and compares.

Prints ``ok <case>`` or ``FAILED <case>: why``.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch._dynamo  # noqa: F401 - torch.optim loads it, for seconds; here it is loaded once for every fork
from forks import codes, report, said, train
from interrupted_runs import fork_command
from run_folders import ENDLESS, STOPPED, has_begun, logged, untimed, wait_for

import osler.train.run  # noqa: F401
from osler.checkpoint import folders
from osler.runtime import faults
from osler.runtime.files import is_locked

FAILED = 2
STREAMING = "data.streaming=true"
SLOW = "write-shard:slow:1-"  # so that training overtakes


def outcome(folder: Path) -> dict[str, object]:
    """What must be equal: the last weights and moments, the metrics without times, and every shard."""
    last, skipped = folders.newest_good(folder / "checkpoints")
    assert last is not None and not skipped, f"damaged: {skipped}"
    found: dict[str, object] = {name: (last / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}
    lines = map(untimed, logged(folder))
    found["metrics"] = [{name: value for name, value in line.items() if not name.startswith("data/epoch")} for line in lines]
    return found


def assert_same(folder: Path, whole: Path) -> None:
    expected, found = outcome(whole), outcome(folder)
    different = [name for name in expected if expected[name] != found[name]]
    assert not different, f"differs in {different}"
    for path in (whole / "data").rglob("*.bin"):  # as far as the run has let it be prepared
        here = folder / "data" / path.relative_to(whole / "data")
        assert not here.exists() or path.read_bytes().startswith(here.read_bytes()), f"{here} differs"


def assert_alone(folder: Path) -> None:
    """The preparation ends with the process that it belongs to."""
    wait_for(lambda: not is_locked(folder / "data"))


def streamed(command: list[str], whole: Path, folder: Path, ranks: int) -> None:
    os.environ[faults.VARIABLE] = SLOW
    assert train([*command, STREAMING], folder, ranks) == [0] * ranks, said(folder, 0)[-2000:]
    del os.environ[faults.VARIABLE]
    assert "tokens of data so far" in said(folder, 0), said(folder, 0)[-2000:]
    assert_alone(folder)
    assert_same(folder, whole)


def killed(command: list[str], whole: Path, folder: Path, fault: str, *expected: int) -> None:
    """Kill trainer, preparation or both, and let the same command go on."""
    (code,) = train([*command, STREAMING], folder, 1, fault_rank=0, fault=f"{SLOW},{fault}")
    assert code in expected, said(folder, 0)[-2000:]
    assert code != FAILED or "The process that prepares" in said(folder, 0), said(folder, 0)[-2000:]
    assert_alone(folder)
    assert train([*command, STREAMING], folder, 1) == [0], said(folder, 0)[-2000:]
    assert_same(folder, whole)


def interrupted(command: list[str], folder: Path) -> None:
    """Ctrl-C while training waits for data that never come saves, leaves, and ends the preparation."""
    os.environ[faults.VARIABLE] = "write-shard:slow:3-1000000,prepare-piece:slow:1-"
    child = fork_command([*command, STREAMING, *ENDLESS], folder, 0.5)
    try:
        wait_for(lambda: has_begun(folder, first_step=False))
        os.kill(child, signal.SIGINT)
        assert codes([child]) == [STOPPED], folder.with_suffix(".log").read_text()[-2000:]
    finally:
        del os.environ[faults.VARIABLE]
    assert_alone(folder)


def run_all(command: list[str], root: Path) -> None:
    wholes = [root / f"whole-{ranks}" for ranks in (1, 2)]
    for ranks, whole in enumerate(wholes, 1):
        words = [*command, "parallel.type=ddp"] if ranks > 1 else command
        assert train(words, whole, ranks) == [0] * ranks, said(whole, 0)[-2000:]
        report(f"{ranks} ranks", streamed, words, whole, root / f"streamed-{ranks}", ranks)
    words, whole = [*command, "packing=whole"], root / "whole-documents"
    assert train(words, whole, 1) == [0], said(whole, 0)[-2000:]
    report("whole documents", streamed, words, whole, root / "streamed-documents", 1)
    for name, fault, *expected in (
        ("trainer", "train-step:kill:7", -signal.SIGKILL),
        ("preparation", "write-index:kill:3", FAILED),
        ("preparation, at its end", "prepare-complete:crash", FAILED),
        ("both", "train-step:kill:6,write-index:kill:5", -signal.SIGKILL, FAILED),  # whoever is first
    ):
        report(name, killed, command, wholes[0], root / f"killed-{name}", fault, *expected)
    report("ctrl-c", interrupted, command, root / "interrupted")


if __name__ == "__main__":
    recipe, folder = sys.argv[1:]
    run_all(["pretrain", recipe], Path(folder))
