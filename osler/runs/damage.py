"""Checkpoints that are not as they were saved any more, as events of their run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from osler.checkpoint.manifest import FOLDER_NAME
from osler.records.events import EventLog
from osler.runtime.files import RunFolder


def write_damage(events: EventLog, checkpoint: Path, problems: Sequence[str]) -> None:
    """Append that a checkpoint is damaged."""
    match = FOLDER_NAME.fullmatch(checkpoint.name)
    message = f"{checkpoint.name} is damaged ({'; '.join(problems)}): it does not count among the checkpoints that are kept."
    events.write(int(match[1]) if match else 0, "incident", "damaged-checkpoint", message)


def record_damage(checkpoint: Path, problems: Sequence[str]) -> None:
    """Append that a checkpoint is damaged to the events of the run that it lies in, if it lies in one."""
    root = checkpoint.absolute().parent
    run = RunFolder(root.parent)
    if root == run.checkpoints and run.config.is_file():
        write_damage(EventLog(run.events), checkpoint, problems)
