"""The checkpoint folders of a run: whether each is as it was saved, which are the newest and the best, and which to delete.

A folder's manifest names its files with sizes and hashes, and has a hash of itself. It is written last, so a folder with a valid
manifest was complete once; ``verify`` tells whether it still is. ``sequence`` counts the saves: the newest checkpoint is the one
saved last. After a rollback an older checkpoint may have a higher step. Torch-free.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from osler.runtime.errors import UserError
from osler.runtime.faults import fault
from osler.runtime.files import RunFolder, canonical_json, no_pause, read_json, sha256_file, write_json

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
CONFIG_JSON = "config.json"  # a folder of Hugging Face's has it, a checkpoint never
TENSORS_SUFFIX = ".safetensors"
BEST = "best.json"  # in the root, which is the folder of a run's checkpoints
HIDDEN = ".tmp-"  # the names of folders that are being written or deleted begin with it
# A checkpoint's name ends with this while another checkpoint of the same step takes its place; it stays complete until then.
REPLACED_SUFFIX = ".replaced"
FOLDER_NAME = re.compile(r"step-(\d{9,})(\.replaced)?")

Damaged = list[tuple[Path, list[str]]]  # checkpoints with their problems

_verified: dict[object, list[str]] = {}  # problems that this process found in a folder, by its signature


# -- one checkpoint ------------------------------------------------------------------------------------------------------------


class FileRecord(NamedTuple):
    """The size and hash that a file must have."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``."""

    step: int
    sequence: int
    files: dict[str, FileRecord]
    milestone: bool = False  # whether rotation must never delete the checkpoint

    def write(self, folder: Path) -> None:
        """Write ``manifest.json`` into a folder, durably, with a hash of its own content."""
        files = {name: {"bytes": record.size_bytes, "sha256": record.sha256} for name, record in self.files.items()}
        content = {"format": FORMAT, "step": self.step, "sequence": self.sequence, "milestone": self.milestone, "files": files}
        write_json(folder / MANIFEST, {**content, "sha256": _content_hash(content)})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read ``manifest.json``; raises UserError when it is missing, torn, changed, or of an unknown format."""
        path = folder / MANIFEST
        content = read_json(path)
        try:
            if content.pop("sha256") != _content_hash(content):
                raise UserError(f"{path} was changed after it was written.")
            if content["format"] != FORMAT:
                raise UserError(f"{path} has format {content['format']}; this version of Osler reads format {FORMAT}.")
            files = {name: FileRecord(int(entry["bytes"]), entry["sha256"]) for name, entry in content["files"].items()}
            if any(Path(name).name != name for name in files):
                raise UserError(f"{path} names a file outside its folder.")
            return cls(int(content["step"]), int(content["sequence"]), files, content.get("milestone") is True)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not a checkpoint manifest.") from error


def _content_hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(content)).hexdigest()


def folder_name(step: int) -> str:
    """Return ``step-000000123``, which sorts by step."""
    return f"step-{step:09d}"


def is_checkpoint(path: Path) -> bool:
    """Return whether a path is a checkpoint by its name or by its manifest."""
    return FOLDER_NAME.fullmatch(path.name) is not None or (path / MANIFEST).exists()


def fingerprint_of(checkpoint: Path) -> str:
    """Return 16 hex digits that change with every byte of a checkpoint, from its manifest of hashes."""
    return sha256_file(checkpoint / MANIFEST)[:16]


def verify(path: str | Path, names: Collection[str] | None = None, *, pause: Callable[[], None] = no_pause) -> list[str]:
    """Return what is wrong with a checkpoint folder, one line per file; an empty list means that it is good.

    ``names`` restricts the hashing of tensor files to those of these names; all files are checked for presence and size. A file
    that the manifest does not list is a problem, because nothing would read it. Hidden files are no problem, because file
    managers and network disks leave them. ``pause`` is called after each block that was hashed.
    """
    folder = Path(path)
    signature = _signature(folder)
    problems, manifest = _check_names_and_sizes(folder)
    is_readable = True
    for name, record in manifest.files.items() if manifest else ():
        is_left_out = names is not None and name.endswith(TENSORS_SUFFIX) and name.removesuffix(TENSORS_SUFFIX) not in names
        if name in problems or is_left_out:
            continue
        try:
            if sha256_file(folder / name, pause) != record.sha256:
                problems[name] = "its content changed since it was saved (SHA-256 differs)"
        except OSError as error:
            is_readable = False
            problems[name] = f"cannot be read ({error.strerror})"
    found = [f"{name}: {text}" for name, text in problems.items()]
    if names is None and signature and is_readable:  # an unreadable file may be readable later
        _verified[signature] = found
    return found


def known_problems(folder: Path) -> list[str] | None:
    """Return what ``verify`` found in this process; None if it has not read every file, or the folder has changed since then."""
    return _verified.get(_signature(folder))


def _signature(folder: Path) -> object:
    """Return a signature that changes when a file is touched; None when the folder cannot be read."""
    with suppress(OSError):
        stats = {entry.path: entry.stat() for entry in os.scandir(folder.absolute())}
        files = sorted((path, stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in stats.items())
        return (folder.stat().st_mtime_ns, *files)
    return None


def looks_whole(folder: Path) -> bool:
    """Return whether manifest, names and sizes agree. This does not read the tensors."""
    return not _check_names_and_sizes(folder)[0]


def _check_names_and_sizes(folder: Path) -> tuple[dict[str, str], Manifest | None]:
    """Return the problems by file, and the manifest if it can be read."""
    if not folder.is_dir():
        return {folder.name: "no such folder"}, None
    try:
        manifest = Manifest.read(folder)
    except UserError as error:
        return {MANIFEST: str(error)}, None
    problems = {}
    match = FOLDER_NAME.fullmatch(folder.name)
    if match and int(match[1]) != manifest.step:
        problems[MANIFEST] = f"it belongs to step {manifest.step}, not to this folder"
    for name, record in manifest.files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            problems[name] = "missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        else:
            if size != record.size_bytes:
                problems[name] = f"{size} bytes instead of {record.size_bytes}"
    unlisted = {entry.name for entry in folder.iterdir()} - {*manifest.files, MANIFEST}
    return problems | {name: "not listed in the manifest, remove it" for name in sorted(unlisted) if name[0] != "."}, manifest


# -- the checkpoints of a run --------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A checkpoint folder, with what its name and its manifest say."""

    sequence: int
    step: int
    path: Path
    milestone: bool


