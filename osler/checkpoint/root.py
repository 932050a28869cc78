"""The folder of a run's checkpoints as a whole: which is the newest, which the best, which may go.

Age is the order of the saves, not of the steps: after going back to an earlier step the newest checkpoint is not the one with the
highest step. Five things keep a checkpoint: it is among the last that are good, it is the best, it is a milestone, it is the
one that a run in trouble would go back to, or it is the newest, which was verified a moment ago; so what verified last is never
deleted. Torch-free.
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from osler.checkpoint.manifest import (
    FOLDER_NAME,
    MANIFEST,
    REPLACED_SUFFIX,
    STATE,
    looks_whole,
    read_manifest,
    verdict,
    verify,
)
from osler.errors import UserError
from osler.runtime.faults import fault
from osler.runtime.files import RunFolder, no_pause, read_json, write_json

logger = logging.getLogger(__name__)

BEST = "best.json"
HIDDEN = ".tmp-"  # begins the name of what is being written or deleted

Skipped = list[tuple[Path, list[str]]]
OnDamage = Callable[[Path, list[str]], None]  # is told of a checkpoint that is damaged, and how


def ignore_damage(_: Path, __: list[str]) -> None:
    """What is told of damage when nobody keeps a record."""


@dataclass(frozen=True)
class Best:
    """Which checkpoint scored best, and what it scored."""

    path: Path
    step: int
    metric: str
    value: float | None


class Entry(NamedTuple):
    """A checkpoint folder, by what its name and its manifest say."""

    sequence: int
    step: int
    path: Path
    milestone: bool


def root_of(path: str | Path) -> Path:
    """The checkpoints folder that a person means by it or by its run folder; raises UserError when the path is no folder."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is no folder: give a run folder or one of its checkpoints.")
    inner = RunFolder(path).checkpoints
    return inner if inner.is_dir() else path


def refuse_checkpoint(path: str | Path) -> None:
    """Raise UserError when a run folder, to be written into, is a checkpoint or a folder of checkpoints, or lies in one."""
    given, real = Path(path), Path(path).resolve()
    for folder in (given, *given.parents, real, *real.parents):
        is_inside = folder.parent.name == "checkpoints"
        match = FOLDER_NAME.fullmatch(folder.name)
        if (match and is_inside) or ((folder / MANIFEST).is_file() and (folder / STATE).is_file()):
            run = folder.parent.parent
            back = f" {run}; `--run {run} --from-step {int(match[1])}` takes it back to this step" if match and is_inside else ""
            where = "a checkpoint" if folder in (given, real) else "in a checkpoint"
            raise UserError(
                f"{path} is no run folder but {where}, and what is written into one damages it. Give the run folder{back}. To "
                f"start a new run at this step, with the optimizer and the place in the data, give `--branch {folder} --run "
                f"NEW_FOLDER`; init_from={folder} takes the weights alone."
            )
        if folder.name == "checkpoints" and by_age(folder):
            raise UserError(f"{path} is no run folder: {folder} holds the checkpoints of a run. Give that run, {folder.parent}.")


