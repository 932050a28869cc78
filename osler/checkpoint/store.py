"""Checkpoints that survive a kill at any moment: saved whole or not at all, verified, rotated, and found again.

``root/step-000000123/`` holds one ``<name>.safetensors`` per tensor dictionary, ``state.json``, further files as bytes,
and ``manifest.json``. A save writes all of it into a hidden folder, flushes every file, writes the manifest last,
renames the folder and flushes the root; then it reads everything back, and only then deletes old checkpoints. There is
no pickle anywhere. What was put in comes out bit for bit; whether a *resume* is exact is up to what the caller puts in.

One process saves into a root at a time.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import shutil
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from osler.checkpoint.manifest import (
    FOLDER_NAME,
    MANIFEST,
    REPLACED_SUFFIX,
    STATE,
    TENSORS_SUFFIX,
    FileRecord,
    Manifest,
    folder_name,
    looks_whole,
    read_manifest,
    verify,
    write_manifest,
)
from osler.checkpoint.tensors import read_tensors, write_tensors
from osler.errors import UserError
from osler.runtime.faults import fault
from osler.runtime.files import RunFolder, fsync_dir, open_durable, read_json, write_json
from osler.runtime.log import say

BEST = "best.json"
_HIDDEN = ".tmp-"

Skipped = list[tuple[Path, list[str]]]


class CheckpointSaveError(RuntimeError):
    """A checkpoint could not be saved; earlier ones are untouched, so a run may warn and go on."""


@dataclass(frozen=True)
class Loaded:
    """The content of one checkpoint; tensors are on the CPU."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    files: dict[str, bytes]


@dataclass(frozen=True)
class Best:
    """Which checkpoint scored best, and what it scored."""

    path: Path
    step: int
    metric: str
    value: float | None


def save(
    root: str | Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
    keep_last: int = 2,
    best: bool = False,
    best_metric: str = "",
    best_value: float | None = None,
) -> Path:
    """Save a checkpoint, verify it, then delete all but the last ``keep_last`` and the best one; returns its folder.

    ``tensors`` maps a file's name to its tensors; ``state`` must be JSON with string keys. A checkpoint of the same
    step is replaced, and stays until the new one is whole on the disk. Raises CheckpointSaveError when the disk is full
    or fails; the half-written folder is then removed and the older checkpoints stay.
    """
    root = Path(root)
    if keep_last < 1 or step < 0:
        raise ValueError(f"keep_last must be at least 1 and step at least 0, not {keep_last} and {step}")
    contents = _contents(tensors, state, files or {})
    final = root / folder_name(step)
    temporary = root / f"{_HIDDEN}{final.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _tidy(root)
        sequence = 1 + max((order for order, _, _ in _by_age(root) if order < sys.maxsize), default=0)
        temporary.mkdir()
        _write_folder(temporary, tensors, contents, Manifest(step, sequence, {}))
        _set_aside(final)
        fault("save-rename")
        temporary.rename(final)
        fsync_dir(root)
        fault("save-verify")
        problems = verify(final)
        if problems:
            _remove(final)
            raise OSError(errno.EIO, f"it does not read back ({'; '.join(problems)})")
    except OSError as error:
        with contextlib.suppress(OSError):
            _tidy(root)
        raise CheckpointSaveError(f"Checkpoint {final} could not be saved: {error.strerror or error}.") from error
    if best:
        mark_best(final, best_metric, best_value)
    _rotate(root, final, keep_last)
    return final


def _contents(
    tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], files: Mapping[str, bytes]
) -> dict[str, bytes]:
    """The small files as bytes; raises before the disk is touched when names or state are unusable."""
    _require_string_keys(state)
    names = [*(f"{name}{TENSORS_SUFFIX}" for name in tensors), STATE, MANIFEST, *files]
    for name in names:
        if not name or Path(name).name != name or name.startswith("."):
            raise ValueError(f"{name!r} cannot name a file of a checkpoint")
    if len({name.lower() for name in names}) < len(names) or any(name.endswith(TENSORS_SUFFIX) for name in files):
        raise ValueError(f"names of a checkpoint's files clash: {sorted(names)}")
    return {STATE: json.dumps(state, indent=1).encode("utf-8"), **files}


def _require_string_keys(value: Any, path: str = "state") -> None:
    """JSON would turn a key 3 into "3" without a word, and the resumed run would not find it."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{path} has the key {key!r}: JSON keeps only strings as keys")
            _require_string_keys(inner, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            _require_string_keys(inner, f"{path}[{index}]")


def _write_folder(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], contents: Mapping[str, bytes], manifest: Manifest
) -> None:
    records = {}
    for name, named in tensors.items():
        filename = f"{name}{TENSORS_SUFFIX}"
        records[filename] = FileRecord(*write_tensors(folder / filename, named))
    for name, data in contents.items():
        with open_durable(folder / name) as file:
            file.write(data[: len(data) // 2])
            fault("save-state" if name == STATE else "save-files")
            file.write(data[len(data) // 2 :])
        records[name] = FileRecord(len(data), hashlib.sha256(data).hexdigest())
    fault("save-manifest")
    write_manifest(folder, Manifest(manifest.step, manifest.sequence, records))
    fsync_dir(folder)


def _set_aside(final: Path) -> None:
    """Free the name ``final`` while the checkpoint that has it stays findable under another one."""
    aside = final.with_name(final.name + REPLACED_SUFFIX)
    if not final.exists():
        return
    if aside.exists():  # an earlier replacement was killed half way: keep whichever of the two is good
        if verify(final):
            _remove(final)
            return
        _remove(aside)
    final.rename(aside)


def _tidy(root: Path) -> None:
    """Delete what killed saves and deletions left, and give a set-aside checkpoint its name back if that is free."""
    for path in root.glob(f"{_HIDDEN}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
    for path in root.glob(f".{BEST}.*.tmp"):
        path.unlink()
    for aside in root.glob(f"*{REPLACED_SUFFIX}"):
        final = aside.with_name(aside.name.removesuffix(REPLACED_SUFFIX))
        if FOLDER_NAME.fullmatch(aside.name) and not final.exists():
            aside.rename(final)


def mark_best(path: str | Path, metric: str, value: float | None) -> None:
    """Record that a checkpoint is the best so far, which keeps it from rotation; the former best loses that.

    Only warns when the disk refuses, since the checkpoint itself is safe; then the former best stays marked.
    """
    path = Path(path)
    try:
        fault("save-best")
        write_json(path.parent / BEST, {"folder": path.name, "metric": metric, "value": value})
    except OSError as error:
        say(f"Warning: {path} could not be marked best: {error.strerror}")


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


def _by_age(root: Path) -> list[tuple[int, int, Path]]:
    """(sequence, step, folder), newest first; a folder without a readable manifest comes first, to be reported."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        match = FOLDER_NAME.fullmatch(path.name)
        if match and path.is_dir():
            try:
                sequence = read_manifest(path).sequence
            except UserError:
                sequence = sys.maxsize
            found.append((sequence, int(match[1]), path))
    return sorted(found, key=lambda item: item[:2], reverse=True)


