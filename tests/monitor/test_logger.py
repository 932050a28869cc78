"""Lines, alerts and the ends of a run reach the file, the events, the log and the trackers; a resumed run goes on with them."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from osler.monitor import sinks
from osler.monitor.alerts import Alert
from osler.monitor.config import MonitorConfig
from osler.monitor.history import RunSettings
from osler.monitor.logger import RunLogger, check_trackers
from osler.monitor.sinks import AlertCommand, Webhook
from osler.monitor.tracker import UndeliveredError
from osler.records.jsonl import read_events
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder

SICK = {"model/dead_units_frac/0": 0.6}
ALERT = Alert(7, "dead-layers", "critical", "layer 3 is dead – look")
PYTHON = f'"{sys.executable}"'


@pytest.fixture(autouse=True)
def patience_at_the_end(monkeypatch):
    monkeypatch.setattr("osler.monitor.logger.CLOSE_SECONDS", 300.0)


@pytest.fixture
def run(tmp_path) -> RunFolder:
    return RunFolder.create(tmp_path / "run")


@pytest.fixture
def hook(tmp_path):
    """An alert command that appends what it is given to a file, after the environment's PYTHONPATH; and that file."""
    script, out = tmp_path / "my hook.py", tmp_path / "got; rm x"
    script.write_text(
        "import os, sys\nwith open(sys.argv[1], 'ab') as file:\n"
        "    file.write(os.environ.get('PYTHONPATH', '').encode() + b' ' + sys.stdin.buffer.read())\n"
    )
    return f"{PYTHON} '{script}' '{out}'", out


def opened(run: RunFolder, step: int = 0, *, is_first: bool = True, **fields: object) -> RunLogger:
    return RunLogger(MonitorConfig(**fields), run, RunSettings(lr=1e-3, clip_norm=1.0), step=step, is_first=is_first)


def steps(run: RunFolder) -> list[int]:
    return [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()]


def test_an_alert_reaches_log_and_events_and_no_tracker_holds_up_the_file(run, capsys):
    with opened(run, alert_command="false") as logger:
        for step in (1, 2, 3):
            logger.write(step, step, SICK)
            assert steps(run)[-1] == step
    (event,) = read_events(run.events)
    assert (event.kind, event.name, event.step, event.details["severity"]) == ("alert", "dead-layers", 1, "critical")
    said = capsys.readouterr().err
    assert said.count("Critical: step 1: 60% of the feed-forward units in layer 0 give nothing") == 1
    assert said.count("Warning: monitor.alert_command failed") == 1


def test_a_resumed_run_does_not_say_again_what_it_said_and_finds_out_anew_how_fast_it_is(run, capsys):
    for begun, speed in ((0, 5e4), (8, 1e4)):  # the second time on a smaller machine
        with opened(run, begun) as logger:
            for step in range(begun + 1, begun + 11):
                logger.write(step, 1_000_000 * step, SICK | {"perf/tokens_per_second": speed})
            assert logger.alerter.history.best_speed == speed
    assert steps(run) == list(range(1, 19))
    assert [event.step for event in read_events(run.events)] == [1] and capsys.readouterr().err.count("Critical: ") == 1


@pytest.mark.parametrize(
    ("above", "key"), [(b"kind: pipeline\n", "run.optim.lr"), (b"kind: pretrain\n", "optim.lr"), (b"\xff", "optim.lr")]
)
def test_the_advice_for_a_stage_of_a_pipeline_names_the_key_of_its_recipe(run, capsys, above, key):
    RunFolder(run.root.parent).config.write_bytes(above)
    with opened(run) as logger:
        logger.write(1, 1, SICK)
    assert f"try {key}=0.00033 (now 0.001)" in capsys.readouterr().err


def test_a_run_that_goes_back_forgets_the_lines_that_it_makes_again(run):
    with opened(run) as logger:
        for step in (*range(1, 9), *range(5, 9)):
            if step == 5:
                logger.rewind(4)
            logger.write(step, step, SICK if step == 6 else {"train/lr": 1.0})
    assert steps(run) == list(range(1, 9))
    assert [event.step for event in read_events(run.events)] == [6, 6]


def test_other_ranks_write_nothing(run, capsys):
    with opened(run, is_first=False, alert_command="false") as logger:
        logger.write(1, 1, SICK)
        logger.events.write(1, "rollback", "rollback", "back to step 0")
        logger.rewind(0)
    assert list(run.root.iterdir()) == [] and capsys.readouterr().err == ""


def test_starts_and_ends_are_events_and_failures_reach_the_alert_command(run, hook):
    for first, last, error in [
        (0, 4, None),
        (4, 6, ValueError("no such row\nand more")),
        (4, 6, UserError("Lower optim.lr.")),
        (4, 7, KeyboardInterrupt()),
        (4, 10, None),
    ]:
        step = first
        try:
            with opened(run, first, alert_command=hook[0]) as logger, logger.lifetime(lambda: step, lambda: step >= 10):  # noqa: B023
                step = last
                if error is not None:
                    raise error
        except BaseException as raised:
            assert raised is error
    events = read_events(run.events)
    assert [(e.kind, e.name, e.step) for e in events] == [
        ("start", "begun", 0), ("end", "stopped", 4), ("start", "resumed", 4), ("end", "failed", 6), ("start", "resumed", 4),
        ("end", "failed", 6), ("start", "resumed", 4), ("end", "stopped", 7), ("start", "resumed", 4), ("end", "finished", 10),
    ]  # fmt: skip
    assert [e.message for e in events if e.name == "failed"] == ["ValueError: no such row", "Lower optim.lr."]
    assert [e.details["saved"] for e in events if e.name == "stopped"] == [True, False]
    told = hook[1].read_text()
    assert told.count('"failed"') == told.count('"critical"') == told.count("\n") == 2 and '"message": "Lower optim.lr."' in told


