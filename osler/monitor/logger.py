"""Everything that a run's numbers reach: ``metrics.jsonl`` first, then the alert rules, then the trackers.

The file is written at once and depends on nothing else. An alert goes to the log, into ``events.jsonl``, and to the trackers, the
alert command and the webhook, each of which is a process of its own (``tracker.py``). Resume is exact: the file is cut to the
checkpoint's step, the rules replay it, and a tracker goes on with the run that it has.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from osler.config.yaml12 import load_yaml
from osler.monitor.alerts import Alert, Alerter, replay
from osler.monitor.config import MonitorConfig
from osler.monitor.history import RunSettings
from osler.monitor.notify import parse_command
from osler.monitor.tracker import CLOSE_SECONDS, TrackerProcess
from osler.records.events import EventLog
from osler.records.metrics import MetricsFile
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder

logger = logging.getLogger(__name__)

LEVELS = {"warning": logging.WARNING, "critical": logging.CRITICAL}  # of an alert in the log
TRACKERS = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases", "clearml": "ClearML"}  # field, package and extra: name


class SharedEventLog(EventLog):
    """An event log whose entries also go to the trackers."""

    def __init__(self, path: str | Path, trackers: Sequence[TrackerProcess]) -> None:
        super().__init__(path)
        self.trackers = trackers

    def write(self, step: int, kind: str, name: str, message: str, *, tell: bool = True, **details: Any) -> None:
        """Append one event, and with ``tell`` send it on as an alert, a warning unless ``details`` give its ``severity``."""
        super().write(step, kind, name, message, tell=tell, **details)
        for tracker in self.trackers if tell else ():
            tracker.alert(Alert(step, name, details.get("severity", "warning"), message))


class RunLogger:
    """Writes a run's metrics and alerts wherever they are wanted; ``events`` takes what else happens to the run."""

    def __init__(self, file: MetricsFile, alerter: Alerter | None, events: EventLog, trackers: Sequence[TrackerProcess]) -> None:
        self.file, self.alerter, self.events, self.trackers = file, alerter, events, trackers

    def write(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """Write one line of metrics, and raise the alerts that follow from it."""
        self.file.write(step, tokens, metrics)
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        for tracker in self.trackers:
            tracker.write(step, tokens, finite)
        for alert in self.alerter.observe(step, tokens, metrics) if self.alerter else ():
            logger.log(LEVELS[alert.severity], f"step {alert.step}: {alert.message}")
            self.events.write(alert.step, "alert", alert.name, alert.message, severity=alert.severity)

    def unresolved(self) -> list[Alert]:
        """Return the alerts that still hold at the end of the run; those of the end alone are written to the events here."""
        if self.alerter is None:
            return []
        alerts = self.alerter.unresolved()
        for alert in alerts:
            if alert.name not in self.alerter.said:
                self.events.write(alert.step, "alert", alert.name, alert.message, severity=alert.severity)
        return alerts

    def rewind(self, step: int) -> None:
        """Drop the lines after ``step`` and what the rules saw in them: a run that has gone back makes those steps again."""
        self.file.rewind(step)
        if self.alerter is not None:
            self.alerter = replay(self.alerter.history.settings, self.file.path)

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.file.close()
        deadline = time.monotonic() + (0.0 if kind is KeyboardInterrupt else CLOSE_SECONDS)  # who asks twice is not kept waiting
        for tracker in self.trackers:
            tracker.end()
        for tracker in self.trackers:
            tracker.close(max(0.0, deadline - time.monotonic()))


def check_trackers(config: MonitorConfig) -> None:
    """Raise UserError when a tracker's package or the alert command's program is not there, before anything is trained."""
    for field, name in TRACKERS.items():
        if getattr(config, field) and find_spec(field) is None:
            raise UserError(
                f"monitor.{field} needs the package of {name}: pip install -e '.[{field}]' in Osler's source tree, or leave "
                f"monitor.{field} out."
            )
    if config.alert_command is not None:
        parse_command(config.alert_command)


def open_logger(config: MonitorConfig, run: RunFolder, settings: RunSettings, *, step: int, is_first: bool = True) -> RunLogger:
    """Return the logger of a run that goes on from ``step`` (0: begins); that of any rank but the first writes nothing."""
    if not is_first:
        return RunLogger(MetricsFile(os.devnull), None, EventLog(os.devnull), ())
    file = MetricsFile(run.metrics, last_step=step or -1)
    alerter = replay(replace(settings, section=_section(run)), run.metrics)
    alerter.history.forget_speed()  # another process may have other devices, or more of them
    trackers = list(_start_trackers(config, run, step))
    return RunLogger(file, alerter, SharedEventLog(run.events, trackers), trackers)


def _section(run: RunFolder) -> str:
    """Return ``pretrain.`` and so on for a stage of a quickstart, whose settings are a section of its recipe; else nothing."""
    above = RunFolder(run.root.absolute().parent).config  # of whatever the folder above is, so it is not parsed
    is_stage = above.is_file() and "\nkind: quickstart\n" in "\n" + above.read_text(encoding="utf-8", errors="replace")
    return f"{run.root.name}." if is_stage else ""


def _start_trackers(config: MonitorConfig, run: RunFolder, step: int) -> Iterator[TrackerProcess]:
    def start(field: str, target: str, *arguments: Any) -> TrackerProcess:
        name = TRACKERS.get(field, f"monitor.{field}")
        return TrackerProcess(name, f"osler.monitor.{target}", run.trackers / f"{field}.log", *arguments)

    for field, target in (("alert_command", "notify:AlertCommand"), ("webhook", "notify:Webhook")):
        if (value := getattr(config, field)) is not None:
            yield start(field, target, value, str(run.root))
    if config.tensorboard:
        yield start("tensorboard", "tensorboard:TensorBoardTracker", str(run.trackers), step + 1 if step else 0)
    for field, target in (("wandb", "wandb:WandbTracker"), ("clearml", "clearml:ClearmlTracker")):
        if (project := getattr(config, field)) is not None:
            described = load_yaml(run.config.read_text(encoding="utf-8"), str(run.config)) if run.config.exists() else {}
            described.pop("monitor", None)  # a webhook's URL is a secret
            yield start(field, target, project, str(run.trackers), run.root.resolve().name, described)
