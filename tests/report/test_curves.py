"""The curves of a log are what its lines say, whatever happens to the file."""

import json
import math
from pathlib import Path

import pytest

from osler.records import jsonl
from osler.records.jsonl import MetricsFile
from osler.report.curves import MetricsLog


def line(step: int, **metrics: object) -> str:
    return json.dumps({"step": step, "tokens": 100 * step, "time": 1e6 + step, **metrics}) + "\n"


def told(log: MetricsLog, name: str = "loss") -> list[tuple[int, str]]:
    """The points of a curve after another look at the file."""
    log.poll()
    curve = log.curves[name]
    return list(zip(curve.steps.tolist(), map(str, curve.values), strict=True))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_the_curves_are_what_the_lines_say(path):
    lines = [
        '{"step": 1, "tokens": 10, "time": 1.0, "a": 1, "b": true, "text": "x"}',
        '{"step": 2, "tokens": 20, "time": 2.0, "a": null, "b": "NaN", "text": 3}',
        '{"step": 3, "tokens": "odd", "a": 1e999, "c": [1]}',
        "torn in the middle",
        '{"step": 1e300, "a": 5}',
        '{"tokens": 7, "a": 5}',
        f'{{"step": 4, "tokens": 40, "a": {10**400}}}',
        '{"step": 4, "a": 9.5}',
        '{"step": 2, "tokens": 21, "time": 9.0, "a": 7}',
        '\n{"step": 5, "a',
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    log = MetricsLog(path)
    assert told(log, "a") == [(1, "1.0"), (2, "7.0"), (3, "nan"), (4, "9.5")], "of a step that was made twice the later line"
    assert told(log, "b") == [(1, "1.0")] and told(log, "text") == [(2, "3.0")] and log.curves.keys() == {"a", "b", "text"}
    assert [str(value) for value in log.tokens.values] == ["10.0", "21.0", "nan", "nan"]
    assert log.times.tolist() == [1.0, 2.0, 9.0] and log.unreadable == 3, "torn in the middle, or without a step"


def test_what_is_appended_is_read_once(path, monkeypatch):
    parsed: list[bytes] = []
    parse = jsonl.parse
    monkeypatch.setattr(jsonl, "parse", lambda text: parsed.append(text) or parse(text))
    log = MetricsLog(path)
    log.poll()
    assert not log.curves, "not there yet"
    sink = MetricsFile(path)
    sink.write(1, 100, {"loss": 3.0})
    assert told(log) == told(log) == [(1, "3.0")]
    sink.write(2, 200, {"loss": math.nan, "eval/loss": 2.5})
    assert told(log) == [(1, "3.0"), (2, "nan")] and told(log, "eval/loss") == [(2, "2.5")] and len(parsed) == 2
    with path.open("a") as file:
        file.write(line(3, loss=1.0)[:20])
    assert told(log)[-1][0] == 2, "a torn line waits for its rest"
    with path.open("a") as file:
        file.write(line(3, loss=1.0)[20:])
    assert told(log)[-1] == (3, "1.0") and log.times[2] == 1e6 + 3


def test_a_file_written_anew_is_read_anew(path):
    path.write_text("".join(line(s, loss=float(s)) for s in range(1, 9)))
    log = MetricsLog(path)
    log.poll()
    path.write_text("".join(line(s, loss=-float(s)) for s in range(1, 12)))  # longer than before, and another
    assert told(log) == [(s, str(-float(s))) for s in range(1, 12)] and len(log.times) == 11


def test_a_resume_drops_the_lines_after_its_checkpoint(path):
    log = MetricsLog(path)
    sink = MetricsFile(path)
    for step in range(1, 7):
        sink.write(step, step, {"loss": float(step)})
    log.poll()
    sink = MetricsFile(path, last_step=4)
    assert [step for step, _ in told(log)] == [1, 2, 3, 4]
    sink.write(5, 5, {"loss": 50.0})
    assert told(log)[-1] == (5, "50.0")
    path.unlink()
    log.poll()
    assert not log.curves and not len(log.times)
