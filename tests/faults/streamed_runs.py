"""A program for test_streaming.py: forks runs that train while their data are being prepared, kills them, and compares.

``streamed_runs.py RECIPE FOLDER all|budget`` prints ``ok <case>`` or ``FAILED <case>: why``.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import torch._dynamo  # noqa: F401 - torch.optim loads it, for seconds; here it is loaded once for every fork
from forks import codes, report, said, train
from interrupted_runs import fork_command
from run_folders import ENDLESS, STOPPED, has_begun, logged, untimed, wait_for

import osler.train.run  # noqa: F401
from osler.checkpoint import folders
from osler.data.preparer import disk_bytes
from osler.data.shard_set import num_evicted
from osler.runtime import faults
from osler.runtime.files import is_locked

FAILED = 2
STREAMING = "data.streaming=true"
BUDGET_BYTES = 400_000
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
    """The preparation ends with the process that it belongs to, and all of its processes do."""
    wait_for(lambda: not is_locked(folder / "data"))
    wait_for(lambda: not any(MARK.encode() in environment(process) for process in Path("/proc").glob("[0-9]*")))


def environment(process: Path) -> bytes:
    """What a process was started with; nothing where the system does not tell, or the process has ended."""
    try:
        return (process / "environ").read_bytes()
    except OSError:
        return b""


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


def within_budget(command: list[str], whole: Path, folder: Path, ranks: int, fault: str) -> None:
    """A run whose data fit into its budget only in parts, perhaps killed half way: never more of the disk, the same run."""
    most, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.002):
            most.append(max(most.pop(), disk_bytes(folder / "data")))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        words = [*command, STREAMING, f"data.disk_budget_gb={BUDGET_BYTES / 1e9}"]
        if fault:
            assert train(words, folder, ranks, fault_rank=0, fault=fault) == [-signal.SIGKILL], said(folder, 0)[-2000:]
            assert_alone(folder)
        assert train(words, folder, ranks) == [0] * ranks, said(folder, 0)[-2000:]
    finally:
        ended.set()
        watching.join()
    assert_alone(folder)
    assert_same(folder, whole)
    assert num_evicted(folder / "data" / "large" / "train") > 0
    assert BUDGET_BYTES / 2 < most[0] <= BUDGET_BYTES < disk_bytes(whole / "data"), most


def interrupted(command: list[str], folder: Path) -> None:
    """Ctrl-C while training waits for data that never come saves, leaves, and ends the preparation."""
    os.environ[faults.VARIABLE] = "write-shard:slow:3-1000000,prepare-chunk:slow:1-"
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
    ddp = ["parallel.type=ddp", f"validation=[{{type: files, path: {root / 'held.jsonl'}}}]"]
    for ranks, whole in enumerate(wholes, 1):
        words = [*command, *ddp] if ranks > 1 else command
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


def run_within_budget(command: list[str], root: Path) -> None:
    for ranks, faults_of_runs in ((1, {"budget": "", "budget, killed": "train-step:kill:20"}), (2, {"budget, 2 ranks": ""})):
        words, whole = [*command, *["parallel.type=ddp"][: ranks - 1]], root / f"whole-{ranks}"
        assert train(words, whole, ranks) == [0] * ranks, said(whole, 0)[-2000:]
        for name, fault in faults_of_runs.items():
            report(name, within_budget, words, whole, root / name.replace(", ", "-").replace(" ", "-"), ranks, fault)


if __name__ == "__main__":
    recipe, folder, which = sys.argv[1:]
    os.environ["OSLER_TEST"] = MARK = f"{folder}-{os.getpid()}"
    {"all": run_all, "budget": run_within_budget}[which](["pretrain", recipe], Path(folder))
