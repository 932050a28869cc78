"""Going back in a run to an earlier checkpoint (``--from-step``).

What the run has made since is set aside, so that the checkpoint is the newest again. The run then is, bit for bit, one that was
stopped there, and what follows is an ordinary resume.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path

from osler.checkpoint.folders import BEST, Entry, best_checkpoint, by_age, folder_name, looks_whole, mark_best, verify
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
    entries = by_age(root)
    found = [entry for entry in entries if entry.step == step]
    problems: list[str] = []
    for entry in found:
        here = verify(entry.path)
        if not here:
            return entry
        problems += here
    others = sorted({entry.step for entry in entries if entry.step != step and looks_whole(entry.path)})
    there = f"there are steps {', '.join(map(str, others))}" if others else "there is no other"
    what = f"The checkpoint of step {step} in {root} is damaged ({'; '.join(problems)})"
    raise UserError(f"{what if found else f'There is no checkpoint of step {step} in {root}'}; {there}.")


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
    # torchrun starts the same command again after a failure: once is enough.
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) and last_rewind(folder) == step:
        return
    target = find_step(folder.checkpoints, step)
    later = later_than(folder, target)
    (metrics, later_metrics), (events, later_events) = (jsonl.split(path, step) for path in (folder.metrics, folder.events))
    if not later and not later_metrics and not later_events:
        message = f"Back at step {step:,}, and nothing came after it."
        EventLog(folder.events).write(step, REWIND, REWIND, message)
        logger.info(f"{folder.root}: {message}")
        return
    best = best_checkpoint(folder.checkpoints)
    if best is not None and best.path in {entry.path for entry in later}:
        _mark_earlier_best(folder, best.metric, metrics, later)
    aside = _unused(folder.root / ASIDE / f"after-step-{step}")
    checkpoints = RunFolder(aside).checkpoints
    checkpoints.mkdir(parents=True)
    files = [(folder.metrics, metrics, later_metrics), (folder.events, events, later_events)]
    for path, _, gone in files:
        if gone:
            write_atomic(aside / path.name, gone)
    for entry in later:
        entry.path.rename(checkpoints / entry.path.name)
    fsync_dir(checkpoints)
    fsync_dir(folder.checkpoints)
    for path, kept, gone in files:
        if gone:
            write_atomic(path, kept)
    steps = ", ".join(str(entry.step) for entry in reversed(later)) or "none"
    message = (
        f"Back at step {step:,}. What came after it is in {aside.relative_to(folder.root)}: the checkpoints of steps {steps}, "
        f"{len(later_metrics):,} lines of metrics and {len(later_events):,} events."
    )
    EventLog(folder.events).write(step, REWIND, REWIND, message)
    logger.info(f"{folder.root}: {message}")


def last_rewind(folder: RunFolder) -> int | None:
    """Return the step that the run went back to last."""
    steps = [event.step for event in read_events(folder.events) if event.kind == REWIND]
    return steps[-1] if steps else None


def _unused(folder: Path) -> Path:
    """Return the folder, or the first of ``folder-2``, ``folder-3`` ... that does not exist yet."""
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


def _mark_earlier_best(folder: RunFolder, metric: str, lines: Sequence[bytes], later: Sequence[Entry]) -> None:
    """Mark the best of the checkpoints that stay by the metrics that stay; without metrics none is the best."""
    leaving = {entry.path for entry in later}
    scores: dict[Path, float] = {}
    for line in filter(None, map(MetricsLine.parse, lines)):
        score, saved = line.values.get(metric, math.nan), folder.checkpoints / folder_name(max(0, line.step))
        if math.isfinite(score) and saved.is_dir() and saved not in leaving:
            scores[saved] = score
    (folder.checkpoints / BEST).unlink()
    if scores:
        sign = 1 if metric.endswith("loss") else -1
        path = min(scores, key=lambda path: sign * scores[path])
        mark_best(path, metric, scores[path])
