"""Ways to tell a person of an alert: a command, and a webhook. Both get the alert as one JSON object:

    {"run": "runs/mine", "step": 120, "name": "exploding-gradient", "severity": "critical", "message": "..."}

``run`` is the run folder, ``name`` and ``step`` are those of the event in ``events.jsonl``, ``severity`` is warning or critical,
and ``message`` is a paragraph for a person.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from dataclasses import asdict
from http.client import HTTPException
from typing import Any
from urllib.request import HTTPRedirectHandler, Request, build_opener

from osler.monitor.alerts import Alert
from osler.monitor.tracker import Tracker, UndeliveredError
from osler.runtime.errors import UserError

TIMEOUT_SECONDS = 30.0


class AlertCommand(Tracker):
    """Runs a command for each alert, without a shell, and gives it the JSON on its standard input."""

    def __init__(self, command: str, run: str, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self.words, self.run, self.timeout_seconds = parse_command(command), run, timeout_seconds

    def alert(self, alert: Alert) -> None:
        """Run the command and wait for its end."""
        try:
            subprocess.run(
                self.words, input=to_json(self.run, alert) + b"\n", check=True, timeout=self.timeout_seconds, capture_output=True
            )
        except (OSError, subprocess.SubprocessError) as error:
            printed = getattr(error, "stderr", None) or b""
            raise UndeliveredError(printed.decode("utf-8", "replace").strip()[-300:] or str(error)) from error


class Webhook(Tracker):
    """Sends each alert to a URL, as the JSON body of a POST request."""

    def __init__(self, url: str, run: str, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self.url, self.run, self.timeout_seconds = url, run, timeout_seconds
        self.opener = build_opener(NoRedirects)

    def alert(self, alert: Alert) -> None:
        """Send the alert and wait for the answer."""
        headers = {"Content-Type": "application/json", "User-Agent": "osler"}
        try:
            self.opener.open(Request(self.url, to_json(self.run, alert), headers), timeout=self.timeout_seconds).close()
        except (OSError, HTTPException) as error:
            raise UndeliveredError(str(error)) from error


class NoRedirects(HTTPRedirectHandler):
    """Makes an error of a redirect, which would turn the POST into a GET without the alert."""

    def redirect_request(self, *_: Any) -> None:
        """Follow no redirect."""


def to_json(run: str, alert: Alert) -> bytes:
    """Return what the command and the webhook get."""
    return json.dumps({"run": run, **asdict(alert)}, ensure_ascii=False).encode("utf-8")


def parse_command(command: str) -> list[str]:
    """Return the words of an alert command; raises UserError when it cannot be split or the program is not there."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(f"monitor.alert_command is {command!r}, which cannot be split into words: {error}.") from error
    if not words:
        raise UserError("monitor.alert_command is empty: give a command, or null for none.")
    if shutil.which(words[0]) is None:
        raise UserError(
            f"monitor.alert_command is {command!r}, but there is no program {words[0]!r} here. The command is started without a "
            "shell: write pipes and variables into a script, and name that."
        )
    return words
