"""The files of a run survive kills: whole lines stay, torn ones go, a resume logs each step once, and no reader stops."""

import json
import math
import time
import tracemalloc
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from osler.monitor.alerts import replay
from osler.monitor.history import RunSettings
from osler.records import jsonl
from osler.records.jsonl import EventLog, MetricsFile, read_events, read_metrics
from osler.records.values import NAN, from_json
from osler.runtime.errors import UserError

ODD = b'[1]\n{}\n"text"\n\xff\xfe\n' + b"[" * 100_000 + b'\n{"step": 1e300}\n{"step": null}\n{"step": 2}\n{"step": 3'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


@pytest.fixture
def odd(path: Path) -> Path:
    path.write_bytes(ODD)
    return path


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]


def log(path: Path, first: int, last: int, **how: int) -> None:
    file = MetricsFile(path, **how)
    for step in range(first, last + 1):
        file.write(step, step * 100, {"train/loss": 1.0 / (step + 1)})


def test_what_is_no_object_is_passed_over(odd: Path) -> None:
    found, unreadable = jsonl.read(odd)
    assert found == [{}, {"step": 1e300}, {"step": None}, {"step": 2}] and unreadable == 4
    assert [line.step for line in read_metrics(odd)] == [2]
    assert jsonl.read(odd.with_name("none")) == ([], 0)
    for read in (jsonl.read, MetricsFile):
        with pytest.raises(UserError, match="cannot be read"):
            read(odd.parent)


def test_appending_ends_a_torn_line_first_and_splitting_keeps_torn_lines_with_the_earlier_ones(odd: Path) -> None:
    jsonl.append(odd, {"step": 4, "name": "\udc80 é", "loss": math.nan})  # the name is as of a file whose name is not UTF-8
    assert jsonl.read(odd)[0][-1] == {"step": 4, "name": "\udc80 é", "loss": None}
    kept, later = jsonl.split(odd, 2)
    assert [json.loads(line)["step"] for line in later] == [4] and b"".join(kept) == ODD + b"\n"


def test_only_lines_with_a_metric_are_read(path: Path) -> None:
    rows: list[dict[str, object]] = [{"step": 1, "loss": 2.0}, {"step": 2, "eval": 1.0}, {"step": 3, "note": "eval"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [line.step for line in read_metrics(path, having="eval")] == [2]


@dataclass
class Record:
    name: str = ""
    score: float = NAN
    counts: dict[str, float] = field(default_factory=dict)
    options: list[str] = field(default_factory=list)
    right: bool | None = None


@pytest.mark.parametrize("raw", [None, 3, "text", [1], {"a": 1}, True, float("inf"), 10**400])
def test_a_record_takes_whatever_a_file_holds(raw: Any) -> None:
    record = from_json(Record, dict.fromkeys(("name", "score", "counts", "options", "right", "unknown"), raw))
    assert isinstance(record.name, str) and isinstance(record.score, float) and record.right in (None, True)
    again = from_json(Record, json.loads(jsonl.to_line(asdict(record))))
    assert repr(again) == repr(record), "NaN is not equal to itself"


def test_a_line_of_metrics_is_on_disk_at_once_and_null_stands_for_what_is_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    file = MetricsFile(path)
    file.write(3, 300, {"train/loss": math.nan, "train/grad_norm": math.inf, "groups/effective": 7, "train/lr": 0.1})
    line = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    values = {"train/loss": None, "train/grad_norm": None, "groups/effective": 7, "train/lr": 0.1}
    assert line == {"step": 3, "tokens": 300, "time": pytest.approx(time.time(), abs=1000), **values}
    with pytest.raises(ValueError, match="tokens"):
        file.write(4, 400, {"tokens": 5.0})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
def test_a_full_disk_costs_lines_and_not_the_run(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = MetricsFile(path)
    for step in range(1, 5):
        file.path = Path("/dev/full") if step % 2 == 0 else path
        if file.path == path and step > 1:
            path.write_bytes(path.read_bytes() + b'{"step": 2, "tok')  # as the disk took it before it was full
        file.write(step, 100 * step, {"train/loss": 2.0})
    assert [line.step for line in read_metrics(path)] == [1, 3]
    said = capsys.readouterr().err
    assert said.count("cannot be written") == 1 and "No space left" in said


@pytest.mark.parametrize(("last_step", "last"), [(4, 12), (-1, 3), (9, 10)])
def test_resume_drops_what_lies_beyond_the_checkpoint(path: Path, last_step: int, last: int) -> None:
    log(path, 0, 9)
    before = path.read_bytes().splitlines()[: last_step + 1]
    log(path, last_step + 1, last, last_step=last_step)
    assert steps(path) == [*range(last + 1)] and path.read_bytes().splitlines()[: last_step + 1] == before


@pytest.mark.parametrize(
    ("tear", "kept"),
    [
        (lambda whole: whole[:-1], [0, 1, 2]),  # without its newline only, the last line is still whole
        (lambda whole: whole[:-2], [0, 1]),
        (lambda whole: whole[:-20], [0, 1]),
        (lambda whole: whole + b"\x00\xff\x80\n[1]\n{}\n", [0, 1, 2]),
    ],
)
def test_what_is_no_whole_line_is_dropped_and_the_next_line_is_whole(path, tear, kept):
    log(path, 0, 2)
    path.write_bytes(tear(path.read_bytes()))
    log(path, 5, 5)
    assert steps(path) == [*kept, 5]


@pytest.mark.parametrize("last_step", [math.inf, 2500])
def test_a_long_log_is_not_held_in_memory(path: Path, last_step: float) -> None:
    rows = [json.dumps({"step": step, "text": "x" * 2000}) for step in range(1, 3001)]
    path.write_text("\n".join([*rows, '{"st']), encoding="utf-8")
    tracemalloc.start()
    MetricsFile(path, last_step=last_step)
    replay(RunSettings(lr=1e-3, clip_norm=1.0), path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(steps(path)) == min(last_step, 3000)
    assert peak < path.stat().st_size / 4


def test_a_torn_event_costs_itself_only(path: Path) -> None:
    assert read_events(path) == []
    EventLog(path).write(3, "incident", "skipped-step", "First.", loss=None, rows=[4, 7])
    with path.open("a") as file:
        file.write('{"step": 4, "kind": "incid')
    EventLog(path).write(5, "alert", "stalled", "Third.")
    first, third = read_events(path)
    assert (first.step, first.kind, first.name, first.message) == (3, "incident", "skipped-step", "First.")
    assert first.details == {"loss": None, "rows": [4, 7]} and first.time > 0 and third.message == "Third."


def test_a_disk_that_refuses_events_is_told_of_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = EventLog(tmp_path)  # a folder cannot be written to
    for step in range(3):
        events.write(step, "alert", "stalled", "The loss stands still.")
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("cannot be written") == 1 and "Is a directory" in said
