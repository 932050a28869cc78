"""Where a start goes on from when that is not the newest checkpoint of its run: a step of its own, or a checkpoint of another.

Both only choose a checkpoint; what follows is an ordinary resume, with optimizer and place in the data. Going back
(``--from-step``) sets aside what the run has made since, so that the checkpoint is its newest again and the run is, bit for bit,
one that was stopped there. A branch (``--branch``) is a new run whose config names the checkpoint as ``branch_from``; it needs
that checkpoint until it has one of its own.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from osler.checkpoint import store
from osler.checkpoint.manifest import FOLDER_NAME, STATE, looks_whole, verify
from osler.checkpoint.root import BEST, Entry, best_checkpoint, by_age, mark_best, refuse_checkpoint, root_of
from osler.decode import decode
from osler.errors import UserError
from osler.recipe import merge, parse_overrides
from osler.records import jsonl
from osler.records.events import EventLog, read_events
from osler.records.metrics import MetricsLine
from osler.runtime.files import RunFolder, fsync_dir, read_json, write_atomic
from osler.runtime.world import World
from osler.train.folder import differences, flat, named, newest_checkpoint, read_config, refuse_another, stored_config
from osler.yaml12 import load_yaml

logger = logging.getLogger(__name__)

T = TypeVar("T")
ASIDE = "set-aside"  # in the run folder: what runs that went back had made
CONFIG = "config.yaml"  # in a checkpoint
REWIND = "rewind"  # the event


def config_of_run(
    cls: type[T],
    kind: str,
    recipe: str | None,
    overrides: Sequence[str],
    run_dir: str | None,
    *,
    resume: bool,
    from_step: int | None,
    branch: str | None,
) -> T | None:
    """The config that a start takes from a run that is there; None when it is given its own, by a recipe or field by field."""
    if branch is not None:
        if recipe is not None or resume:
            raise UserError(
                f"--branch takes the configuration of the run that it branches from: leave out {recipe or '--resume'}. Fields "
                "are changed with key.path=value; to go on with a branch that has begun give --run and --resume alone."
            )
        return branch_config(cls, kind, branch, from_step, overrides, run_dir)
    if from_step is not None and run_dir is None:
        raise UserError("--from-step needs --run FOLDER: the run to go back in.")
    if resume or (from_step is not None and recipe is None):
        return stored_config(cls, run_dir, overrides)
    return None


def find_step(root: Path, step: int) -> Entry:
    """The good checkpoint of a step; raises UserError that lists the steps there are when it is not there or is damaged."""
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


# -- going back in a run -----------------------------------------------------------------------------------------------


def planned_start(run: RunFolder, step: int | None) -> tuple[Path | None, dict[str, str]]:
    """The checkpoint of its own that a start would go on from, and in words what it would set aside."""
    if step is None:
        return newest_checkpoint(run), {}
    target = find_step(run.checkpoints, step)
    later = ", ".join(str(entry.step) for entry in reversed(later_than(run, target)))
    return target.path, {"sets aside": f"the checkpoints of steps {later}"} if later else {}


def later_than(run: RunFolder, target: Entry) -> list[Entry]:
    """The checkpoints that the run saved after ``target``, or of later steps, the one saved last first."""
    entries = [entry for entry in by_age(run.checkpoints) if entry.path != target.path]
    return [entry for entry in entries if entry.step > target.step or entry.sequence > target.sequence]


def taken_back(run: RunFolder, config: Any, step: int | None, world: World) -> RunFolder:
    """The run's folder, after rank 0 has gone back in it to ``step``, when one is given."""
    if step is not None:
        refuse_another(run, config)
        world.broadcast_from_first(partial(go_back, run, step))
    return run


def go_back(run: RunFolder, step: int) -> None:
    """Make a run what it was at the checkpoint of ``step``; later checkpoints, metrics and events move to a folder that is named.

    The checkpoint saved last moves first, so that a kill half way leaves a run that was stopped at one of them.
    """
    # torchrun starts the same command again after a failure: once is enough.
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) and last_rewind(run) == step:
        return
    target = find_step(run.checkpoints, step)
    later = later_than(run, target)
    (metrics, later_metrics), (events, later_events) = (jsonl.split(path, step) for path in (run.metrics, run.events))
    if not later and not later_metrics and not later_events:
        message = f"Back at step {step:,}, and nothing came after it."
        EventLog(run.events).write(step, REWIND, REWIND, message)
        logger.info(f"{run.root}: {message}")
        return
    best = best_checkpoint(run.checkpoints)
    if best is not None and best.path in {entry.path for entry in later}:
        _mark_earlier_best(run, best.metric, metrics, later)
    aside = _unused(run.root / ASIDE / f"after-step-{step}")
    checkpoints = RunFolder(aside).checkpoints
    checkpoints.mkdir(parents=True)
    files = [(run.metrics, metrics, later_metrics), (run.events, events, later_events)]
    for path, _, gone in files:
        if gone:
            write_atomic(aside / path.name, gone)
    for entry in later:
        entry.path.rename(checkpoints / entry.path.name)
    fsync_dir(checkpoints)
    fsync_dir(run.checkpoints)
    for path, kept, gone in files:
        if gone:
            write_atomic(path, kept)
    steps = ", ".join(str(entry.step) for entry in reversed(later)) or "none"
    message = (
        f"Back at step {step:,}. What came after it is in {aside.relative_to(run.root)}: the checkpoints of steps {steps}, "
        f"{len(later_metrics):,} lines of metrics and {len(later_events):,} events."
    )
    EventLog(run.events).write(step, REWIND, REWIND, message)
    logger.info(f"{run.root}: {message}")


