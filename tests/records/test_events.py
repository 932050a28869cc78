"""The diary keeps whole lines, whatever tears the last one, and a disk that refuses is told of once."""

from __future__ import annotations

from pathlib import Path

import pytest

from osler.records.events import EventLog, read_events


def test_a_torn_line_costs_itself_only(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert read_events(path) == []
    EventLog(path).write(3, "incident", "skipped-step", "First.", loss=None, rows=[4, 7])
    with path.open("a") as file:
        file.write('{"step": 4, "kind": "incid')
    EventLog(path).write(5, "alert", "stalled", "Third.")
    events = read_events(path)
    assert [(event.step, event.kind, event.name, event.message) for event in events] == [
        (3, "incident", "skipped-step", "First."),
        (5, "alert", "stalled", "Third."),
    ]
    assert events[0].details["loss"] is None and events[0].details["rows"] == [4, 7] and events[0].time > 0


def test_a_disk_that_refuses_is_told_of_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = EventLog(tmp_path)  # a folder cannot be written to
    for step in range(3):
        log.write(step, "alert", "stalled", "The loss stands still.")
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("cannot be written") == 1 and "Is a directory" in said
