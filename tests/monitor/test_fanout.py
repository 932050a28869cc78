"""Alerts and lines reach everyone; a place that fails, hangs or is slow costs the run nothing but a word."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable

import pytest

from osler.errors import UserError
from osler.monitor import courier as couriers
from osler.monitor.alerts import Alert, Watch
from osler.monitor.config import MonitorConfig
from osler.monitor.courier import Courier
from osler.monitor.fanout import FanOut, SpreadingLog, check_sinks, open_sinks
from osler.monitor.history import Facts
from osler.monitor.outpost import Outpost
from osler.monitor.webhook import Webhook
from osler.records.events import read_events
from osler.records.metrics import MetricsFile
from osler.runtime.files import RunFolder

FACTS = Facts(lr=1e-3, clip_norm=1.0)
ALERT = Alert(7, "dead-layers", "critical", "layer 3 is dead – look")
PYTHON = f'"{sys.executable}"'
SICK = {"model/dead_units_frac/0": 0.6}


PATIENCE_SECONDS = 300.0


@pytest.fixture(autouse=True)
def patience_at_the_end(monkeypatch):
    monkeypatch.setattr("osler.monitor.fanout.CLOSE_SECONDS", PATIENCE_SECONDS)


class Notebook:
    """A sink that keeps what it gets, and can be made to fail or to wait."""

    def __init__(self, *, fails_at: int = -1, waits_at: int = -1, gate: threading.Event | None = None) -> None:
        self.steps: list[int] = []
        self.alerts: list[Alert] = []
        self.closed = False
        self.fails_at, self.waits_at, self.gate = fails_at, waits_at, gate or threading.Event()

    def write(self, step, tokens, metrics):
        if step == self.fails_at:
            raise ConnectionError("no route to host")
        if step == self.waits_at:
            self.gate.wait(PATIENCE_SECONDS)
        self.steps.append(step)

    def alert(self, alert):
        self.alerts.append(alert)

    def close(self):
        self.closed = True


def wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_courier_hands_on_everything_in_order():
    notebook = Notebook()
    courier = Courier("Notebook", lambda: notebook)
    for step in range(50):
        courier.write(step, step, {})
    courier.alert(ALERT)
    courier.close()
    assert notebook.steps == list(range(50)) and notebook.alerts == [ALERT] and notebook.closed
    courier.close()


def test_a_sink_that_fails_is_told_once_and_left_alone(capsys):
    notebook = Notebook(fails_at=3)
    courier = Courier("Notebook", lambda: notebook)
    for step in range(5):
        courier.write(step, step, {})
    wait_until(lambda: courier._failure.error)
    for step in range(5, 10):
        courier.write(step, step, {})
    courier.close()
    assert notebook.steps == [0, 1, 2]
    assert capsys.readouterr().err.count("Notebook failed (ConnectionError: no route to host). The run goes on without it.") == 1


@pytest.mark.parametrize("error", [OSError, SystemExit, KeyboardInterrupt])
def test_a_sink_that_cannot_be_opened_is_told_at_the_end_at_the_latest(capsys, error):
    def refuse():
        raise error("not today")

    courier = Courier("Notebook", refuse)
    courier.close()
    assert f"Notebook failed ({error.__name__}: not today)" in capsys.readouterr().err


def test_a_sink_that_hangs_stops_neither_a_step_nor_the_end(capsys):
    notebook = Notebook(waits_at=1)
    courier = Courier("Notebook", lambda: notebook, hang_seconds=0.05)
    courier.write(0, 0, {})
    courier.write(1, 1, {})
    wait_until(lambda: courier.gone or courier.write(2, 2, {}))
    courier.close()
    assert courier._thread.is_alive(), "nobody has waited for it"
    assert capsys.readouterr().err.count("Notebook has not answered for 0.05 s") == 1
    notebook.gate.set()


def test_the_end_of_a_run_waits_a_little_and_no_more(capsys):
    notebook = Notebook(waits_at=0)
    courier = Courier("Notebook", lambda: notebook)
    courier.write(0, 0, {})
    courier.close(seconds=0.05)
    assert courier._thread.is_alive() and "has not finished within 0.05 s" in capsys.readouterr().err
    notebook.gate.set()


def test_a_slow_sink_loses_lines_and_they_are_counted(capsys, monkeypatch):
    monkeypatch.setattr(couriers, "QUEUE_LINES", 4)
    notebook = Notebook(waits_at=0)
    courier = Courier("Notebook", lambda: notebook)
    courier.write(0, 0, {})
    wait_until(courier._todo.empty)
    for step in range(1, 10):
        courier.write(step, step, {})
    assert courier.dropped == 5
    notebook.gate.set()
    courier.close()
    assert notebook.steps == [0, 1, 2, 3, 4] and "too slow for 5 lines" in capsys.readouterr().err


def test_an_alert_reaches_console_diary_and_sinks_and_the_file_depends_on_none(tmp_path, capsys):
    run, good, bad = RunFolder.create(tmp_path), Notebook(), Notebook(fails_at=1)
    places = [Courier("good", lambda: good), Courier("bad", lambda: bad)]
    with FanOut(MetricsFile(run.metrics), Watch(FACTS), SpreadingLog(run.events, places), places) as sinks:
        for step in (1, 2, 3):
            sinks.write(step, step, SICK)
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2, 3]
    (event,) = read_events(run.events)
    assert (event.kind, event.name, event.step, event.details["severity"]) == ("alert", "dead-layers", 1, "critical")
    assert [alert.name for alert in good.alerts] == ["dead-layers"] and good.steps == [1, 2, 3] and good.closed
    said = capsys.readouterr().err
    assert said.count("Critical: step 1: 60% of the feed-forward units in layer 0 give nothing") == 1
    assert said.count("bad failed") == 1


def test_a_resumed_run_does_not_say_again_what_it_said(tmp_path, capsys):
    run = RunFolder.create(tmp_path)
    for step in (0, 3):
        with open_sinks(MonitorConfig(), run, FACTS, step=step) as sinks:
            for n in range(step + 1, step + 6):
                sinks.write(n, n, SICK)
    assert len(run.metrics.read_text().splitlines()) == 8
    assert [event.step for event in read_events(run.events)] == [1] and capsys.readouterr().err.count("Critical: ") == 1


def test_a_run_that_goes_on_finds_out_anew_how_fast_it_is(tmp_path):
    run = RunFolder(tmp_path)
    for begun, speed in ((0, 5e4), (10, 1e4)):  # the second time on a smaller machine
        with open_sinks(MonitorConfig(), run, FACTS, step=begun) as sinks:
            assert sinks.watch.history.best_speed == 0.0 and sinks.watch.history.lines == begun
            for step in range(begun + 1, begun + 11):
                sinks.write(step, 1_000_000 * step, {"perf/tokens_per_second": speed})
            assert sinks.watch.history.best_speed == speed
    assert read_events(run.events) == []


def test_a_run_that_goes_back_forgets_the_lines_that_it_makes_again(tmp_path):
    run = RunFolder.create(tmp_path)
    with open_sinks(MonitorConfig(), run, FACTS, step=0) as sinks:
        for step in (*range(1, 9), *range(5, 9)):
            if step == 5:
                sinks.rewind(4)
            sinks.write(step, step, SICK if step == 6 else {"train/lr": 1.0})
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == list(range(1, 9))
    assert [event.step for event in read_events(run.events)] == [6, 6]


def test_other_ranks_write_nothing(tmp_path, capsys):
    run = RunFolder.create(tmp_path)
    with open_sinks(MonitorConfig(webhook="false"), run, FACTS, step=0, is_first=False) as sinks:
        sinks.write(1, 1, SICK)
        sinks.events.write(1, "rollback", "rollback", "back to step 0")
        sinks.rewind(0)
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().err == ""


def test_a_webhook_gets_the_alert_as_json_without_a_shell(tmp_path):
    script, out = tmp_path / "my hook.py", tmp_path / "got; rm x"
    script.write_text("import sys; open(sys.argv[1], 'ab').write(sys.stdin.buffer.read())")
    run = RunFolder.create(tmp_path / "run")
    with open_sinks(MonitorConfig(webhook=f"{PYTHON} '{script}' '{out}'"), run, FACTS, step=0) as sinks:
        sinks.events.write(7, "incident", "dead-layers", ALERT.message, severity="critical", rows=[1, 2])
        sinks.write(1, 1, SICK)
    first, second = (json.loads(line) for line in out.read_text(encoding="utf-8").splitlines())
    expected = {"run": str(run.root), "step": 7, "name": "dead-layers", "severity": "critical", "message": ALERT.message}
    assert first == expected and second["name"] == "dead-layers"


@pytest.mark.parametrize(
    ("code", "timeout", "said"),
    [
        ("import sys; sys.exit('no such channel')", PATIENCE_SECONDS, "no such channel"),
        ("import time; time.sleep(3600)", 0.1, "timed out"),
    ],
)
def test_a_webhook_that_fails_is_told_once_and_tried_again(capsys, code, timeout, said):
    hook = Webhook(f'{PYTHON} -c "{code}"', "runs/x", timeout_seconds=timeout)
    hook.alert(ALERT)
    hook.alert(ALERT)
    assert capsys.readouterr().err.count(f"{said}") == 1


@pytest.mark.parametrize(
    ("command", "match"), [("no-such-program-anywhere x", "no program"), ("echo 'x", "cannot be split"), (" ", "is empty")]
)
def test_a_webhook_that_cannot_work_is_refused_before_training(command, match):
    with pytest.raises(UserError, match=match):
        check_sinks(MonitorConfig(webhook=command))


@pytest.mark.parametrize("field", ["tensorboard", "wandb", "clearml"])
def test_a_missing_tracker_is_refused_before_training_and_names_the_extra(field, monkeypatch):
    monkeypatch.setattr("osler.monitor.fanout.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"pip install -e '\.\[{field}\]'"):
        check_sinks(MonitorConfig(**{field: True if field == "tensorboard" else "project"}))


OUTPOST = """
import os, pathlib, sys, time
class Sink:
    def __init__(self, folder, fate):
        self.path, self.fate = pathlib.Path(folder) / "got", fate
        if fate == "refuses":
            sys.exit("no API key")
    def write(self, step, tokens, metrics):
        if self.fate == "crashes":
            os.abort()
        if self.fate == "hangs":
            time.sleep(3600)
        self.path.open("a").write(f"{step} {tokens} {metrics} ")
    def alert(self, alert):
        self.path.open("a").write(f"{alert.name} ")
    def close(self):
        self.path.open("a").write("closed")
