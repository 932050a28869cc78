"""Sends a run's numbers to ``metrics.jsonl`` first, then to the trackers, then to the alert rules.

The file is written at once and depends on nothing else. An alert goes to the log, into ``events.jsonl``, and to the trackers, the
alert command and the webhook, each of which is a separate process (``tracker.py``). The start and the end of each process of the
run are events too. A killed process writes no end, so a failed run does not look like a killed one. Resume is exact: the file is
cut to the checkpoint's step, the rules replay it, and a tracker continues the run that it already has.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from socket import gethostname
from typing import Any

from osler.monitor.alerts import Alert, Alerter, replay
from osler.monitor.config import MonitorConfig
from osler.monitor.history import RunSettings
from osler.monitor.sinks import parse_command
from osler.monitor.tracker import CLOSE_SECONDS, Trackers
from osler.records.jsonl import END, FAILED, FINISHED, START, STOPPED, EventLog, MetricsFile
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder

logger = logging.getLogger(__name__)

LIBRARIES = {"tensorboard": "TensorBoard", "wandb": "Wandb", "clearml": "Clearml"}  # each field is also its package and extra
SINKS = {"alert_command": "AlertCommand", "webhook": "Webhook", **LIBRARIES}  # field of the config -> class of the sink


class RunLogger:
    """Writes a run's metrics and alerts to all their destinations; ``events`` records everything else that happens.

    ``step`` is where the run continues, 0 when it begins. Only the logger of rank 0 writes.
    """

    def __init__(self, config: MonitorConfig, run: RunFolder, settings: RunSettings, *, step: int, is_first: bool = True) -> None:
        self.alerter: Alerter | None = None
        self.file = MetricsFile(run.metrics if is_first else os.devnull, last_step=step or -1)
        if is_first:
            self.alerter = replay(replace(settings, section=_section(run)), run.metrics)
            self.alerter.history.forget_speed()
        fields = [field for field in SINKS if is_first and getattr(config, field)]
        where = (str(run.root), step + 1 if step else 0)
        self.trackers = Trackers(
            run.trackers, {field: (f"osler.monitor.sinks:{SINKS[field]}", getattr(config, field), *where) for field in fields}
        )
        self.events = EventLog(run.events if is_first else os.devnull, partial(self.trackers.send, "alert"))

    def write(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """Write one line of metrics, and raise the alerts that follow from it."""
        self.file.write(step, tokens, metrics)
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        self.trackers.send("write", {"step": step, "tokens": tokens, "metrics": finite})
        for alert in self.alerter.observe(step, tokens, metrics) if self.alerter else ():
            logger.log(logging.getLevelName(alert.severity.upper()), f"step {alert.step}: {alert.message}")
            self._record(alert)

    def _record(self, alert: Alert) -> None:
        self.events.write(alert.step, "alert", alert.name, alert.message, severity=alert.severity)

    def rewind(self, step: int) -> None:
        """Drop the lines after ``step`` and what the rules saw in them: a run that has gone back makes those steps again."""
        self.file.rewind(step)
        if self.alerter is not None:
            self.alerter = replay(self.alerter.history.settings, self.file.path)

    @contextmanager
    def lifetime(self, step: Callable[[], int], is_done: Callable[[], bool], **facts: Any) -> Iterator[None]:
        """Write the start, with ``facts``, and the end of the work inside.

        Work that ends early without an error was asked to stop, and has saved. Only a failure also goes to the trackers: people
        know of every other end. A complete run says what is wrong with it.
        """
        first = step()
        name, message = ("resumed", f"Going on from step {first:,}.") if first else ("begun", "The run begins.")
        self.events.write(first, START, name, message, tell=False, host=gethostname(), **facts)
        try:
            yield
        except KeyboardInterrupt:
            message = "Stopped at once by a second signal, without saving."
            self.events.write(step(), END, STOPPED, message, tell=False, saved=False)
            raise
        except BaseException as error:
            self.events.write(step(), END, FAILED, in_a_line(error), severity="critical")
            raise
        if is_done():
            self._finish(step())
        else:
            self.events.write(step(), END, STOPPED, "Stopped by Ctrl-C or a signal, and saved.", tell=False, saved=True)

    def _finish(self, step: int) -> None:
        alerts = self.alerter.unresolved() if self.alerter else []
        for alert in alerts:
            if self.alerter and alert.name not in self.alerter.said:  # only the end raised it
                self._record(alert)
        names = [alert.name for alert in alerts]
        message = f"The run is complete, but these alerts still hold: {', '.join(names)}." if alerts else "The run is complete."
        if alerts:
            lines = (f"\n  {alert.severity.capitalize()}: step {alert.step}: {alert.message}" for alert in alerts)
            logger.warning(f"{message}{''.join(lines)}")
        self.events.write(step, END, FINISHED, message, tell=False, unresolved=names)

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.trackers.close(0.0 if kind is KeyboardInterrupt else CLOSE_SECONDS)  # nobody waits after a second signal


def in_a_line(error: BaseException) -> str:
    """Return the first line of an exception's message, with its type unless the message was written for the user."""
    first_line = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, UserError):
        return first_line
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


def check_trackers(config: MonitorConfig) -> None:
    """Raise UserError when a tracker's package or the alert command's program is not there, before anything is trained."""
    for field in LIBRARIES:
        if getattr(config, field) and find_spec(field) is None:
            raise UserError(
                f"monitor.{field} needs the package {field}: pip install -e '.[{field}]' in Osler's source tree, or leave "
                f"monitor.{field} out."
            )
    if config.alert_command is not None:
        parse_command(config.alert_command)


def _section(run: RunFolder) -> str:
    """Return the prefix of a pipeline stage's settings in its recipe, such as ``pretrain.``; any other run has none."""
    above = RunFolder(run.root.absolute().parent).config  # the folder above may be anything, so this file is not parsed
    is_stage = above.is_file() and "\nkind: pipeline\n" in "\n" + above.read_text(encoding="utf-8", errors="replace")
    return f"{run.root.name}." if is_stage else ""