class Best(NamedTuple):
    """The checkpoint that scored best, and its score."""

    path: Path
    step: int
    metric: str
    value: float | None


def root_of(path: str | Path) -> Path:
    """Return the checkpoints folder, given its path or that of its run folder. Any other folder is returned as it is.

    Raises UserError when the path is no folder, a folder of Hugging Face's, or one of several runs, such as a pipeline's.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is no folder: give a run folder or one of its checkpoints.")
    inner = RunFolder(path).checkpoints
    if inner.is_dir():
        return inner
    if runs := [sub for sub in sorted(path.iterdir()) if RunFolder(sub).checkpoints.is_dir()]:
        raise UserError(f"{path} holds {len(runs)} runs; give the one that you mean: {', '.join(map(str, runs))}.")
    if (path / CONFIG_JSON).is_file():
        raise UserError(
            f"{path} is a folder of Hugging Face's: `osler import {path} --run runs/{path.resolve().name}` makes a run of it, "
            "which every command takes."
        )
    return path


def refuse_checkpoint(path: str | Path) -> None:
    """Raise UserError for a path that is to be a run folder and is a checkpoint, a folder of checkpoints, or inside one."""
    given, real = Path(path), Path(path).resolve()
    for folder in (given, *given.parents, real, *real.parents):
        match = FOLDER_NAME.fullmatch(folder.name) if folder.parent.name == "checkpoints" else None
        if match or ((folder / MANIFEST).is_file() and (folder / STATE).is_file()):
            run = folder.parent.parent
            back = f" {run}; `--run {run} --from-step {int(match[1])}` takes it back to this step" if match else ""
            where = "a checkpoint" if folder in (given, real) else "in a checkpoint"
            raise UserError(
                f"{path} is no run folder but {where}, and what is written into one damages it. Give the run folder{back}. For "
                f"a new run from here give `--branch {folder} --run NEW_FOLDER`; init_from={folder} takes the weights alone."
            )
        if folder.name == "checkpoints" and by_age(folder):
            raise UserError(f"{path} is no run folder: {folder} holds the checkpoints of a run. Give that run, {folder.parent}.")


def by_age(root: Path) -> list[Entry]:
    """Return all checkpoints, newest first. Folders without a readable manifest come first of all, because they are reported."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        match = FOLDER_NAME.fullmatch(path.name)
        if match and path.is_dir():
            manifest = Manifest(int(match[1]), sys.maxsize, {})
            with suppress(UserError):
                manifest = Manifest.read(path)
            found.append(Entry(manifest.sequence, int(match[1]), path, manifest.milestone))
    return sorted(found, key=lambda entry: entry[:2], reverse=True)