def by_age(root: Path) -> list[Entry]:
    """All checkpoints, newest first; a folder without a readable manifest comes first, to be reported."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        match = FOLDER_NAME.fullmatch(path.name)
        if match and path.is_dir():
            try:
                manifest = read_manifest(path)
                found.append(Entry(manifest.sequence, int(match[1]), path, manifest.milestone))
            except UserError:
                found.append(Entry(sys.maxsize, int(match[1]), path, False))
    return sorted(found, key=lambda entry: entry[:2], reverse=True)


def newest_good(root: str | Path) -> tuple[Path | None, Skipped]:
    """The checkpoint saved last among those that verify, and the newer ones that had to be skipped with their problems.

    (None, []) when there is no checkpoint at all. The caller says what it fell back from: see describe_skipped.
    """
    skipped: Skipped = []
    for entry in by_age(Path(root)):
        problems = verify(entry.path)
        if not problems:
            return entry.path, skipped
        if entry.path.is_dir():  # or a run has deleted it meanwhile
            skipped.append((entry.path, problems))
    return None, skipped


def describe_skipped(skipped: Skipped) -> str:
    """One line for a person about checkpoints that are damaged."""
    return "; ".join(f"{path} is damaged ({', '.join(problems)})" for path, problems in skipped)


def mark_best(path: str | Path, metric: str, value: float | None) -> None:
    """Record that a checkpoint is the best so far, which keeps it from rotation; the former best loses that.

    Only warns when the disk refuses, since the checkpoint itself is safe; then the former best stays marked.
    """
    path = Path(path)
    try:
        fault("save-best")
        write_json(path.parent / BEST, {"folder": path.name, "metric": metric, "value": value})
    except OSError as error:
        logger.warning(f"{path} could not be marked best: {error.strerror}")


def best_checkpoint(root: str | Path) -> Best | None:
    """The checkpoint marked best, or None when none is or it is gone; raises UserError when ``best.json`` is torn."""
    pointer = Path(root) / BEST
    if not pointer.exists():
        return None
    content = read_json(pointer)
    name = content.get("folder") if isinstance(content, dict) else None
    match = FOLDER_NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise UserError(f"{pointer} does not name a checkpoint folder; delete it if no checkpoint is to count as best.")
    path = pointer.with_name(match[0])
    return Best(path, int(match[1]), content.get("metric", ""), content.get("value")) if path.is_dir() else None


def rotate(
    root: Path,
    newest: Path,
    keep_last: int,
    good_step: int | None = None,
    *,
    pause: Callable[[], None] = no_pause,
    on_damage: OnDamage = ignore_damage,
) -> None:
    """Delete what is neither the newest (verified a moment ago), nor the best, nor a milestone, nor among the last good ones.

    The newest good one up to ``good_step`` stays too, however many have been saved in trouble since. Before anything goes, those
    that are counted on in its stead are read, each once in this process; ``on_damage`` is told of what is found then.
    """
    try:
        marked = best_checkpoint(root)
        kept = {newest} | ({marked.path} if marked else set())
        entries = by_age(root)
        whole = [entry for entry in entries if looks_whole(entry.path) and not entry.path.name.endswith(REPLACED_SUFFIX)]
        kept.update(entry.path for entry in whole if entry.milestone)
        unread: set[Path] = set()  # a network disk may be back in a moment, and the checkpoint good
        good = _good_ones(whole, newest, pause, on_damage, unread) if len(whole) > keep_last else iter(whole)
        counted = list(islice(good, keep_last))
        if good_step is not None:
            counted += islice((entry for entry in chain(counted, good) if entry.step <= good_step), 1)
        kept.update(entry.path for entry in counted)
        kept |= unread
        for entry in entries:
            if entry.path not in kept and not entry.path.is_symlink():
                fault("rotate")
                remove(entry.path)
    except (OSError, UserError) as error:  # the new checkpoint is safe, only the space is not freed
        logger.warning(f"old checkpoints in {root} were not removed: {error}")


def _good_ones(
    entries: Sequence[Entry], newest: Path, pause: Callable[[], None], on_damage: OnDamage, unread: set[Path]
) -> Iterator[Entry]:
    """Those that are as they were saved, read no earlier than they are asked for; ``unread`` takes those that cannot be read."""
    for entry in entries:
        problems = [] if entry.path == newest else verdict(entry.path)
        if problems is None:
            problems = verify(entry.path, pause=pause)
            if problems and entry.path.is_dir():  # or somebody has deleted it meanwhile
                on_damage(entry.path, problems)
                if verdict(entry.path) is None:
                    unread.add(entry.path)
        if not problems:
            yield entry


def prunable(root: Path, keep_last: int, *, keep_best: bool, keep_milestones: bool) -> list[tuple[Path, str]]:
    """What may be deleted, and why, when only the last ``keep_last`` that verify, byte for byte, are to stay; oldest last.

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
    """Delete a folder, if it is still there, so that a kill half way leaves a hidden remnant and not a torn checkpoint."""
    hidden = folder.with_name(f"{HIDDEN}removed-{folder.name}")
    with suppress(FileNotFoundError):
        folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)  # it counts no more, and the next save tries again
