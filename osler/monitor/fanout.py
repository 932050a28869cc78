"""Everything that a run's numbers reach: ``metrics.jsonl`` first, then the rules, then the places outside the run.

The file is written at once and depends on nothing else. An alert goes to the console, into ``events.jsonl``, to the webhook
command and to the trackers; each of the last has a thread of its own (``courier.py``), so that a dead one costs the run nothing.
Resume is exact: the file is cut to the checkpoint's step, the rules replay it, and a tracker goes on with the run that it has.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from osler.errors import UserError
from osler.monitor.alerts import Alert, Watch, replayed
from osler.monitor.config import MonitorConfig
from osler.monitor.courier import CLOSE_SECONDS, Courier, Sink
from osler.monitor.history import Facts
from osler.monitor.outpost import Outpost
from osler.monitor.sink_tensorboard import TensorBoardSink
from osler.monitor.webhook import Webhook, parse_command
from osler.records.events import EventLog
from osler.records.metrics import MetricsFile
from osler.runtime.files import RunFolder
from osler.yaml12 import load_yaml

logger = logging.getLogger(__name__)

LEVELS = {"warning": logging.WARNING, "critical": logging.CRITICAL}  # of an alert in the log
TRACKERS = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases", "clearml": "ClearML"}  # field, package and extra: name


class SpreadingLog(EventLog):
    """A diary whose entries also go to the places outside the run."""

    def __init__(self, path: str | Path, couriers: Sequence[Courier]) -> None:
        super().__init__(path)
        self.couriers = couriers

    def write(self, step: int, kind: str, name: str, message: str, *, tell: bool = True, **details: Any) -> None:
        """Append one event and with ``tell`` send it on, as a warning unless ``severity`` is among its details."""
        super().write(step, kind, name, message, tell=tell, **details)
        for courier in self.couriers if tell else ():
            courier.alert(Alert(step, name, details.get("severity", "warning"), message))


class FanOut:
    """Writes a run's lines and alerts wherever they are wanted. What else happens to the run goes to ``events``."""

    def __init__(self, file: MetricsFile, watch: Watch | None, events: EventLog, couriers: Sequence[Courier]) -> None:
        self.file, self.watch, self.events, self.couriers = file, watch, events, couriers

    def write(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """Write one line, and say what the rules see in it."""
        self.file.write(step, tokens, metrics)
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        for courier in self.couriers:
            courier.write(step, tokens, finite)
        for alert in self.watch.look(step, tokens, metrics) if self.watch else ():
            logger.log(LEVELS[alert.severity], f"step {alert.step}: {alert.message}")
            self.events.write(alert.step, "alert", alert.name, alert.message, severity=alert.severity)

    def unresolved(self) -> list[Alert]:
        """What still holds at the end of the run; what is wrong with the end alone is told now."""
        if self.watch is None:
            return []
        held = self.watch.unresolved()
        for alert in held:
            if alert.name not in self.watch.said:
                self.events.write(alert.step, "alert", alert.name, alert.message, severity=alert.severity)
        return held

    def rewind(self, step: int) -> None:
        """Drop the lines after ``step`` and what the rules saw in them: a run that has gone back makes those steps again."""
        self.file.rewind(step)
        if self.watch is not None:
            self.watch = replayed(self.watch.history.facts, self.file.path)

    def __enter__(self) -> FanOut:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.file.close()
        deadline = time.monotonic() + (0.0 if kind is KeyboardInterrupt else CLOSE_SECONDS)  # who asks twice is not kept waiting
        for courier in self.couriers:
            courier.end()
        for courier in self.couriers:
            courier.close(max(0.0, deadline - time.monotonic()))


def check_sinks(config: MonitorConfig) -> None:
    """Raise UserError when a tracker's package or the webhook's program is not there, before anything is trained."""
    for field, name in TRACKERS.items():
        if getattr(config, field) and find_spec(field) is None:
            raise UserError(
                f"monitor.{field} needs the package of {name}: pip install -e '.[{field}]' in Osler's source tree, or leave "
                f"monitor.{field} out."
            )
    if config.webhook is not None:
        parse_command(config.webhook)


def open_sinks(config: MonitorConfig, run: RunFolder, facts: Facts, *, step: int, is_first: bool = True) -> FanOut:
    """The sinks of a run that goes on from ``step`` (0: begins); only the first rank's lead anywhere."""
    if not is_first:
        return FanOut(MetricsFile(os.devnull), None, EventLog(os.devnull), [])
    file = MetricsFile(run.metrics, last_step=step if step else -1)
    couriers = [Courier(name, open_sink) for name, open_sink in _places(config, run, step)]
    watch = replayed(facts, run.metrics)
    watch.history.forget_speed()
    return FanOut(file, watch, SpreadingLog(run.events, couriers), couriers)


def _places(config: MonitorConfig, run: RunFolder, step: int) -> Iterator[tuple[str, Callable[[], Sink]]]:
    """Each place outside the run that the config asks for: its name in messages, and what opens it."""
    if config.webhook is not None:
        yield "the webhook", partial(Webhook, config.webhook, str(run.root))
    if config.tensorboard:
        yield TRACKERS["tensorboard"], partial(TensorBoardSink, run.trackers, step + 1 if step else 0)
    described = load_yaml(run.config.read_text(encoding="utf-8"), str(run.config)) if run.config.exists() else {}
    described.pop("monitor", None)  # a webhook may hold a secret
    whose = (str(run.trackers), run.root.resolve().name, described)
    if config.wandb is not None:
        target = "osler.monitor.sink_wandb:WandbSink"
        yield TRACKERS["wandb"], partial(Outpost, target, run.trackers / "wandb.log", config.wandb, *whose)
    if config.clearml is not None:
        target = "osler.monitor.sink_clearml:ClearmlSink"
        yield TRACKERS["clearml"], partial(Outpost, target, run.trackers / "clearml.log", config.clearml, *whose)
