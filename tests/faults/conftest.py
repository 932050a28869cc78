"""Start a run of each kind, break it at a chosen moment, and compare what two runs left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from osler.checkpoint import store
from osler.cli import main
from osler.runtime import faults

STEPS = 12


def untimed(values: dict[str, Any]) -> dict[str, Any]:
    """Metrics or state without what the clock decides."""
    return {k: v for k, v in values.items() if k not in ("time", "seconds", "eval/seconds") and not k.startswith("perf/")}


@pytest.fixture
def launch(tiny, runs, monkeypatch) -> Callable[..., int]:
    """``launch(kind, folder, *overrides, fault=...)`` runs the command in this process and returns its exit code."""
    starts = {"pretrain": [], "sft": [f"init_from={runs.pretrain}"], "grpo": [f"init_from={runs.sft}"]}

    def start(kind: str, folder: Path, *overrides: str, fault: str = "", resume: bool = False) -> int:
        faults.reset()
        with monkeypatch.context() as environment:
            if fault:
                environment.setenv(faults.VARIABLE, fault)
            if resume:
                return main([kind, "--run", str(folder), "--resume"])
            return main([kind, getattr(tiny, kind), *starts[kind], *overrides, "--run", str(folder)])

    return start


@pytest.fixture(scope="session")
def whole(tiny, runs, tmp_path_factory) -> dict[str, Path]:
    """One uninterrupted run of each kind."""
    root = tmp_path_factory.mktemp("whole")
    starts = {"pretrain": [], "sft": [f"init_from={runs.pretrain}"], "grpo": [f"init_from={runs.sft}"]}
    for kind, start in starts.items():
        assert main([kind, getattr(tiny, kind), *start, "--run", str(root / kind)]) == 0
    return {kind: root / kind for kind in starts}


@pytest.fixture(scope="session")
def assert_same_run() -> Callable[[Path, Path], None]:
    """Two finished runs: the same tensors to the bit, the same state, metrics and best checkpoint."""

    def logged(folder: Path) -> list[dict[str, Any]]:
        return [untimed(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    def check(folder: Path, other: Path) -> None:
        ends = [store.load(run / "checkpoints" / store.folder_name(STEPS)) for run in (folder, other)]
        assert ends[0].tensors.keys() == ends[1].tensors.keys()
        for part, tensors in ends[0].tensors.items():
            assert tensors.keys() == ends[1].tensors[part].keys()
            assert [name for name, value in tensors.items() if not torch.equal(value, ends[1].tensors[part][name])] == []
        assert untimed(ends[0].state) == untimed(ends[1].state)
        assert logged(folder) == logged(other)
        assert store.best_checkpoint(folder / "checkpoints").step == store.best_checkpoint(other / "checkpoints").step

    return check
