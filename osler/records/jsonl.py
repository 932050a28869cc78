"""Files of JSON lines, and the two such files that a run appends to while it trains.

    metrics.jsonl: {"step": 30, "tokens": 122880, "time": 1767225600.123, "train/loss": 3.25, "train/grad_norm": null}
    events.jsonl:  {"step": 30, "time": 1767225600.123, "kind": "alert", "name": "stalled-loss", "message": "..."}

Times are in unix seconds, and null stands for a number that was not finite. ``kind`` is alert, incident, rollback, start, end and
so on. Details follow the message.

A kill can tear the last line only. A reader skips lines that are not JSON objects, and a writer ends a torn line before it
appends. If the disk refuses a line, that line is lost and the run continues. Resume is exact: metrics are cut to the step of
the checkpoint, so each step occurs once. Only ``--from-step`` cuts events, so those of a step that was repeated after a kill or
a rollback may occur twice.
"""

from __future__ import annotations

import json
import logging
import math
import time as clock
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from osler.records.values import NAN, as_number, as_text
from osler.runtime.errors import UserError
from osler.runtime.files import plain

logger = logging.getLogger(__name__)

OWN_FIELDS = frozenset(("step", "tokens", "time"))  # every line of metrics has these
START, END = LIFETIME = ("start", "end")  # kinds of event: a process of a run has begun, and has ended
EARLY_STOP = "early-stop"  # kind and name of the event when a run ends because it got no better
OUT_OF_MEMORY = "out-of-memory"  # name of the incident when a run makes its micro-batch smaller
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"  # names of the event when a process ends


# -- any file of JSON lines --------------------------------------------------------------------------------------------


def parse(line: bytes) -> dict[str, Any] | None:
    """Return the object on a line, None when there is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def step_of(fields: Mapping[str, Any] | None) -> int | None:
    """Return the step that an object names, None when it names none that can be one."""
    step = fields.get("step") if fields else None
    return step if type(step) is int and abs(step) < 2**53 else None


def read_lines(path: Path) -> Iterator[bytes]:
    """Return the lines of a file one by one, with their newlines; none when there is no file.

    A line ends at the newline byte alone, as in JSON. Raises UserError when the file is there and cannot be read.
    """
    try:
        with path.open("rb") as file:
            yield from file
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error


def read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the objects of a file, and how many lines before the last hold none; raises UserError as ``read_lines`` does."""
    found = [parse(line) for line in read_lines(path) if line.strip()]
    return [fields for fields in found if fields is not None], found[:-1].count(None)


def to_line(fields: Mapping[str, Any]) -> str:
    """Return an object as a line, with null for a number that is not finite."""
    return json.dumps(plain(fields), ensure_ascii=False, allow_nan=False) + "\n"


def append(path: Path, fields: Mapping[str, Any]) -> None:
    """Append an object as one whole line, after ending a torn one; raises OSError when the disk refuses it."""
    text = to_line(fields)
    with path.open("ab+") as file:
        if file.tell() and file.seek(-1, 2) and file.read(1) != b"\n":
            text = "\n" + text
        file.write(text.encode("utf-8", "backslashreplace"))  # a name that is not UTF-8 is written escaped, as JSON would


def split(path: Path, last_step: int) -> tuple[list[bytes], list[bytes]]:
    """Return the lines of a file up to a step, and the lines of later steps. A torn line is among the former."""
    kept: list[bytes] = []
    later: list[bytes] = []
    for line in read_lines(path):
        step = step_of(parse(line))
        (kept if step is None or step <= last_step else later).append(line)
    return kept, later


@cache
def _warn(path: Path, reason: str) -> None:
    """Warn that a file cannot be written, once for each reason."""
    logger.warning(f"{path} cannot be written ({reason}); the run goes on without these lines until it can.")


# -- metrics.jsonl -----------------------------------------------------------------------------------------------------


@dataclass
class MetricsLine:
    """One line: the step, the tokens seen, the time in unix seconds, and the metrics by name; NaN for a number not finite."""

    step: int
    tokens: float
    time: float
    values: dict[str, float]

    @classmethod
    def parse(cls, line: bytes) -> MetricsLine | None:
        """Return a line of the file, None when it is torn or names no step; fields that are no numbers are left out."""
        fields = parse(line)
        step = step_of(fields)
        if fields is None or step is None:
            return None
        numbers = {name: as_number(raw) for name, raw in fields.items() if raw is None or isinstance(raw, (int, float))}
        tokens, time = (numbers.pop(name, NAN) for name in ("tokens", "time"))
        del numbers["step"]
        return cls(step, tokens, time, numbers)


