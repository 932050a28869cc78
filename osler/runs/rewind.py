"""Going back in a run to an earlier checkpoint (``--from-step``).

What the run has made since is set aside, so that the checkpoint is the newest again. The run then is, bit for bit, one that was
stopped there, and what follows is an ordinary resume.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from osler.checkpoint.folders import (
    BEST,
    Entry,
    best_checkpoint,
    by_age,
    folder_name,
    is_better,
    looks_whole,
    mark_best,
    verify,
)
from osler.records import jsonl
from osler.records.jsonl import EventLog, MetricsLine, read_events
from osler.runs.folder import newest_checkpoint
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder, fsync_dir, write_atomic

logger = logging.getLogger(__name__)

ASIDE = "set-aside"  # in the run folder: what runs that went back had made
REWIND = "rewind"  # the event


def find_step(root: Path, step: int) -> Entry:
    """Return the good checkpoint of a step. Raises UserError, which lists the steps there are, when it is missing or damaged."""
    problems: list[str] = []
    others: set[int] = set()
    what = f"There is no checkpoint of step {step} in {root}"
    for entry in by_age(root):
        if entry.step != step:
            others |= {entry.step} if looks_whole(entry.path) else set()
        elif here := verify(entry.path):
            problems += here
            what = f"The checkpoint of step {step} in {root} is damaged ({'; '.join(problems)})"
        else:
            return entry
    there = f"there are steps {', '.join(map(str, sorted(others)))}" if others else "there is no other"
    raise UserError(f"{what}; {there}.")


def planned_start(folder: RunFolder, step: int | None) -> tuple[Path | None, dict[str, str]]:
    """Return the checkpoint of this run that a start would go on from, and in words what it would set aside."""
    if step is None:
        return newest_checkpoint(folder), {}
    target = find_step(folder.checkpoints, step)
    later = ", ".join(str(entry.step) for entry in reversed(later_than(folder, target)))
    return target.path, {"sets aside": f"the checkpoints of steps {later}"} if later else {}


def later_than(folder: RunFolder, target: Entry) -> list[Entry]:
    """Return the checkpoints that the run saved after ``target`` or that have later steps, newest first."""
    entries = [entry for entry in by_age(folder.checkpoints) if entry.path != target.path]
    return [entry for entry in entries if entry.step > target.step or entry.sequence > target.sequence]


def go_back(folder: RunFolder, step: int) -> None:
    """Make a run what it was at the checkpoint of ``step``, and move later checkpoints, metrics and events to another folder.

    The newest checkpoint moves first, so a kill half way leaves a run that was stopped at one of them.
    """
    rewinds = [event.step for event in read_events(folder.events) if event.kind == REWIND]
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) and rewinds[-1:] == [step]:
        return  # torchrun starts the same command again after a failure: once is enough
    later = later_than(folder, find_step(folder.checkpoints, step))
    lines = {path: jsonl.split(path, step) for path in (folder.metrics, folder.events)}
    message = f"Back at step {step:,}, and nothing came after it."
    if later or any(gone for _, gone in lines.values()):
        aside = _set_aside(folder, step, later, lines)
        steps = ", ".join(str(entry.step) for entry in reversed(later)) or "none"
        metrics, events = (len(gone) for _, gone in lines.values())
        message = (
            f"Back at step {step:,}. What came after it is in {ASIDE}/{aside.name}: the checkpoints of steps {steps}, "
            f"{metrics:,} lines of metrics and {events:,} events."
        )
    EventLog(folder.events).write(step, REWIND, REWIND, message)
    logger.info(f"{folder.root}: {message}")


def _set_aside(
    folder: RunFolder, step: int, later: Sequence[Entry], lines: dict[Path, tuple[list[bytes], list[bytes]]]
) -> Path:
    """Move checkpoints, and of each file the second part of its lines, to a new folder in the run's, and return that."""
    best = best_checkpoint(folder.checkpoints)
    if best is not None and best.path in {entry.path for entry in later}:
        _mark_earlier_best(folder, best.metric, lines[folder.metrics][0], later)
    names = (f"after-step-{step}{'' if number == 1 else f'-{number}'}" for number in count(1))
    aside = next(path for name in names if not (path := folder.root / ASIDE / name).exists())
    checkpoints = RunFolder(aside).checkpoints
    checkpoints.mkdir(parents=True)
    for path, (_, gone) in lines.items():
        if gone:
            write_atomic(aside / path.name, gone)
    for entry in later:
        entry.path.rename(checkpoints / entry.path.name)
    fsync_dir(checkpoints)
    fsync_dir(folder.checkpoints)
    for path, (kept, gone) in lines.items():
        if gone:
            write_atomic(path, kept)
    return aside


def _mark_earlier_best(folder: RunFolder, metric: str, lines: Sequence[bytes], later: Sequence[Entry]) -> None:
    """Mark the best of the checkpoints that stay by the metrics that stay; without metrics none is the best."""
    leaving = {entry.path for entry in later}
    best: tuple[Path, float] | None = None
    for line in filter(None, map(MetricsLine.parse, lines)):
        score, saved = line.values.get(metric, math.nan), folder.checkpoints / folder_name(max(0, line.step))
        is_left = math.isfinite(score) and saved.is_dir() and saved not in leaving
        if is_left and (best is None or is_better(metric, score, best[1])):
            best = saved, score
    (folder.checkpoints / BEST).unlink()
    if best:
        mark_best(best[0], metric, best[1])
