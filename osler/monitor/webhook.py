"""A command that is run for each alert, with the alert as JSON on its standard input. It is started without a shell."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict

from osler.errors import UserError
from osler.monitor.alerts import Alert

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 30.0


def parse_command(command: str) -> list[str]:
    """The words of a webhook command; raises UserError when they cannot be told apart or the program is not there."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(f"monitor.webhook is {command!r}, which cannot be split into words: {error}.") from error
    if not words:
        raise UserError("monitor.webhook is empty: give a command, or null for none.")
    if shutil.which(words[0]) is None:
        raise UserError(
            f"monitor.webhook is {command!r}, but there is no program {words[0]!r} here. The command is started without a shell: "
            "write pipes and variables into a script, and name that."
        )
    return words


class Webhook:
    """Runs the command for each alert. A failure is told once, and the next alert tries again."""

    def __init__(self, command: str, run: str, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self.words, self.run, self.timeout_seconds = parse_command(command), run, timeout_seconds
        self.failed = False

    def write(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """Metrics are not for this place."""

    def alert(self, alert: Alert) -> None:
        """Give the alert and the name of its run to the command, and wait for its end."""
        text = json.dumps({"run": self.run, **asdict(alert)}, ensure_ascii=False) + "\n"
        try:
            subprocess.run(self.words, input=text.encode("utf-8"), check=True, timeout=self.timeout_seconds, capture_output=True)
        except (OSError, subprocess.SubprocessError) as error:
            if not self.failed:
                said = getattr(error, "stderr", None) or b""
                why = said.decode("utf-8", "replace").strip()[-300:] or str(error)
                logger.warning(f"monitor.webhook failed ({why}). The run goes on; the next alert tries it again.")
            self.failed = True

    def close(self) -> None:
        """Nothing is open."""
