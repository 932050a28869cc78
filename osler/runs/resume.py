"""Resume: ``find_start`` finds the checkpoint that a process continues from, ``resume`` restores a trainer and its loop from it.

A process continues from the newest good checkpoint of the run, from an earlier one (going back), from one of another run (a
branch), or from none (the run begins at step 0). The place in the data follows from the step (``data/order.py``).

Going back (``--from-step``) sets aside everything that the run wrote after a checkpoint. This checkpoint is then the newest, and
the run is, bit for bit, as if it had been stopped there.

A branch (``--branch``) is a new run that continues from a checkpoint of another, with its optimizer and its place in the data.
``branch_from`` in its config names that checkpoint, which is needed until the new run has saved one. The rest is as in a resume.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from osler.checkpoint import folders, store
from osler.checkpoint.folders import Entry, newest_checkpoint
from osler.config.recipe import load_yaml, override
from osler.config.schema import decode
from osler.inference.load import MADE_BY
from osler.monitor.logger import check_trackers
from osler.optim.schedule import ScheduleConfig, warmup_of
from osler.records.jsonl import EventLog, read_events, split
from osler.runs.folder import differences, first_of, flat, read_config, refuse_another, write_damage
from osler.runs.loop import Loop, Trainer
from osler.runs.process import Run
from osler.runtime.device import keep_freed_memory
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder, fsync_dir, write_atomic

logger = logging.getLogger(__name__)

T = TypeVar("T")
CONFIG = "config.yaml"  # the file with the config, in a checkpoint
ASIDE = "set-aside"  # a folder of the run: checkpoints and lines from after the step that it went back to
REWIND = "rewind"  # the event that records going back


class Start(NamedTuple):
    """The checkpoint that a process continues from (None: the run begins), and whether it belongs to another run."""

    checkpoint: Path | None
    is_branch: bool

    def load(self, names: Sequence[str] | None = None) -> store.Loaded | None:
        """Return the checkpoint with these groups of tensors (None: all)."""
        return None if self.checkpoint is None else store.load(self.checkpoint, names=names)


def find_start(
    config: Any, run: Run, check_branch: Callable[[Any, store.Loaded], None], back_to: int | None = None
) -> Start:
    """Check that the folder may hold this run, and return where it continues: at the checkpoint of step ``back_to`` if given.

    All ranks return the same. Raises UserError when the folder holds another run, and when ``check_branch`` refuses a new branch.
    Raises it also when the ranks found different checkpoints, because their machines do not share the disk of the folder.
    """
    refuse_another(run.folder, config)
    check_trackers(config.monitor)
    keep_freed_memory()
    root = run.folder.checkpoints
    newest = newest_checkpoint(root, partial(write_damage, run.events)) if back_to is None else find_step(root, back_to).path
    start = Start(newest or branch_point(config), is_branch=newest is None and config.branch_from is not None)
    loaded = start.load(names=[])
    step = -1 if loaded is None else loaded.step
    least, minus_most = run.world.all_reduce_min(step, -step)  # agree early, before ranks wait for different things
    if least != -minus_most:
        raise UserError(
            f"The processes found different checkpoints to go on from (steps {least} to {-minus_most}, -1 is none): the run "
            "folder must lie on a disk that all machines share."
        )
    if loaded is not None:
        refuse_weights_alone(loaded)
    if start.is_branch and loaded is not None:
        check_branch(config, loaded)
    return start


def resume(trainer: Trainer, start: Start, loaded: store.Loaded) -> Loop:
    """Restore a trainer from a checkpoint and return its loop. The beginning of a branch is logged and recorded."""
    loop = Loop(trainer)
    loop.restore(loaded, is_branch=start.is_branch)
    if start.is_branch:
        message = describe_branch(trainer.config, loaded)
        logger.info(message)
        trainer.run.events.write(loaded.step, "branch", "branch", message)
    root = trainer.run.folder.root
    place = f"step {trainer.step:,} ({trainer.tokens:,} tokens)"
    if not trainer.done or start.is_branch:
        logger.info(f"Continuing {root} from {place}.")
    else:
        length = "total_tokens" if trainer.unit == "tokens" else trainer.unit
        if loop.stopped_early:
            length = "early_stopping_patience"
        elif trainer.total < getattr(trainer.config, "total_tokens", 0):  # only the clock ends a run before its tokens
            length = "max_minutes"
        logger.info(
            f"{root} is finished, at {place}; there is nothing left to train. To train longer from here, begin a branch: `osler "
            f"{trainer.config.kind} --branch {root} --run NEW_FOLDER {length}=MORE`."
        )
    return loop


def warn_of_endless_warmup(schedule: ScheduleConfig, total_tokens: int, total: str = "total_tokens") -> None:
    """Warn when a run ends inside its warm-up and learns next to nothing, perhaps because it was shortened."""
    warmup_tokens = warmup_of(schedule, total_tokens)
    if warmup_tokens >= total_tokens:
        logger.warning(
            f"schedule.warmup_tokens {warmup_tokens:,} is not below {total} {total_tokens:,}, so the learning rate "
            "never reaches optim.lr; set schedule.warmup_tokens to a tenth of that or less."
        )


# -- going back in a run -----------------------------------------------------------------------------------------------------


def find_step(root: Path, step: int) -> Entry:
    """Return the good checkpoint of a step. Raises UserError with the steps that exist when it is missing or damaged."""
    entries = folders.by_age(root)
    what = f"There is no checkpoint of step {step} in {root}"
    for entry in entries:
        if entry.step == step:
            if not (problems := folders.verify(entry.path)):
                return entry
            what = f"The checkpoint of step {step} in {root} is damaged ({'; '.join(problems)})"
    others = sorted({entry.step for entry in entries if entry.step != step and folders.looks_whole(entry.path)})
    there = f"there are steps {', '.join(map(str, others))}" if others else "there is no other"
    raise UserError(f"{what}; {there}.")


def go_back(folder: RunFolder, step: int) -> None:
    """Take a run back to the checkpoint of ``step``, and move later checkpoints, metrics and events to another folder.

    The newest checkpoint moves first. So a kill half way leaves the run as if it had been stopped at one of the checkpoints.
    """
    rewinds = [event.step for event in read_events(folder.events) if event.kind == REWIND]
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) and rewinds[-1:] == [step]:
        return  # torchrun repeats the command after a failure, and the run has gone back already
    target = find_step(folder.checkpoints, step)
    others = [entry for entry in folders.by_age(folder.checkpoints) if entry.path != target.path]
    later = [entry for entry in others if entry.step > target.step or entry.sequence > target.sequence]
    lines = {path: split(path, step) for path in (folder.metrics, folder.events)}
    message = f"Back at step {step:,}, and nothing came after it."
    if later or any(gone for _, gone in lines.values()):
        aside = _set_aside(folder, step, later, lines)
        steps = ", ".join(str(entry.step) for entry in reversed(later))
        saved = f", with the checkpoints of steps {steps}" if later else ""
        message = f"Back at step {step:,}. What came after it is in {ASIDE}/{aside.name}{saved}."
    EventLog(folder.events).write(step, REWIND, REWIND, message)
    logger.info(f"{folder.root}: {message}")


def _set_aside(
    folder: RunFolder, step: int, later: Sequence[Entry], lines: Mapping[Path, tuple[list[bytes], list[bytes]]]
) -> Path:
    """Move checkpoints, and each file's second list of lines, to a new folder in the run folder; return the new folder."""
    best = folders.best_checkpoint(folder.checkpoints)
    if best is not None and best.path in {entry.path for entry in later}:
        (folder.checkpoints / folders.BEST).unlink()  # the next evaluation marks another
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


