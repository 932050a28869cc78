"""A sick run is told to whoever wants to know, and who that is may change when a run goes on."""

from __future__ import annotations

import json
import sys

from osler.cli.main import main
from osler.records.jsonl import LIFETIME, read_events
from osler.report.read import read_run
from osler.report.words import attention
from osler.runtime.files import RunFolder
from osler.runtime.stop import EXIT_STOPPED
from osler.watch.state import WatchedFolder

SICK = ("optim.lr=10", "total_tokens=20480", "checkpoint.every_tokens=10240", "eval_every_tokens=20480")  # 80 steps, a line for 5


def test_a_learning_rate_far_too_high_reaches_the_alert_command(launch_stopped, tiny, tmp_path, capsys):
    out, run = tmp_path / "alerts.jsonl", RunFolder(tmp_path / "run")
    assert launch_stopped(run.root, *SICK, fault="train-step:sigterm:10") == EXIT_STOPPED
    said_before = {event.name for event in read_events(run.events) if event.kind not in LIFETIME}
    (tmp_path / "copy.py").write_text("import sys; open(sys.argv[1], 'a').write(sys.stdin.read())")
    hook = f"'{sys.executable}' '{tmp_path / 'copy.py'}' '{out}'"
    assert main(["pretrain", tiny.pretrain, *SICK, f'monitor.alert_command="{hook}"', "--run", str(run.root)]) == 0
    events = [event for event in read_events(run.events) if event.kind not in LIFETIME]
    told = [json.loads(line) for line in out.read_text().splitlines()]
    assert "learning-rate" in {event.name for event in events}
    assert [alert["name"] for alert in told] == [event.name for event in events if event.step > 10]
    assert all(alert["run"] == str(run.root) and "optim.lr=3.3 (now 10)" in alert["message"] for alert in told)
    said = capsys.readouterr().err
    for event in events:  # the console says the severity that the command is given
        severity = event.details.get("severity", "warning")
        assert f"\n{severity.capitalize()}: step {event.step}: {event.message}" in said
        assert next(alert["severity"] for alert in told if alert["name"] == event.name) == severity or event.step <= 10
    assert said_before <= {event.name for event in events}


def test_a_run_that_ends_worse_than_guessing_says_so_wherever_its_end_is_told(tiny, tmp_path, capsys):
    run = RunFolder(tmp_path / "run")
    command = ["pretrain", tiny.pretrain, "optim.lr=10", "total_tokens=1280", "eval_every_tokens=1280", "--run", str(run.root)]
    assert main(command) == 0
    said = capsys.readouterr().err
    assert "The run is complete, but 1 alert still holds:\n  Critical: step 5: the run ends with a loss of " in said
    assert said.index("still holds") < said.index("Done: ")
    end = read_events(run.events)[-1]
    assert [alert["name"] for alert in end.details["unresolved"]] == ["worse-than-guessing"]
    watched = WatchedFolder(run.root)
    watched.refresh()
    state = watched.current.state(end.time + 1)
    assert state.kind == "finished" and "but 1 alert still holds: worse-than-guessing" in state.words
    assert any("but 1 alert still holds: worse than guessing" in text for text in attention(read_run(run.root)))
