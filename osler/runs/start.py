"""Where a process starts: at the newest good checkpoint of its run, at the checkpoint that it branches from, or at step 0.

A branch (``--branch``) is a new run that goes on from a checkpoint of another, with its optimizer and its place in the data. Its
config names that checkpoint as ``branch_from``, and it needs it until it has one of its own. What follows is an ordinary resume,
except that the optimizer's settings are the config's and not the checkpoint's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from osler.checkpoint import store
from osler.checkpoint.folders import FOLDER_NAME, STATE, padded, refuse_checkpoint, root_of, verify
from osler.config.recipe import load_yaml, merge, parse_overrides
from osler.config.schema import decode
from osler.monitor.logger import check_trackers
from osler.records.jsonl import EventLog
from osler.runs.folder import differences, flat, named, newest_checkpoint, read_config, refuse_another
from osler.runs.loop import Loop, Trainer
from osler.runs.process import Run
from osler.runs.rewind import find_step
from osler.runtime.device import keep_freed_memory
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder, read_json
from osler.runtime.world import World

logger = logging.getLogger(__name__)

T = TypeVar("T")
CONFIG = "config.yaml"  # in a checkpoint


class Start(NamedTuple):
    """The checkpoint that a process goes on from (None: the run begins), and whether it belongs to another run."""

    checkpoint: Path | None
    is_branch: bool

    def load(self, names: Sequence[str] | None = None) -> store.Loaded | None:
        """Return the checkpoint with these groups of tensors (None: all)."""
        return None if self.checkpoint is None else store.load(self.checkpoint, names=names)


def find_start(config: Any, run: Run, check_branch: Callable[[Any, store.Loaded], None]) -> Start:
    """Check that the folder may hold this run, and return where it goes on from, which is the same on every rank.

    Raises UserError when the folder holds another run, when the ranks found different checkpoints, and when ``check_branch``
    refuses a branch that begins.
    """
    refuse_another(run.folder, config)
    check_trackers(config.monitor)
    keep_freed_memory()
    newest = newest_checkpoint(run.folder, record=run.world.is_first)
    start = Start(newest or branch_point(config), is_branch=newest is None and config.branch_from is not None)
    loaded = start.load(names=[])
    check_same_start(-1 if loaded is None else loaded.step, run.world)  # before ranks could wait for different things
    if start.is_branch and loaded is not None:
        check_branch(config, loaded)
    return start


def check_same_start(step: int, world: World) -> None:
    """Raise UserError when the ranks found different checkpoints, as on machines that do not share the disk of the run folder."""
    least, most = world.all_reduce_min(step, -step)
    if least != -most:
        raise UserError(
            f"The processes found different checkpoints to go on from (steps {least} to {-most}, -1 is none): the run folder "
            "must lie on a disk that all machines share."
        )


def restored(trainer: Trainer, start: Start, loaded: store.Loaded) -> Loop:
    """Return the loop of a trainer, restored from a checkpoint."""
    loop = Loop(trainer)
    loop.restore(loaded)
    if start.is_branch:
        announce_branch(trainer.config, loaded, trainer.run.events)
    logger.info(f"Continuing {trainer.run.folder.root} from step {trainer.step:,} ({trainer.tokens:,} tokens).")
    return loop


def warn_of_endless_warmup(warmup_tokens: int, total_tokens: int, total: str = "total_tokens") -> None:
    """Warn when a run, shortened on the command line perhaps, ends inside its warm-up and learns next to nothing."""
    if warmup_tokens >= total_tokens:
        logger.warning(
            f"schedule.warmup_tokens {warmup_tokens:,} is not below {total} {total_tokens:,}, so the learning rate "
            "never reaches optim.lr; set schedule.warmup_tokens to a tenth of that or less."
        )


# -- a branch -----------------------------------------------------------------------------------------------------------


def branch_config(cls: type[T], kind: str, branch: str, step: int | None, overrides: Sequence[str], folder: RunFolder) -> T:
    """Return the config of a new run that goes on from a checkpoint of another: the config of that one, with overrides.

    ``branch`` is a checkpoint, or a run folder with ``step`` or its newest. The same command goes on with the new run, even when
    the checkpoint that it began with is gone.
    """
    refuse_checkpoint(folder.root)
    branch_path = padded(Path(branch))
    stored = read_config(folder) if folder.config.exists() else {}
    if not _is_begun(stored.get("branch_from"), branch_path, step):
        checkpoint = _checkpoint_of(branch_path, step)
        _check_kind(checkpoint, kind)
        stored = _config_in(checkpoint, store.load(checkpoint, names=[]).files) | {"branch_from": str(checkpoint)}
    return decode(cls, merge(stored, parse_overrides(overrides, stored)), source=str(branch))


def _is_begun(branch_from: str | None, branch: Path, step: int | None) -> bool:
    """Whether ``--branch`` asks for the run that began at ``branch_from``: it names that checkpoint, or its run."""
    if branch_from is None:
        return False
    there = Path(branch_from)
    return branch == there or (branch in there.parents and (step is None or there.name == store.folder_name(step)))


def _checkpoint_of(path: Path, step: int | None) -> Path:
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
    """Return the checkpoint that a new run branches from; None for a run that begins at step 0.

    Raises UserError when that checkpoint is of another kind of run or holds the state of another optimizer.
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
    """Whether a config has the same data as the run of a checkpoint."""
    stored = _config_in(loaded.path, loaded.files)
    return not any(key.startswith("data.") for key in differences(config, stored, str(loaded.path / CONFIG)))


def describe_branch(config: Any, loaded: store.Loaded) -> str:
    """Return one line about a branch: where it begins, and how its config differs from that of its run."""
    stored = _config_in(loaded.path, loaded.files)
    changed = differences(config, stored, str(loaded.path / CONFIG), leave_out=("branch_from", "description", "monitor"))
    what = f"What differs from its run: {named(changed)}." if changed else "Nothing differs from its run."
    return f"A branch of {loaded.path}, from step {loaded.step:,}. {what}"


def announce_branch(config: Any, loaded: store.Loaded, events: EventLog) -> None:
    """Log and record that a run begins as a branch."""
    message = describe_branch(config, loaded)
    logger.info(message)
    events.write(loaded.step, "branch", "branch", message)