def last_rewind(run: RunFolder) -> int | None:
    """The step that the run went back to last."""
    steps = [event.step for event in read_events(run.events) if event.kind == REWIND]
    return steps[-1] if steps else None


def _unused(folder: Path) -> Path:
    """The folder, or where there is one already the first that is free of ``folder-2``, ``folder-3`` ..."""
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


def _mark_earlier_best(run: RunFolder, metric: str, lines: Sequence[bytes], later: Sequence[Entry]) -> None:
    """Mark the best of the checkpoints that stay, by the metrics that stay; without one no checkpoint is the best."""
    leaving = {entry.path for entry in later}
    scores: dict[Path, float] = {}
    for line in filter(None, map(MetricsLine.parse, lines)):
        score, saved = line.values.get(metric, math.nan), run.checkpoints / store.folder_name(max(0, line.step))
        if math.isfinite(score) and saved.is_dir() and saved not in leaving:
            scores[saved] = score
    (run.checkpoints / BEST).unlink()
    if scores:
        sign = 1 if metric.endswith("loss") else -1
        path = min(scores, key=lambda path: sign * scores[path])
        mark_best(path, metric, scores[path])


# -- a branch ----------------------------------------------------------------------------------------------------------


def branch_config(cls: type[T], kind: str, branch: str, step: int | None, overrides: Sequence[str], run_dir: str | None) -> T:
    """The config of a new run that goes on from a checkpoint of another: the config of that one, with what is given changed.

    ``branch`` is a checkpoint, or a run folder with ``step`` or its newest. The same command goes on with the new run, even when
    the checkpoint that it began with is gone.
    """
    if run_dir is None:
        raise UserError("--branch needs --run NEW_FOLDER: the new run.")
    refuse_checkpoint(run_dir)
    run = RunFolder(Path(run_dir))
    stored = read_config(run) if run.config.exists() else {}
    if not _is_begun(stored.get("branch_from"), Path(branch), step):
        checkpoint = _checkpoint_of(branch, step)
        _check_kind(checkpoint, kind)
        stored = _config_in(checkpoint, store.load(checkpoint, names=[]).files) | {"branch_from": str(checkpoint)}
    return decode(cls, merge(stored, parse_overrides(overrides, stored)), source=str(branch))


def _is_begun(branch_from: str | None, branch: Path, step: int | None) -> bool:
    """Whether a run that began at ``branch_from`` is what ``--branch`` asks for: that checkpoint, or one of that run."""
    if branch_from is None:
        return False
    there = Path(branch_from)
    return branch == there or (branch in there.parents and (step is None or there.name == store.folder_name(step)))


def _checkpoint_of(branch: str, step: int | None) -> Path:
    path = Path(branch)
    match = FOLDER_NAME.fullmatch(path.name)
    if match and not path.is_dir() and path.parent.is_dir():
        find_step(path.parent, int(match[1]))  # says which there are
    if match and step not in (None, int(match[1])):
        raise UserError(f"{path} is step {int(match[1])}, and --from-step says {step}: leave one of them out.")
    if step is None or match:
        path = store.resolve(path)
    else:
        path = find_step(root_of(path), step).path
    if problems := verify(path):
        raise UserError(f"Checkpoint {path} is damaged, branch from another: {'; '.join(problems)}.")
    return path


def _config_in(checkpoint: Path, files: Mapping[str, bytes]) -> dict[str, Any]:
    stored = load_yaml(files[CONFIG].decode("utf-8"), str(checkpoint / CONFIG)) if CONFIG in files else None
    if not isinstance(stored, dict):
        raise UserError(f"Checkpoint {checkpoint} lacks {CONFIG}, so it does not say what it is a run of.")
    return stored


def _check_kind(checkpoint: Path, kind: str) -> None:
    there = read_json(checkpoint / STATE).get("kind")
    if there != kind:
        raise UserError(f"{checkpoint} is of a run of `osler {there}`: branch it with `osler {there} --branch`.")


def branch_point(config: Any) -> Path | None:
    """The checkpoint that a run which has none of its own branches from; None for one that begins at step 0.

    Raises UserError when it is of another kind of run, or holds the state of another optimizer.
    """
    if config.branch_from is None:
        return None
    path = store.resolve(config.branch_from)
    _check_kind(path, config.kind)
    there = flat(_config_in(path, store.load(path, names=[]).files))
    for field, here in (("optim.type", config.optim.type), ("precision", config.precision)):
        if here != there.get(field, here) and (field == "optim.type" or "pure-bf16" in (here, there[field])):
            raise UserError(
                f"{field} is {here} here and {there[field]} in {path}, whose optimizer holds another state: leave it as it is "
                f"there, or start a new run with the weights alone, init_from={path}."
            )
    return path


def same_data(config: Any, loaded: store.Loaded) -> bool:
    """Whether a config has the data of the run that a checkpoint is of."""
    stored = _config_in(loaded.path, loaded.files)
    return not any(key.startswith("data.") for key in differences(config, stored, str(loaded.path / CONFIG)))


def describe_branch(config: Any, loaded: store.Loaded) -> str:
    """One line about a run that begins as a branch: where, and how its config differs from that of the run it comes from."""
    stored = _config_in(loaded.path, loaded.files)
    changed = differences(config, stored, str(loaded.path / CONFIG), leave_out=("branch_from", "description"))
    what = f"What differs from its run: {named(changed)}." if changed else "Nothing differs from its run."
    return f"A branch of {loaded.path}, from step {loaded.step:,}. {what}"


def announce_branch(config: Any, loaded: store.Loaded, events: EventLog) -> None:
    """Say and record that a run begins as a branch."""
    message = describe_branch(config, loaded)
    logger.info(message)
    events.write(loaded.step, "branch", "branch", message)
