"""Which checkpoints of a run are deleted. Torch-free.

Rotation keeps the last ones that are good, the best, the milestones, the one that a rollback would take, and the newest, which
was verified when it was saved. So what verified last is never deleted.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from osler.checkpoint.manifest import REPLACED_SUFFIX, known_problems, looks_whole, verify
from osler.checkpoint.root import Damaged, best_checkpoint, by_age
from osler.runtime.errors import UserError
from osler.runtime.faults import fault
from osler.runtime.files import no_pause

logger = logging.getLogger(__name__)

HIDDEN = ".tmp-"  # begins the name of what is being written or deleted


def rotate(
    root: Path, newest: Path, keep_last: int, good_step: int | None = None, *, pause: Callable[[], None] = no_pause
) -> Damaged:
    """Delete what is not kept, and return the checkpoints that proved to be damaged.

    Kept are ``newest``, the best, the milestones, the last ``keep_last`` that are good, and the newest good one up to
    ``good_step``. Those that are counted on are read before anything is deleted, each once in a process; ``pause`` is called
    after each block. A checkpoint that cannot be read is kept, because it may be readable later.
    """
    damaged: Damaged = []
    try:
        marked = best_checkpoint(root)
        kept = {newest} | ({marked.path} if marked else set())
        entries = by_age(root)
        whole = [entry for entry in entries if looks_whole(entry.path) and not entry.path.name.endswith(REPLACED_SUFFIX)]
        steps: list[int] = []  # of the checkpoints that are counted on
        for entry in whole:
            is_last = len(steps) < keep_last
            is_rollback = good_step is not None and entry.step <= good_step < min(steps, default=good_step + 1)
            if entry.milestone:
                kept.add(entry.path)
            if not is_last and not is_rollback:
                continue
            problems: list[str] | None = []
            if entry.path != newest and len(whole) > keep_last and (problems := known_problems(entry.path)) is None:
                problems = verify(entry.path, pause=pause)
                if problems and entry.path.is_dir():  # a person may have deleted it in the meantime
                    damaged.append((entry.path, problems))
                    if known_problems(entry.path) is None:  # a network disk may be back in a moment
                        kept.add(entry.path)
            if not problems:
                steps.append(entry.step)
                kept.add(entry.path)
        for entry in entries:
            if entry.path not in kept and not entry.path.is_symlink():
                fault("rotate")
                remove(entry.path)
    except (OSError, UserError) as error:  # the new checkpoint is safe, only the space is not freed
        logger.warning(f"old checkpoints in {root} were not removed: {error}")
    return damaged


def prunable(root: Path, keep_last: int, *, keep_best: bool, keep_milestones: bool) -> list[tuple[Path, str]]:
    """Return what may be deleted, and why, when only the last ``keep_last`` that verify are to stay; newest first.

    Raises UserError when none verifies: then nothing may go, because a person may still mend one of them.
    """
    marked = best_checkpoint(root)
    going, good = [], 0
    for entry in by_age(root):
        is_best = marked is not None and marked.path == entry.path
        if (is_old := good >= keep_last) or verify(entry.path):
            if not (entry.path.is_symlink() or (keep_milestones and entry.milestone) or (keep_best and is_best)):
                reasons = [f"older than the last {keep_last}" if is_old else "damaged"]
                reasons += ["the best, which --keep-best keeps"] if is_best else []
                reasons += ["a milestone, which --keep-milestones keeps"] if entry.milestone else []
                going.append((entry.path, "; ".join(reasons)))
        else:
            good += 1
    if not good:
        raise UserError(f"No checkpoint in {root} is good, so none is deleted; `osler checkpoint verify` names what is damaged.")
    return going


def remove(folder: Path) -> None:
    """Delete a folder, if it exists, so that a kill half way leaves a hidden remnant and not a torn checkpoint."""
    hidden = folder.with_name(f"{HIDDEN}removed-{folder.name}")
    with suppress(FileNotFoundError):
        folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)  # it does not count, and the next save tries again
