"""The folder of a run's checkpoints: which of them is the newest, and which the best. Torch-free.

The newest checkpoint is the one saved last. After going back to an earlier step that is not the one with the highest step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from osler.checkpoint.manifest import FOLDER_NAME, MANIFEST, STATE, Manifest, verify
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder, read_json

BEST = "best.json"

Damaged = list[tuple[Path, list[str]]]  # checkpoints with their problems
OnDamage = Callable[[Path, list[str]], object]  # receives a damaged checkpoint and its problems


def ignore_damage(path: Path, problems: list[str]) -> None:
    """Do nothing about a damaged checkpoint."""


class Best(NamedTuple):
    """The checkpoint that scored best, and its score."""

    path: Path
    step: int
    metric: str
    value: float | None


class Entry(NamedTuple):
    """A checkpoint folder, with what its name and its manifest say."""

    sequence: int
    step: int
    path: Path
    milestone: bool


def root_of(path: str | Path) -> Path:
    """Return the checkpoints folder that is meant by it or by its run folder; raises UserError when the path is no folder."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is no folder: give a run folder or one of its checkpoints.")
    inner = RunFolder(path).checkpoints
    return inner if inner.is_dir() else path


def is_checkpoint(path: Path) -> bool:
    """Return whether a path is a checkpoint by its name or by its manifest."""
    return FOLDER_NAME.fullmatch(path.name) is not None or (path / MANIFEST).exists()


def refuse_checkpoint(path: str | Path) -> None:
    """Raise UserError when a run folder, to be written into, is or lies in a checkpoint or a folder of checkpoints."""
    given, real = Path(path), Path(path).resolve()
    for folder in (given, *given.parents, real, *real.parents):
        match = FOLDER_NAME.fullmatch(folder.name) if folder.parent.name == "checkpoints" else None
        if match or ((folder / MANIFEST).is_file() and (folder / STATE).is_file()):
            run = folder.parent.parent
            back = f" {run}; `--run {run} --from-step {int(match[1])}` takes it back to this step" if match else ""
            where = "a checkpoint" if folder in (given, real) else "in a checkpoint"
            raise UserError(
                f"{path} is no run folder but {where}, and what is written into one damages it. Give the run folder{back}. To "
                f"start a new run at this step, with the optimizer and the place in the data, give `--branch {folder} --run "
                f"NEW_FOLDER`; init_from={folder} takes the weights alone."
            )
        if folder.name == "checkpoints" and by_age(folder):
            raise UserError(f"{path} is no run folder: {folder} holds the checkpoints of a run. Give that run, {folder.parent}.")


def by_age(root: Path) -> list[Entry]:
    """Return all checkpoints, newest first; folders without a readable manifest come before them, to be reported."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        match = FOLDER_NAME.fullmatch(path.name)
        if match and path.is_dir():
            try:
                manifest = Manifest.read(path)
                found.append(Entry(manifest.sequence, int(match[1]), path, manifest.milestone))
            except UserError:
                found.append(Entry(sys.maxsize, int(match[1]), path, False))
    return sorted(found, key=lambda entry: entry[:2], reverse=True)


def newest_good(root: str | Path) -> tuple[Path | None, Damaged]:
    """Return the newest checkpoint that verifies (None if none does), and the newer ones that do not.

    The caller reports the damage, see ``describe_damaged``.
    """
    damaged: Damaged = []
    for entry in by_age(Path(root)):
        problems = verify(entry.path)
        if not problems:
            return entry.path, damaged
        if entry.path.is_dir():  # a run may have deleted it in the meantime
            damaged.append((entry.path, problems))
    return None, damaged


def describe_damaged(damaged: Damaged) -> str:
    """Return one line for a person about checkpoints that are damaged."""
    return "; ".join(f"{path} is damaged ({', '.join(problems)})" for path, problems in damaged)


def best_checkpoint(root: str | Path) -> Best | None:
    """Return the checkpoint marked best, or None when none is or it is gone; raises UserError when ``best.json`` is torn."""
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