def _rotate(root: Path, newest: Path, keep_last: int) -> None:
    """Delete what is neither the newest (verified a moment ago), nor the best, nor among the last that look whole."""
    try:
        marked = best_checkpoint(root)
        kept = {newest} | ({marked.path} if marked else set())
        paths = [path for _, _, path in _by_age(root)]
        whole = [path for path in paths if looks_whole(path) and not path.name.endswith(REPLACED_SUFFIX)]
        kept.update(whole[:keep_last])
        for path in paths:
            if path not in kept and not path.is_symlink():
                fault("rotate")
                _remove(path)
    except (OSError, UserError) as error:  # the new checkpoint is safe, only the space is not freed
        say(f"Warning: old checkpoints in {root} were not removed: {error}")


def _remove(folder: Path) -> None:
    """Delete a folder so that a kill half way leaves a hidden remnant and not a torn checkpoint."""
    hidden = folder.with_name(f"{_HIDDEN}removed-{folder.name}")
    folder.rename(hidden)
    shutil.rmtree(hidden)


def newest_good(root: str | Path) -> tuple[Path | None, Skipped]:
    """The checkpoint saved last among those that verify, and the newer ones that had to be skipped with their problems.

    (None, []) when there is no checkpoint at all. The caller says what it fell back from: see describe_skipped.
    """
    skipped: Skipped = []
    for _, _, path in _by_age(Path(root)):
        problems = verify(path)
        if not problems:
            return path, skipped
        skipped.append((path, problems))
    return None, skipped


def describe_skipped(skipped: Skipped) -> str:
    """One line for a person about checkpoints that are damaged."""
    return "; ".join(f"{path} is damaged ({', '.join(problems)})" for path, problems in skipped)


def load(path: str | Path, names: Collection[str] | None = None) -> Loaded:
    """Verify a checkpoint folder and read it; ``names`` restricts verifying and reading to those tensor dictionaries.

    Raises UserError that names the damaged file, or the name that is not in the checkpoint.
    """
    folder = Path(path)
    problems = verify(folder, names)
    if problems:
        raise UserError(f"Checkpoint {folder} is damaged, use an earlier one: {'; '.join(problems)}.")
    manifest = read_manifest(folder)
    present = [name.removesuffix(TENSORS_SUFFIX) for name in manifest.files if name.endswith(TENSORS_SUFFIX)]
    missing = sorted(set(names or ()) - set(present))
    if missing:
        raise UserError(f"Checkpoint {folder} holds no {', '.join(missing)}; it holds {', '.join(present)}.")
    wanted = [name for name in present if names is None or name in names]
    return Loaded(
        path=folder,
        step=manifest.step,
        tensors={name: read_tensors(folder / f"{name}{TENSORS_SUFFIX}") for name in wanted},
        state=read_json(folder / STATE),
        files={
            name: (folder / name).read_bytes()
            for name in manifest.files
            if name != STATE and not name.endswith(TENSORS_SUFFIX)
        },
    )


def resolve(path: str | Path, which: str = "newest") -> Path:
    """The checkpoint folder that a person means by a checkpoint, a checkpoints root, or a run folder.

    A checkpoint folder is taken as it is (``load`` verifies it); otherwise ``which`` picks the ``newest`` good one, and
    says so when newer ones are damaged, or the ``best``. Raises UserError when there is none.
    """
    if which not in ("newest", "best"):
        raise ValueError(f"which must be newest or best, not {which!r}")
    if not str(path):  # Path("") would be the folder that happens to be the current one
        raise UserError("No checkpoint is named: give a run folder or one of its checkpoints, such as init_from=RUN.")
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is no folder: give a run folder or one of its checkpoints.")
    if (path / MANIFEST).exists() or FOLDER_NAME.fullmatch(path.name):
        return path
    inner = RunFolder(path).checkpoints
    root = inner if inner.is_dir() else path
    if which == "best":
        marked = best_checkpoint(root)
        if marked is None:
            raise UserError(f"No checkpoint in {root} is marked best; take the newest instead.")
        return marked.path
    found, skipped = newest_good(root)
    if found is None:
        reason = f": {describe_skipped(skipped)}" if skipped else ""
        raise UserError(f"There is no {'good ' if skipped else ''}checkpoint in {root}{reason}.")
    if skipped:
        say(f"Warning: falling back to {found}: {describe_skipped(skipped)}")
    return found