# -- where metrics and alerts go ---------------------------------------------------------------------------------------


@contextmanager
def server(status: int = 200, **headers: str) -> Iterator[tuple[str, list[tuple[str, str, bytes]]]]:
    """A web server on this machine that answers so; its URL, and what was sent to it: method, type, body."""
    got = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            got.append((self.command, self.headers["Content-Type"], self.rfile.read(int(self.headers.get("Content-Length", 0)))))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/hooks/1", got
        http.shutdown()


def test_command_and_webhook_get_the_same_json_and_the_command_the_runs_environment(run, hook, monkeypatch):
    """Osler's own folders do not shadow the modules of the command's script."""
    monkeypatch.setenv("PYTHONPATH", "mine")
    with server() as (url, got), opened(run, alert_command=hook[0], webhook=url) as logger:
        logger.events.write(7, "incident", "dead-layers", ALERT.message, severity="critical", rows=[1, 2])
        logger.write(1, 1, SICK)
    lines = [line.removeprefix(b"mine ") for line in hook[1].read_bytes().splitlines()]
    expected = {"run": str(run.root), "step": 7, "name": "dead-layers", "severity": "critical", "message": ALERT.message}
    assert json.loads(lines[0]) == expected and json.loads(lines[1])["step"] == 1
    assert got == [("POST", "application/json", line) for line in lines]


def test_a_command_or_a_webhook_that_fails_says_why(monkeypatch):
    with pytest.raises(UndeliveredError, match="no such channel"):
        AlertCommand(f"{PYTHON} -c \"import sys; sys.exit('no such channel')\"", "runs/x", 0).alert(ALERT)
    with monkeypatch.context() as patch, pytest.raises(UndeliveredError, match="timed out"):
        patch.setattr(sinks, "TIMEOUT_SECONDS", 0.1)
        AlertCommand(f'{PYTHON} -c "import time; time.sleep(3600)"', "runs/x", 0).alert(ALERT)
    for status in (500, 302):  # a redirect is not followed
        with server(status, Location="/elsewhere") as (url, got):
            with pytest.raises(UndeliveredError, match=str(status)):
                Webhook(url, "runs/x", 0).alert(ALERT)
            assert len(got) == 1
    with pytest.raises(UndeliveredError, match="refused"):
        Webhook(url, "runs/x", 0).alert(ALERT)


def test_a_webhook_is_encrypted_or_on_this_machine():
    for url in ("https://example.org:8443/hooks/x?id=1", "HTTP://localhost:8080", "http://[::1]/x", "https://[1::2]"):
        assert MonitorConfig(webhook=url).webhook == url
    wrong = "python tell_me.py|http://example.org/x|ftp://example.org|https://|https://example.org:port|https://a b|https://é.org"
    for url in (*wrong.split("|"), "http://localhost.example.org"):
        with pytest.raises(ValueError, match=r"must be an https:// URL.*alert_command"):
            MonitorConfig(webhook=url)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("alert_command", "no-such-program-anywhere x", "no program"),
        ("alert_command", "echo 'x", "cannot be split"),
        ("alert_command", " ", "no program"),
        *((field, "project", rf"pip install -e '\.\[{field}\]'") for field in ("wandb", "clearml")),
        ("tensorboard", True, r"pip install -e '\.\[tensorboard\]'"),
    ],
)
def test_what_cannot_work_is_refused_before_training(field, value, said, monkeypatch):
    monkeypatch.setattr("osler.monitor.logger.find_spec", lambda name: None)
    with pytest.raises(UserError, match=said):
        check_trackers(MonitorConfig(**{field: value}))


def test_tensorboard_has_every_step_once_after_a_resume(run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="extra `tensorboard`")
    for step in (0, 3):
        with opened(run, step, tensorboard=True) as logger:
            for n in range(step + 1, step + 6):
                logger.write(n, n, {"train/loss": 1.0 / n, **(SICK if n == 1 else {})})
        time.sleep(1.1)  # event files are read in the order of the seconds in their names
    events = accumulator.EventAccumulator(str(run.trackers / "tensorboard"))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("train/loss")}
    assert len(events.Scalars("train/loss")) == 8 and found == pytest.approx({n: 1.0 / n for n in range(1, 9)}, rel=1e-6)
    assert "alerts/dead-layers/text_summary" in events.Tags()["tensors"]


@pytest.mark.parametrize(("field", "offline"), [("wandb", {"WANDB_MODE": "offline"}), ("clearml", {"CLEARML_OFFLINE_MODE": "1"})])
def test_a_tracker_without_network_takes_a_run_and_its_resume(field, offline, run, monkeypatch, capsys):
    pytest.importorskip(field, reason=f"extra `{field}`")
    for name, value in {**offline, "HOME": str(run.root.parent)}.items():
        monkeypatch.setenv(name, value)
    run.config.write_text("kind: pretrain\noptim: {lr: 0.1}\n")
    for step in (0, 2):
        with opened(run, step, **{field: "osler-test"}) as logger:
            for n in range(step + 1, step + 4):
                logger.write(n, n, {"train/loss": 1.0 / n, **SICK})
    assert "failed" not in capsys.readouterr().err
    if field == "wandb":
        ids = {folder.name.rpartition("-")[2] for folder in (run.trackers / "wandb").glob("offline-run-*")}
        assert ids == {(run.trackers / "wandb.id").read_text()}
