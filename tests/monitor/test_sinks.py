"""An alert reaches a command and a webhook as JSON; one that cannot work is refused, one that fails is told."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from osler.monitor import sinks
from osler.monitor.alerts import Alert
from osler.monitor.config import MonitorConfig
from osler.monitor.logger import RunLogger, check_trackers
from osler.monitor.sinks import AlertCommand, Webhook
from osler.monitor.tracker import UndeliveredError
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder
from tests.monitor.test_logger import SETTINGS, SICK

ALERT = Alert(7, "dead-layers", "critical", "layer 3 is dead – look")
PYTHON = f'"{sys.executable}"'


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

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/hooks/1", got
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def test_command_and_webhook_get_the_same_json(tmp_path, monkeypatch):
    monkeypatch.setattr("osler.monitor.logger.CLOSE_SECONDS", 300.0)
    script, out = tmp_path / "my hook.py", tmp_path / "got; rm x"
    script.write_text("import sys; open(sys.argv[1], 'ab').write(sys.stdin.buffer.read())")
    run = RunFolder.create(tmp_path / "run")
    with server() as (url, got):
        config = MonitorConfig(alert_command=f"{PYTHON} '{script}' '{out}'", webhook=url)
        with RunLogger(config, run, SETTINGS, step=0) as logger:
            logger.events.write(7, "incident", "dead-layers", ALERT.message, severity="critical", rows=[1, 2])
            logger.write(1, 1, SICK)
    lines = out.read_bytes().splitlines()
    expected = {"run": str(run.root), "step": 7, "name": "dead-layers", "severity": "critical", "message": ALERT.message}
    assert json.loads(lines[0]) == expected and json.loads(lines[1])["step"] == 1
    assert got == [("POST", "application/json", line) for line in lines]


@pytest.mark.parametrize(
    ("code", "timeout", "reason"),
    [("import sys; sys.exit('no such channel')", 300.0, "no such"), ("import time; time.sleep(3600)", 0.1, "timed out")],
)
def test_a_command_that_fails_says_why(code, timeout, reason, monkeypatch):
    monkeypatch.setattr(sinks, "TIMEOUT_SECONDS", timeout)
    with pytest.raises(UndeliveredError, match=reason):
        AlertCommand(f'{PYTHON} -c "{code}"', "runs/x", 0).alert(ALERT)


def test_a_webhook_that_fails_says_why():
    with server(500) as (url, _), pytest.raises(UndeliveredError, match="500"):
        Webhook(url, "runs/x", 0).alert(ALERT)
    with pytest.raises(UndeliveredError, match="refused"):
        Webhook(url, "runs/x", 0).alert(ALERT)
    with server(302, Location=url) as (moved, got):
        with pytest.raises(UndeliveredError, match="302"):
            Webhook(moved, "runs/x", 0).alert(ALERT)
        assert len(got) == 1


@pytest.mark.parametrize(
    ("command", "match"), [("no-such-program-anywhere x", "no program"), ("echo 'x", "cannot be split"), (" ", "is empty")]
)
def test_a_command_that_cannot_work_is_refused_before_training(command, match):
    with pytest.raises(UserError, match=match):
        check_trackers(MonitorConfig(alert_command=command))


@pytest.mark.parametrize(
    "url",
    ["python tell_me.py", "http://example.org/x", "ftp://example.org", "https://", "https://example.org:port", "https://a b"],
)
def test_a_webhook_that_is_no_secure_url_is_refused(url):
    with pytest.raises(ValueError, match=r"must be an https:// URL.*alert_command"):
        MonitorConfig(webhook=url)


@pytest.mark.parametrize("url", ["https://example.org:8443/hooks/x?id=1", "http://localhost:8080", "http://[::1]/x"])
def test_a_webhook_is_encrypted_or_on_this_machine(url):
    assert MonitorConfig(webhook=url).webhook == url


def test_an_alert_command_has_the_environment_of_the_run(tmp_path, monkeypatch):
    """Osler's own folders do not shadow the modules of the script."""
    monkeypatch.setattr("osler.monitor.logger.CLOSE_SECONDS", 300.0)
    monkeypatch.setenv("PYTHONPATH", "mine")
    script, out = tmp_path / "hook.py", tmp_path / "out"
    script.write_text("import os, sys; open(sys.argv[1], 'w').write(os.environ['PYTHONPATH'])")
    config = MonitorConfig(alert_command=f"{PYTHON} '{script}' '{out}'")
    with RunLogger(config, RunFolder.create(tmp_path / "run"), SETTINGS, step=0) as logger:
        logger.events.write(7, "incident", "dead-layers", ALERT.message)
    assert out.read_text() == "mine"


@pytest.mark.parametrize("above", [b"- a list", b"", b"\xff", b"a: 1\na: 2", b"x: !env y"])
def test_a_config_file_above_the_run_is_not_read_as_osler_s(tmp_path, above):
    (tmp_path / "config.yaml").write_bytes(above)
    with RunLogger(MonitorConfig(), RunFolder.create(tmp_path / "run"), SETTINGS, step=0) as logger:
        assert logger.alerter.history.settings.section == ""
