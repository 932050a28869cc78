"""Following a log: only what is new is read, whatever happens to the file."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest

from osler.records import jsonl
from osler.records.jsonl import MetricsFile
from osler.report.curves import MAX_POINTS, SAMPLED_LINES, Follower


def line(step: int, **metrics: object) -> str:
    return json.dumps({"step": step, "tokens": 100 * step, "time": 1e6 + step, **metrics}) + "\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_what_is_appended_is_read_once(path: Path) -> None:
    log = Follower(path)
    assert not log.poll() and log.last is None, "not there yet"
    sink = MetricsFile(path)
    sink.write(1, 100, {"train/loss": 3.0}, time=1e6)
    assert log.poll() and not log.poll()
    sink.write(2, 200, {"train/loss": math.nan, "eval/loss": 2.5}, time=1e6 + 4)
    assert log.poll()
    assert [s for s, _ in log.curves["train/loss"]] == [1, 2] and math.isnan(log.curves["train/loss"][1][1])
    assert log.curves["eval/loss"] == [(2, 2.5)] and log.active_seconds == 4.0
    assert log.last == (2, 200.0, 1e6 + 4) and log.bytes_read == path.stat().st_size


def test_a_torn_line_waits_for_its_rest(path: Path) -> None:
    log, whole = Follower(path), line(2, loss=2.0)
    path.write_text(line(1, loss=3.0) + whole[:20])
    assert log.poll() and log.last and log.last.step == 1
    assert not log.poll()
    path.write_text(line(1, loss=3.0) + whole)
    assert log.poll() and log.curves["loss"] == [(1, 3.0), (2, 2.0)]


def test_lines_that_are_none_are_passed_over(path: Path) -> None:
    path.write_bytes(b'\n[1]\n{"step": null}\n\xff\xfe\n' + line(3, loss=1.0).encode())
    log = Follower(path)
    assert log.poll() and log.curves == {"loss": [(3, 1.0)]}


@pytest.mark.parametrize("in_place", [True, False])
def test_a_file_written_anew_is_read_anew(path: Path, in_place: bool) -> None:
    path.write_text("".join(line(s, loss=float(s)) for s in range(1, 9)))
    log = Follower(path)
    log.poll()
    anew = "".join(line(s, loss=-float(s)) for s in range(1, 12))  # longer than before, and another
    if in_place:
        path.write_text(anew)
    else:
        (path.parent / "new").write_text(anew)
        (path.parent / "new").replace(path)
    assert log.poll() and log.curves["loss"] == [(s, -float(s)) for s in range(1, 12)] and log.lines == 11


def test_a_resume_drops_the_lines_after_its_checkpoint(path: Path) -> None:
    log = Follower(path)
    sink = MetricsFile(path)
    for step in range(1, 7):
        sink.write(step, step, {"loss": float(step)})
    log.poll()
    sink = MetricsFile(path, last_step=4)
    assert log.poll() and [s for s, _ in log.curves["loss"]] == [1, 2, 3, 4]
    sink.write(5, 5, {"loss": 50.0})
    assert log.poll() and log.curves["loss"][-1] == (5, 50.0)
    path.unlink()
    assert log.poll() and not log.curves


def test_a_step_made_twice_counts_once(path: Path) -> None:
    path.write_text("".join(line(s, loss=v) for s, v in ((1, 9.0), (2, 8.0), (3, 7.0), (2, 5.0))))
    log = Follower(path)
    log.poll()
    assert log.curves["loss"] == [(1, 9.0), (2, 5.0)] and log.last and log.last.step == 2


def test_pauses_are_no_work(path: Path) -> None:
    rows = [{"step": s, "time": 1e6 + 10 * s + (7200 if s > 20 else 0)} for s in range(41)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = Follower(path)
    log.poll()
    assert log.active_seconds == 390.0 and log.usual_gap == 10.0
    assert log.recent[0].step == 21, "the speed is that since the pause"


def test_a_long_log_opens_quickly_and_is_then_followed_line_by_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """200,000 lines: each evaluation, the end, and enough of the rest, in a fraction of the time that parsing all would take."""
    count = 200_000
    wide = {f"grad/norm/{n}": 0.1 for n in range(8)}
    with path.open("w") as file:
        for step in range(1, count + 1):
            file.write(line(step, **{"train/loss": 5.0, **(wide if step % 10 == 0 else {})}))
            if step % 10_000 == 0:
                file.write(line(step, **{"eval/loss": 4.0, "eval/seconds": 1.0}))
    log = Follower(path)
    parsed: list[bytes] = []
    parse = jsonl.parse
    monkeypatch.setattr(jsonl, "parse", lambda text: parsed.append(text) or parse(text))
    log.poll()
    assert len(parsed) < 0.05 * count
    assert log.lines == count + 20 and log.active_seconds == count - 1
    assert log.curves["eval/loss"] == [(step, 4.0) for step in range(10_000, count + 1, 10_000)]
    steps = [step for step, _ in log.curves["train/loss"]]
    assert steps[-1] == count and steps[0] < 2000 and SAMPLED_LINES * 0.8 < len(steps) <= MAX_POINTS
    assert max(b - a for a, b in pairwise(steps)) < 2000, "from everywhere"
    assert len(log.curves["grad/norm/3"]) > SAMPLED_LINES / 20, "lines of a rhythm of their own are met as well"
    assert log.bytes_read < 1.02 * path.stat().st_size

    read = log.bytes_read
    with path.open("a") as file:
        file.write(line(count + 1, **{"train/loss": 4.5}))
    assert log.poll() and not log.poll() and log.bytes_read - read < 200
    assert log.curves["train/loss"][-1] == (count + 1, 4.5)


def test_curves_stay_short_in_a_long_run(path: Path) -> None:
    log = Follower(path)
    for start in range(0, 3 * MAX_POINTS, 1000):
        with path.open("a") as file:
            file.write("".join(line(step, loss=1.0) for step in range(start, start + 1000)))
        log.poll()
    curve = log.curves["loss"]
    assert len(curve) <= MAX_POINTS and curve[0][0] == 0 and curve[-1][0] == start + 999
