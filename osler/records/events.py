"""``events.jsonl``: what happened to a run that no curve shows, one JSON object per line.

    {"step": 120, "time": 1767225600.123, "kind": "alert", "name": "stalled-loss", "message": "...", "severity": "warning"}

``kind`` is alert, incident, rollback, start, end and so on; what follows the message are details. The file is only ever appended
to: a step that was made twice, after a kill or a rollback, may stand in it twice. A disk that refuses a line costs that line and
not the run.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from osler.records import jsonl
from osler.records.values import as_number, as_text

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """One event: its step, its time in unix seconds (NaN when it is not known), what it is, and words for a person."""

    step: int
    time: float
    kind: str
    name: str
    message: str
    details: dict[str, Any] = field(default_factory=dict)


class EventLog:
    """Appends events to a file, whole lines at once."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._warned = False

    def write(self, step: int, kind: str, name: str, message: str, *, tell: bool = True, **details: Any) -> None:
        """Append one event; ``details`` must be JSON without NaN.

        ``tell``: whether it is worth a word outside the run, by a log that has somebody to tell.
        """
        event = {"step": step, "time": round(time.time(), 3), "kind": kind, "name": name, "message": message, **details}
        try:
            jsonl.append(self.path, event)
        except OSError as error:
            if not self._warned:
                self._warned = True
                logger.warning(f"{self.path} cannot be written ({error.strerror}); what happens to this run is only said here.")


def read_events(path: str | Path) -> list[Event]:
    """Return the events of a file, oldest first; lines that are torn, or lack step, kind or message, are left out."""
    return [event for fields in jsonl.read(Path(path))[0] if (event := _event(fields)) is not None]


def _event(fields: dict[str, Any]) -> Event | None:
    step = jsonl.step_of(fields)
    if step is None or not {"kind", "message"} <= fields.keys():
        return None
    kind, name, message = (as_text(fields.get(key)) for key in ("kind", "name", "message"))
    details = {key: value for key, value in fields.items() if key not in Event.__dataclass_fields__}
    return Event(step, as_number(fields.get("time")), kind, name, message, details)