"""


@pytest.fixture
def make_outpost(tmp_path, monkeypatch):
    (tmp_path / "far_away.py").write_text(OUTPOST)
    monkeypatch.syspath_prepend(str(tmp_path))
    started: list[Outpost] = []

    def build(fate: str) -> Outpost:
        started.append(Outpost("far_away:Sink", tmp_path / "run" / "log", str(tmp_path), fate))
        return started[-1]

    yield build
    for outpost in started:
        outpost.process.kill()
        outpost.process.wait()


def test_an_outpost_passes_on_what_it_gets(make_outpost, tmp_path, capsys):
    courier = Courier("Far", lambda: make_outpost("works"))
    courier.write(1, 10, {"train/loss": 0.5})
    courier.alert(ALERT)
    courier.close(PATIENCE_SECONDS)
    assert (tmp_path / "got").read_text() == "1 10 {'train/loss': 0.5} dead-layers closed" and capsys.readouterr().err == ""


@pytest.mark.parametrize(("fate", "said"), [("refuses", "no API key"), ("crashes", "more in")])
def test_an_outpost_that_ends_is_told_with_its_last_words(make_outpost, fate, said, capsys):
    courier = Courier("Far", lambda: make_outpost(fate))
    courier.write(1, 10, {})
    courier.close(PATIENCE_SECONDS)
    told = capsys.readouterr().err
    assert "Far failed" in told and said in told and told.count("\n") == 1


def test_an_outpost_that_hangs_does_not_hold_up_the_end(make_outpost, capsys):
    courier = Courier("Far", lambda: make_outpost("hangs"))
    courier.write(1, 10, {})
    courier.close(0.2)
    assert courier._thread.is_alive() and "Far has not finished" in capsys.readouterr().err


def test_tensorboard_has_every_step_once_after_a_resume(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="extra `tensorboard`")
    run = RunFolder.create(tmp_path)
    for step in (0, 3):
        with open_sinks(MonitorConfig(tensorboard=True), run, FACTS, step=step) as sinks:
            for n in range(step + 1, step + 6):
                sinks.write(n, n, {"train/loss": 1.0 / n, **(SICK if n == 1 else {})})
            wait_until(lambda: all(courier._busy_since is None for courier in sinks.couriers))
        time.sleep(1.1)  # event files are read in the order of the seconds in their names
    events = accumulator.EventAccumulator(str(run.trackers / "tensorboard"))
    events.Reload()
    assert [(event.step, pytest.approx(1.0 / event.step, rel=1e-6)) for event in events.Scalars("train/loss")] == [
        (event.step, event.value) for event in events.Scalars("train/loss")
    ]
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))
    assert "alerts/dead-layers/text_summary" in events.Tags()["tensors"]


@pytest.mark.parametrize(("field", "offline"), [("wandb", {"WANDB_MODE": "offline"}), ("clearml", {"CLEARML_OFFLINE_MODE": "1"})])
def test_a_tracker_without_network_takes_a_run_and_its_resume(field, offline, tmp_path, monkeypatch, capsys):
    pytest.importorskip(field, reason=f"extra `{field}`")
    for name, value in {**offline, "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    run = RunFolder.create(tmp_path / "run")
    run.config.write_text("kind: pretrain\noptim: {lr: 0.1}\n")
    for step in (0, 2):
        with open_sinks(MonitorConfig(**{field: "osler-test"}), run, FACTS, step=step) as sinks:
            for n in range(step + 1, step + 4):
                sinks.write(n, n, {"train/loss": 1.0 / n, **SICK})
            for courier in sinks.couriers:
                courier.close(PATIENCE_SECONDS)
    assert "failed" not in capsys.readouterr().err
    if field == "wandb":
        ids = {folder.name.rpartition("-")[2] for folder in (run.trackers / "wandb").glob("offline-run-*")}
        assert ids == {(run.trackers / "wandb.id").read_text()}
