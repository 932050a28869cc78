"""Logs of long runs: time and memory grow as their lines do, and what is read out of them stays the same."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from osler.report.compare import build_comparison
from osler.report.curves import read_curves
from osler.report.page import build_report
from osler.report.words import summary_text

SHORT, TIMES = 1500, 8
NAMES = [f"train/m{number}" for number in range(12)]


def write_run(folder: Path, lines: int) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text("kind: pretrain\n", encoding="utf-8")
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, lines + 1):
            row = {"step": step, "tokens": 100 * step, "time": 0.5 * step, "train/loss": 1.0 + 3.0 / step}
            row |= {name: (step * 7919 % 1013) / 1013 for name in NAMES}
            file.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    return write_run(tmp_path / "short", SHORT), write_run(tmp_path / "long", TIMES * SHORT)


def seconds(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def peak_bytes(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_time_and_memory_grow_as_the_lines_do(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """A page that looks at every line once for each line would take some 64 times as long for 8 times the lines."""
    short, long = runs
    build_report(short)  # what is imported on first use is no part of it
    assert seconds(lambda: build_report(long)) < 3 * TIMES * seconds(lambda: build_report(short))
    out, other = tmp_path / "page.html", write_run(tmp_path / "other", SHORT)
    assert seconds(lambda: build_comparison([str(long), str(other)], out)) < 3 * TIMES * seconds(
        lambda: build_comparison([str(short), str(other)], out)
    )
    more = peak_bytes(lambda: summary_text(long)) - peak_bytes(lambda: summary_text(short))
    assert more < (TIMES - 1) * SHORT * len(NAMES) * 30, "bytes of each number"


def test_the_curves_are_what_the_lines_say(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        '{"step": 1, "tokens": 10, "time": 1.0, "a": 1, "b": true, "text": "x"}',
        '{"step": 2, "tokens": 20, "time": 2.0, "a": null, "b": "NaN", "text": 3}',
        '{"step": 3, "tokens": "odd", "a": 1e999, "c": [1]}',
        "torn in the middle",
        '{"step": 1e300, "a": 5}',
        '{"tokens": 7, "a": 5}',
        f'{{"step": 4.0, "tokens": 40, "a": {10**400}}}',
        '{"step": 4, "a": 9.5}',
        '{"step": 2, "tokens": 21, "time": 9.0, "a": 7}',
        '{"step": 5, "a',
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    found = read_curves(path)
    told = {name: list(zip(curve.steps.tolist(), map(str, curve.values), strict=True)) for name, curve in found.metrics.items()}
    assert told == {
        "a": [(1, "1.0"), (2, "7.0"), (3, "nan"), (4, "9.5")],
        "b": [(1, "1.0")],
        "text": [(2, "3.0")],
    }
    assert [str(value) for value in found.tokens.values] == ["10.0", "21.0", "nan", "nan"]
    assert found.clock.values.tolist()[:2] == [1.0, 9.0] and found.unreadable == 3, "torn in the middle, or without a step"
    assert not read_curves(tmp_path / "none").metrics
