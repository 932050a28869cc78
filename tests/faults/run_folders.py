"""What a run leaves in its folder, and how its files rot: shared by the tests of faults and by the programs that they start."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from osler.checkpoint import folders, store

KINDS = ("pretrain", "sft", "grpo")
TRAINERS = ("pretrain", "grpo")  # one kind of each; fine-tuning is pretraining on other rows
STEPS = 12  # of every run of the recipes in tests/conftest.py
STOPPED = 130
PATIENCE_SECONDS = 300
ENDLESS = ["total_tokens=100_000_000_000", "eval_every_tokens=100_000_000_000", "checkpoint.every_tokens=100_000_000_000"]
# One step is thousands of micro-batches, so that a second signal finds the run still in the step of the first.
LONG_STEP = ["batch_tokens=1_048_576", "micro_batch_tokens=512"]


def at(run: Path, step: int) -> Path:
    return run / "checkpoints" / folders.folder_name(step)


def saved_steps(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def newest_step(run: Path) -> int:
    """The step of the newest checkpoint, which must be whole like all others."""
    saved, skipped = folders.newest_good(run / "checkpoints")
    assert saved is not None and not skipped, f"damaged: {skipped}"
    return store.load(saved).step


def assert_same_tensors(run: Path, other: Path) -> None:
    """The newest checkpoints of two runs are of one step and hold the same tensors, bit for bit."""
    found, expected = (store.load(store.resolve(folder)) for folder in (run, other))
    assert found.step == expected.step and found.tensors.keys() == expected.tensors.keys()
    for part, tensors in expected.tensors.items():
        assert tensors.keys() == found.tensors[part].keys()
        assert [name for name, value in tensors.items() if not torch.equal(value, found.tensors[part][name])] == [], part


def assert_same_run(run: Path, other: Path, *, same_best: bool = True) -> None:
    """Two finished runs have the same tensors to the bit, the same state, metrics and best checkpoint."""
    assert_same_tensors(run, other)
    states = [untimed(store.load(store.resolve(folder)).state) for folder in (run, other)]
    assert states[0] == states[1]
    assert list(map(untimed, logged(run))) == list(map(untimed, logged(other)))
    best = [folders.best_checkpoint(folder / "checkpoints") for folder in (run, other)]
    assert not same_best or (best[0] and best[0].step) == (best[1] and best[1].step)


def untimed(values: dict[str, Any]) -> dict[str, Any]:
    """Metrics or state without what the clock decides."""
    return {k: v for k, v in values.items() if k not in ("time", "seconds", "eval/seconds") and not k.startswith("perf/")}


def logged(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics; none before the first is written."""
    metrics = run / "metrics.jsonl"
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []


def has_begun(run: Path, first_step: bool) -> bool:
    """Whether a run is in its first step, or has a line of metrics."""
    file = run / ("events.jsonl" if first_step else "metrics.jsonl")
    return file.exists() and file.stat().st_size > 0


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def tear(path: Path) -> None:
    """Leave the first half of a line of metrics at the end, as a crash does."""
    with path.open("a") as file:
        file.write('{"step": 99, "tok')


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the run did not get that far"
        time.sleep(0.01)