def newest_good(root: str | Path) -> tuple[Path | None, Damaged]:
    """Return the newest checkpoint that verifies (None if none does), and the damaged ones that are newer, to be reported."""
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


def newest_checkpoint(root: Path, on_damage: Callable[[Damaged], object] = lambda damaged: None) -> Path | None:
    """Return the checkpoint to continue from, and warn when newer ones are damaged; None when none was saved.

    ``on_damage`` is called with the damaged ones. Raises UserError when all are damaged: the run must not start over unasked.
    """
    found, damaged = newest_good(root)
    if damaged:
        on_damage(damaged)
        if found is None:
            raise UserError(
                f"No checkpoint in {root} is good: {describe_damaged(damaged)}. Restore one from a copy, or delete that folder "
                "to start its run over."
            )
        logger.warning(f"{describe_damaged(damaged)}; going on from {found}.")
    return found


def best_checkpoint(root: str | Path) -> Best | None:
    """Return the checkpoint marked best, or None when there is no mark or no such folder; raises UserError for a torn mark."""
    pointer = Path(root) / BEST
    if not pointer.exists():
        return None
    content = read_json(pointer)
    match = FOLDER_NAME.fullmatch(str(content.get("folder"))) if isinstance(content, dict) else None
    if match is None:
        raise UserError(f"{pointer} does not name a checkpoint folder; delete it if no checkpoint is to count as best.")
    path = pointer.with_name(match[0])
    return Best(path, int(match[1]), content.get("metric", ""), content.get("value")) if path.is_dir() else None


def mark_best(path: Path, metric: str, value: float | None) -> None:
    """Record that a checkpoint is the best so far. Rotation then keeps it instead of the one that was the best before.

    If the disk refuses, this function only warns, since the checkpoint itself is safe; the earlier best one stays marked.
    """
    try:
        fault("save-best")
        write_json(path.parent / BEST, {"folder": path.name, "metric": metric, "value": value})
    except OSError as error:
        logger.warning(f"{path} could not be marked best: {error.strerror}")


def is_better(metric: str, value: float, than: float) -> bool:
    """Return whether a value of a metric is better than another: lower if its name ends with ``loss``, else higher."""
    return value < than if metric.endswith("loss") else value > than


def rotate(
    root: Path, newest: Path, keep_last: int, good_step: int | None = None, *, pause: Callable[[], None] = no_pause
) -> Damaged:
    """Delete checkpoints that need not be kept, and return those that proved to be damaged.

    ``newest`` is kept; it was verified when it was saved. Also kept are the best, the milestones, the last ``keep_last`` good
    ones, and for a rollback the newest good one up to ``good_step``. To find good checkpoints, their files are read before
    anything is deleted, each once in a process; ``pause`` is called after each block. A checkpoint that cannot be read is kept,
    because it may be readable later.
    """
    damaged: Damaged = []
    try:
        marked = best_checkpoint(root)
        kept = {newest} | ({marked.path} if marked else set())
        entries = by_age(root)
        whole = [entry for entry in entries if looks_whole(entry.path) and not entry.path.name.endswith(REPLACED_SUFFIX)]
        good_steps: list[int] = []  # steps of the last good checkpoints, and of the one for a rollback
        for entry in whole:
            if entry.milestone:
                kept.add(entry.path)
            is_rollback = good_step is not None and entry.step <= good_step < min(good_steps, default=good_step + 1)
            if len(good_steps) >= keep_last and not is_rollback:
                continue
            problems: list[str] | None = []
            if entry.path != newest and len(whole) > keep_last and (problems := known_problems(entry.path)) is None:
                problems = verify(entry.path, pause=pause)
                if problems and entry.path.is_dir():  # a person may have deleted it in the meantime
                    damaged.append((entry.path, problems))
                    if known_problems(entry.path) is None:  # a network disk may be back in a moment
                        kept.add(entry.path)
            if not problems:
                good_steps.append(entry.step)
                kept.add(entry.path)
        for entry in entries:
            if entry.path not in kept and not entry.path.is_symlink():
                fault("rotate")
                remove(entry.path)
    except (OSError, UserError) as error:  # the new checkpoint is safe; only the space is not freed
        logger.warning(f"old checkpoints in {root} were not removed: {error}")
    return damaged


def remove(folder: Path) -> None:
    """Delete a folder, if it exists; a kill half way leaves a hidden remnant instead of a torn checkpoint."""
    hidden = folder.with_name(f"{HIDDEN}removed-{folder.name}")
    with suppress(FileNotFoundError):
        folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)  # a remnant does no harm, and the next save tries again