# -- a branch ------------------------------------------------------------------------------------------------------------------


def branch_config(cls: type[T], kind: str, branch: str, step: int | None, overrides: Sequence[str], folder: RunFolder) -> T:
    """Return the config of a new run that continues from a checkpoint of another: the config of that run, with overrides.

    ``branch`` is a checkpoint, or a run folder, which means the checkpoint of ``step`` or its newest. The same command later
    resumes the new run, even when the checkpoint that it branched from is gone.
    """
    folders.refuse_checkpoint(folder.root)
    path = Path(branch)
    stored = read_config(folder) if folder.config.exists() else {}
    origin = stored.get("branch_from")  # the checkpoint that the new run began from, if it has begun
    there = Path(origin or "")
    # Whether ``branch`` names that checkpoint again, or the run that it is in.
    is_same = path == there or (path in there.parents and (step is None or there.name == folders.folder_name(step)))
    if origin is None or not is_same:
        if match := folders.FOLDER_NAME.fullmatch(path.name):
            if step not in (None, int(match[1])):
                raise UserError(f"{path} is step {int(match[1])}, and --from-step says {step}: leave one of them out.")
            path, step = path.parent, int(match[1])
        found = store.resolve(path) if step is None else find_step(folders.root_of(path), step).path
        checkpoint = store.load(found, names=[])
        _check_kind(checkpoint, kind)
        stored = config_in(checkpoint) | {"branch_from": str(checkpoint.path)}
    return decode(cls, override(stored, overrides), source=branch)


