"""Where a process starts: at the newest good checkpoint of its run, at the checkpoint that it branches from, or at step 0."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from osler.checkpoint import store
from osler.monitor.logger import check_trackers
from osler.runs.branch import announce_branch, branch_point
from osler.runs.folder import newest_checkpoint, refuse_another
from osler.runs.loop import Loop, Trainer
from osler.runs.process import Run
from osler.runtime.device import keep_freed_memory
from osler.runtime.errors import UserError
from osler.runtime.world import World

logger = logging.getLogger(__name__)


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