def read_metrics(path: Path, having: str = "") -> Iterator[MetricsLine]:
    """Return the whole lines of a file one by one; none when there is no file.

    With ``having`` only lines with that metric are parsed and returned. Raises UserError when the file cannot be read.
    """
    wanted = f'"{having}"'.encode() if having else b""
    parsed = (MetricsLine.parse(line) for line in read_lines(path) if wanted in line)
    return (line for line in parsed if line is not None and (not having or having in line.values))


class MetricsFile:
    """Appends to ``metrics.jsonl``; after a kill it continues at the step of the checkpoint."""

    def __init__(self, path: str | Path, *, last_step: float = math.inf) -> None:
        """Cut the file after the lines of steps up to ``last_step``, the checkpoint's step; -1 leaves no line."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rewind(last_step)

    def rewind(self, last_step: float) -> None:
        """Drop all lines after the last one of a step up to ``last_step``: a run that has gone back makes those steps again."""
        end = size = 0
        for line in read_lines(self.path):
            size += len(line)
            step = step_of(parse(line))
            if step is not None and step <= last_step:
                end = size
        try:
            with self.path.open("ab") as file:  # creates the file before its first line
                if end < size:
                    file.truncate(end)
        except OSError as error:
            _warn(self.path, str(error))

    def write(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """Append one line; raises ValueError when a metric has the name of one of the line's own fields."""
        if taken := OWN_FIELDS & metrics.keys():
            raise ValueError(f"a metric cannot be called {min(taken)!r}: the line itself has a field of that name")
        numbers = {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
        try:
            append(self.path, {"step": int(step), "tokens": int(tokens), "time": round(clock.time(), 3), **numbers})
        except OSError as error:
            _warn(self.path, str(error))


# -- events.jsonl ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """One event: its step, its time in unix seconds (NaN when it is not known), its kind and name, and a message."""

    step: int
    time: float
    kind: str
    name: str
    message: str
    details: dict[str, Any] = field(default_factory=dict)


class EventLog:
    """Appends events; ``tell`` gets step, name, severity and message of events that people should be told about."""

    def __init__(self, path: str | Path, tell: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.path, self._tell = Path(path), tell

    def write(self, step: int, kind: str, name: str, message: str, *, tell: bool = True, **details: Any) -> None:
        """Append one event, and announce it unless ``tell`` is False; it is a warning unless ``details`` has a ``severity``."""
        event = {"step": step, "time": round(clock.time(), 3), "kind": kind, "name": name, "message": message, **details}
        try:
            append(self.path, event)
        except OSError as error:
            _warn(self.path, str(error))
        if tell and self._tell:
            severity = details.get("severity", "warning")
            self._tell({"step": step, "name": name, "severity": severity, "message": message})


def read_events(path: str | Path) -> list[Event]:
    """Return the events of a file, oldest first; lines that are torn, or lack step, kind or message, are left out."""
    events = []
    for fields in read(Path(path))[0]:
        step = step_of(fields)
        if step is not None and {"kind", "message"} <= fields.keys():
            kind, name, message = (as_text(fields.get(key)) for key in ("kind", "name", "message"))
            details = {key: value for key, value in fields.items() if key not in Event.__dataclass_fields__}
            events.append(Event(step, as_number(fields.get("time")), kind, name, message, details))
    return events


def recorded_limits(events: Sequence[Event], configured: int | None) -> list[tuple[tuple[int, int], int]]:
    """Return the limits of a pass that a run found with this configured one: step and update from which, and its tokens."""
    found = [event for event in events if event.name == OUT_OF_MEMORY and event.details.get("configured") == configured]
    return [
        ((event.step, event.details.get("update", 1)), event.details["micro_batch_tokens"])  # older events name no update
        for event in found
    ]


def newest_lifetime_event(events: Sequence[Event]) -> Event | None:
    """Return the newest start or end of a process of the run."""
    return next((event for event in reversed(events) if event.kind in LIFETIME), None)
