"""A sick run is told to whoever wants to know, and who that is may change when a run goes on."""

from __future__ import annotations

import json
import sys

from osler.cli import main
from osler.monitor.events import read_events
from osler.monitor.lifetime import LIFETIME
from osler.runtime.files import RunFolder
from osler.runtime.stop import EXIT_STOPPED

SICK = ("optim.lr=10", "total_tokens=20480", "save_every_tokens=10240", "eval_every_tokens=20480")  # 80 steps, a line for 5


def test_a_learning_rate_far_too_high_reaches_the_webhook(launch_stopped, tiny, tmp_path, capsys):
    out, run = tmp_path / "alerts.jsonl", RunFolder(tmp_path / "run")
    assert launch_stopped(run.root, *SICK, fault="train-step:sigterm:10") == EXIT_STOPPED
    said_before = {event["name"] for event in read_events(run.events) if event["kind"] not in LIFETIME}
    (tmp_path / "copy.py").write_text("import sys; open(sys.argv[1], 'a').write(sys.stdin.read())")
    hook = f"'{sys.executable}' '{tmp_path / 'copy.py'}' '{out}'"
    assert main(["pretrain", tiny.pretrain, *SICK, f'monitor.webhook="{hook}"', "--run", str(run.root)]) == 0
    events = [event for event in read_events(run.events) if event["kind"] not in LIFETIME]
    told = [json.loads(line) for line in out.read_text().splitlines()]
    assert "learning-rate" in {event["name"] for event in events}
    assert [alert["name"] for alert in told] == [event["name"] for event in events if event["step"] > 10]
    assert all(alert["run"] == str(run.root) and "optim.lr=3.3 (now 10)" in alert["message"] for alert in told)
    assert capsys.readouterr().err.count("Warning: step ") == len(events) and said_before <= {e["name"] for e in events}


def test_a_webhook_that_cannot_work_is_refused_before_anything_is_made(tiny, tmp_path, capsys):
    for more in (["--dry-run"], []):
        command = ["pretrain", tiny.pretrain, "monitor.webhook=no-such-program-here", "--run", str(tmp_path / "run"), *more]
        assert main(command) == 2
        assert "no program 'no-such-program-here'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
