"""The start and the end of each process are events; of these a failure alone goes to the trackers."""

from __future__ import annotations

import sys

import pytest

from osler.monitor.config import MonitorConfig
from osler.monitor.history import RunSettings
from osler.monitor.logger import RunLogger
from osler.records.jsonl import read_events
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder

SETTINGS = RunSettings(lr=1e-3, clip_norm=1.0)


def live(run, out, *, first, last, total=10, error=None):
    """Work on a run from step `first` to `last` with an alert command that appends to `out`."""
    script = run.root / "copy.py"
    script.write_text("import sys; open(sys.argv[1], 'a').write(sys.stdin.read())")
    hook, step = f"'{sys.executable}' '{script}' '{out}'", first
    with (
        RunLogger(MonitorConfig(alert_command=hook), run, SETTINGS, step=first) as logger,
        logger.lifetime(lambda: step, lambda: step >= total),
    ):
        step = last
        if error is not None:
            raise error


def test_starts_and_ends_are_events_and_failures_reach_the_alert_command(tmp_path):
    run, out = RunFolder.create(tmp_path), tmp_path / "told"
    live(run, out, first=0, last=4)
    with pytest.raises(ValueError, match="no such row"):
        live(run, out, first=4, last=6, error=ValueError("no such row\nand more"))
    with pytest.raises(UserError):
        live(run, out, first=4, last=6, error=UserError("Lower optim.lr."))
    with pytest.raises(KeyboardInterrupt):
        live(run, out, first=4, last=7, error=KeyboardInterrupt())
    live(run, out, first=4, last=10)
    events = read_events(run.events)
    assert [(e.kind, e.name, e.step) for e in events] == [
        ("start", "begun", 0), ("end", "stopped", 4), ("start", "resumed", 4), ("end", "failed", 6), ("start", "resumed", 4),
        ("end", "failed", 6), ("start", "resumed", 4), ("end", "stopped", 7), ("start", "resumed", 4), ("end", "finished", 10),
    ]  # fmt: skip
    assert [e.message for e in events if e.name == "failed"] == ["ValueError: no such row", "Lower optim.lr."]
    assert [e.details["saved"] for e in events if e.name == "stopped"] == [True, False]
    told = out.read_text()
    assert told.count('"failed"') == told.count('"critical"') == told.count("\n") == 2 and '"message": "Lower optim.lr."' in told