def config_in(loaded: store.Loaded) -> dict[str, Any]:
    """Return the config of a checkpoint's run as plain values."""
    source = str(loaded.path / CONFIG)
    stored = load_yaml(loaded.files[CONFIG].decode("utf-8"), source) if CONFIG in loaded.files else None
    if not isinstance(stored, dict):
        raise UserError(f"Checkpoint {loaded.path} lacks {CONFIG}, so it does not say what it is a run of.")
    return stored


def refuse_weights_alone(checkpoint: store.Loaded) -> None:
    """Raise UserError for a checkpoint of weights alone, which no run saved: there is no training to continue."""
    if made_by := checkpoint.state.get(MADE_BY):
        raise UserError(
            f"{checkpoint.path} was made by `osler {made_by['command']}` and has weights alone, no optimizer and no place in the "
            f"data. Start a new run from them: init_from={checkpoint.path}."
        )


def _check_kind(checkpoint: store.Loaded, kind: str) -> None:
    refuse_weights_alone(checkpoint)
    there = checkpoint.state["kind"]
    if there != kind:
        raise UserError(f"{checkpoint.path} is of a run of `osler {there}`: branch it with `osler {there} --branch`.")


def branch_point(config: Any) -> Path | None:
    """Return the checkpoint that a new run branches from; None for a run that begins at step 0.

    Raises UserError when that checkpoint is of another kind of run or holds the state of another optimizer.
    """
    if config.branch_from is None:
        return None
    checkpoint = store.load(store.resolve(config.branch_from), names=[])
    _check_kind(checkpoint, config.kind)
    there = flat(config_in(checkpoint))
    for field, here in (("optim.type", config.optim.type), ("precision", config.precision)):
        if here != there.get(field, here) and (field == "optim.type" or "pure-bf16" in (here, there[field])):
            raise UserError(
                f"{field} is {here} here and {there[field]} in {checkpoint.path}, whose optimizer holds another state: leave it "
                f"as it is there, or start a new run with the weights alone, init_from={checkpoint.path}."
            )
    return checkpoint.path


def describe_branch(config: Any, loaded: store.Loaded) -> str:
    """Return one line about a branch: where it begins, and how its config differs from the run that it branches from."""
    leave_out = ("branch_from", "description", "monitor")
    changed = differences(config, config_in(loaded), str(loaded.path / CONFIG), leave_out)
    what = f"What differs from its run: {first_of(list(changed.values()))}." if changed else "Nothing differs from its run."
    return f"A branch of {loaded.path}, from step {loaded.step:,}. {what}"
