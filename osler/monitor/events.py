"""The diary of a run, ``events.jsonl``: what happened to it that a curve does not say.

One JSON object per line: ``step``, ``time`` (unix seconds), ``kind`` (alert, incident, rollback, start, end ...), ``name``,
``message`` for a person, and details. Only ever appended to: a step that was made twice, after a kill or a rollback, may stand
here twice. A disk that refuses a line costs that line and not the run.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from osler.checkpoint.manifest import FOLDER_NAME
from osler.runtime.files import RunFolder

logger = logging.getLogger(__name__)


class EventLog:
    """Appends events to a file, whole lines at once."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._warned = False

    def write(self, step: int, kind: str, name: str, message: str, *, tell: bool = True, **details: Any) -> None:
        """Append one event; ``details`` must be JSON without NaN. A torn last line of a killed process is ended first.

        ``tell``: whether it is worth a word outside the run, by a log that has somebody to tell.
        """
        line = {"step": step, "time": round(time.time(), 3), "kind": kind, "name": name, "message": message, **details}
        text = json.dumps(line, allow_nan=False) + "\n"
        try:
            with self.path.open("ab+") as file:
                if file.tell() and file.seek(-1, 2) and file.read(1) != b"\n":
                    text = "\n" + text
                file.write(text.encode("utf-8"))
        except OSError as error:
            if not self._warned:
                self._warned = True
                logger.warning(f"{self.path} cannot be written ({error.strerror}); what happens to this run is told here alone.")


def write_damage(events: EventLog, checkpoint: Path, problems: Sequence[str]) -> None:
    """Append that a checkpoint is not as it was saved any more."""
    match = FOLDER_NAME.fullmatch(checkpoint.name)
    message = f"{checkpoint.name} is damaged ({'; '.join(problems)}): it does not count among the checkpoints that are kept."
    events.write(int(match[1]) if match else 0, "incident", "damaged-checkpoint", message)


def record_damage(checkpoint: Path, problems: Sequence[str]) -> None:
    """``write_damage`` in the diary of the run that a checkpoint lies in, if it lies in one."""
    root = checkpoint.absolute().parent
    run = RunFolder(root.parent)
    if root == run.checkpoints and run.config.is_file():
        write_damage(EventLog(run.events), checkpoint, problems)


def read_events(path: str | Path) -> list[dict[str, Any]]:
    """All whole events of a diary, oldest first; none when there is no file."""
    path = Path(path)
    if not path.exists():
        return []
    events = []
    for line in path.read_bytes().split(b"\n"):
        try:
            event = json.loads(line)
        except ValueError:  # torn by a kill
            continue
        if isinstance(event, dict) and {"step", "kind", "message"} <= event.keys():
            events.append(event)
    return events
