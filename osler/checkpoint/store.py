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
import logging
import shutil
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
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
    padded,
    read_manifest,
    verify,
    write_manifest,
)
from osler.checkpoint.root import (
    BEST,
    HIDDEN,
    OnDamage,
    best_checkpoint,
    by_age,
    describe_skipped,
    ignore_damage,
    mark_best,
    newest_good,
    remove,
    root_of,
    rotate,
)
from osler.checkpoint.tensors import read_tensors, write_tensors
from osler.errors import UserError
from osler.runtime.faults import fault
from osler.runtime.files import fsync_dir, no_pause, open_durable, read_json

logger = logging.getLogger(__name__)


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


def save(
    root: str | Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
    keep_last: int = 2,
    milestone: bool = False,
    good_step: int | None = None,
    best: bool = False,
    best_metric: str = "",
    best_value: float | None = None,
    pause: Callable[[], None] = no_pause,
    on_damage: OnDamage = ignore_damage,
) -> Path:
    """Save a checkpoint, verify it, then delete all but the last ``keep_last``, the best and the milestones; returns its folder.

    ``tensors`` maps a file's name to its tensors; ``state`` must be JSON with string keys. A ``milestone`` is kept for good, and
    the newest up to ``good_step`` as long as no other is named. A checkpoint of the same step is replaced, and stays until the
    new one is whole on the disk. Raises CheckpointSaveError when the disk is full or fails; the half-written folder is then
    removed and the older checkpoints stay. ``pause`` is called after each block that was written or read
    back, ``on_damage`` for an older checkpoint that proves to be damaged.
    """
    root = Path(root)
    if keep_last < 1 or step < 0:
        raise ValueError(f"keep_last must be at least 1 and step at least 0, not {keep_last} and {step}")
    contents = _contents(tensors, state, files or {})
    final = root / folder_name(step)
    temporary = root / f"{HIDDEN}{final.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _tidy(root)
        sequence = 1 + max((entry.sequence for entry in by_age(root) if entry.sequence < sys.maxsize), default=0)
        temporary.mkdir()
        _write_folder(temporary, tensors, contents, Manifest(step, sequence, {}, milestone), pause)
        _set_aside(final)
        fault("save-rename")
        temporary.rename(final)
        fsync_dir(root)
        fault("save-verify")
        problems = verify(final, pause=pause)
        if problems:
            remove(final)
            raise OSError(errno.EIO, f"it does not read back ({'; '.join(problems)})")
    except OSError as error:
        with contextlib.suppress(OSError):
            _tidy(root)
        raise CheckpointSaveError(f"Checkpoint {final} could not be saved: {error.strerror or error}.") from error
    if best:
        mark_best(final, best_metric, best_value)
    rotate(root, final, keep_last, good_step, pause=pause, on_damage=on_damage)
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
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    contents: Mapping[str, bytes],
    manifest: Manifest,
    pause: Callable[[], None],
) -> None:
    records = {}
    for name, named in tensors.items():
        filename = f"{name}{TENSORS_SUFFIX}"
        records[filename] = FileRecord(*write_tensors(folder / filename, named, pause))
    for name, data in contents.items():
        with open_durable(folder / name) as file:
            file.write(data[: len(data) // 2])
            fault("save-state" if name == STATE else "save-files")
            file.write(data[len(data) // 2 :])
        records[name] = FileRecord(len(data), hashlib.sha256(data).hexdigest())
    fault("save-manifest")
    write_manifest(folder, replace(manifest, files=records))
    fsync_dir(folder)


def _set_aside(final: Path) -> None:
    """Free the name ``final`` while the checkpoint that has it stays findable under another one."""
    aside = final.with_name(final.name + REPLACED_SUFFIX)
    if not final.exists():
        return
    if aside.exists():  # an earlier replacement was killed half way: keep whichever of the two is good
        if verify(final):
            remove(final)
            return
        remove(aside)
    final.rename(aside)


def _tidy(root: Path) -> None:
    """Delete what killed saves and deletions left, and give a set-aside checkpoint its name back if that is free."""
    for path in root.glob(f"{HIDDEN}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)  # what cannot go, as while another looks at it, is in nobody's way
    for path in root.glob(f".{BEST}.*.tmp"):
        with contextlib.suppress(OSError):
            path.unlink()
    for aside in root.glob(f"*{REPLACED_SUFFIX}"):
        final = aside.with_name(aside.name.removesuffix(REPLACED_SUFFIX))
        if FOLDER_NAME.fullmatch(aside.name) and not final.exists():
            aside.rename(final)


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
            name: (folder / name).read_bytes() for name in manifest.files if name != STATE and not name.endswith(TENSORS_SUFFIX)
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
    path, root = padded(Path(path)), root_of(path)
    if (path / MANIFEST).exists() or FOLDER_NAME.fullmatch(path.name):
        return path
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
        logger.warning(f"falling back to {found}: {describe_skipped(skipped)}")
    return found
