"""Saves and loads checkpoints that survive a kill at any moment: a checkpoint is complete or absent, and verified.

``root/step-000000123/`` holds one ``<name>.safetensors`` per tensor dictionary, ``state.json``, further files as bytes, and
``manifest.json``. A save writes all of it into a hidden folder, flushes every file, writes the manifest last, renames the folder
and flushes the root; then it reads everything back. Nothing is pickled. Contents come back bit for bit. One
process saves into a root at a time.

A file of tensors (https://huggingface.co/docs/safetensors) is eight bytes with the length of the header, a JSON header, then the
raw bytes. The library reads it, but its ``save_file`` would not do: a checkpoint needs a hash of the tensors and not of the bytes
read back, takes only one tensor at a time off the device, and must end in an ordinary OSError when the disk is full.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from osler.checkpoint import folders
from osler.checkpoint.folders import STATE, TENSORS_SUFFIX, FileRecord, Manifest
from osler.runtime.errors import UserError
from osler.runtime.faults import fault
from osler.runtime.files import fsync_dir, no_pause, open_durable, read_json

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
}  # fmt: skip
_BLOCK_BYTES = 16 << 20


class CheckpointSaveError(RuntimeError):
    """A checkpoint could not be saved; earlier ones are untouched, so a run may warn and continue."""


@dataclass(frozen=True)
class Loaded:
    """The content of one checkpoint; tensors are on the CPU."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    files: dict[str, bytes]


def save(
    root: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
    milestone: bool = False,
    pause: Callable[[], None] = no_pause,
) -> Path:
    """Save a checkpoint, verify it and return its folder.

    ``tensors`` maps names of files to named tensors. ``state`` must be JSON with string keys. Rotation never deletes a
    ``milestone``. A checkpoint of the same step is replaced; the old one stays until the new one is complete on the disk.
    ``pause`` is called after each block that was written or read back. When the disk is full or fails, the half-written folder is
    removed, older checkpoints stay, and CheckpointSaveError is raised.
    """
    contents = {STATE: json.dumps(state, indent=1).encode("utf-8"), **(files or {})}
    final = root / folders.folder_name(step)
    temporary = root / f"{folders.HIDDEN}{final.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _tidy(root)
        sequence = 1 + max((entry.sequence for entry in folders.by_age(root) if entry.sequence < sys.maxsize), default=0)
        temporary.mkdir()
        _write_folder(temporary, tensors, contents, Manifest(step, sequence, {}, milestone), pause)
        if final.exists():
            aside = final.with_name(final.name + folders.REPLACED_SUFFIX)
            if aside.exists() and folders.verify(final, pause=pause):  # a kill interrupted a replacement: keep the good one
                folders.remove(final)
            else:
                folders.remove(aside)
                final.rename(aside)
        fault("save-rename")
        temporary.rename(final)
        fsync_dir(root)
        fault("save-verify")
        problems = folders.verify(final, pause=pause)
        if problems:
            folders.remove(final)
            raise OSError(errno.EIO, f"it does not read back ({'; '.join(problems)})")
    except OSError as error:
        with suppress(OSError):
            _tidy(root)
        raise CheckpointSaveError(f"Checkpoint {final} could not be saved: {error.strerror or error}.") from error
    return final


def _write_folder(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    contents: Mapping[str, bytes],
    manifest: Manifest,
    pause: Callable[[], None],
) -> None:
    records = {}
    for part, named in tensors.items():
        records[f"{part}{TENSORS_SUFFIX}"] = write_tensors(folder / f"{part}{TENSORS_SUFFIX}", named, pause)
    for name, data in contents.items():
        with open_durable(folder / name) as file:
            file.write(data[: len(data) // 2])
            fault("save-state" if name == STATE else "save-files")
            file.write(data[len(data) // 2 :])
        records[name] = FileRecord(len(data), hashlib.sha256(data).hexdigest())
    fault("save-manifest")
    replace(manifest, files=records).write(folder)
    fsync_dir(folder)


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    pause: Callable[[], None] = no_pause,
    metadata: Mapping[str, str] | None = None,
) -> FileRecord:
    """Write one safetensors file, durably and block by block, and hash it on the way; ``metadata`` goes into its header."""
    size, digest = 0, hashlib.sha256()
    with open_durable(path) as file:
        for block in _blocks(tensors, {"format": "pt", **(metadata or {})}):
            file.write(block)
            digest.update(block)
            size += len(block)
            pause()
    return FileRecord(size, digest.hexdigest())


def _blocks(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """Yield the header and then the tensors; memory that several names share is written for each of them.

    Raises TypeError for a tensor that is sparse or of a dtype without a name in the format.
    """
    # Wide types come first, so that every tensor is aligned to the size of its elements without gaps.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, tensor in ordered:
        if tensor.layout != torch.strided or tensor.dtype not in DTYPE_NAMES:
            raise TypeError(f"Tensor {name!r} ({tensor.dtype}, {tensor.layout}) has no safetensors form.")
        end = start + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    header = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little") + header
    fault("save-tensors")
    for _, tensor in ordered:
        view = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(view), _BLOCK_BYTES):
            yield view[start : start + _BLOCK_BYTES]


def _tidy(root: Path) -> None:
    """Delete the remnants of killed saves and deletions. Give a set-aside checkpoint its name back if the name is free."""
    for path in root.glob(f"{folders.HIDDEN}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)  # a remnant that another process is reading does no harm
    for path in root.glob(f".{folders.BEST}.*.tmp"):
        with suppress(OSError):  # a save need not fail because a leftover cannot be deleted
            path.unlink()
    for aside in root.glob(f"*{folders.REPLACED_SUFFIX}"):
        final = aside.with_name(aside.name.removesuffix(folders.REPLACED_SUFFIX))
        if folders.FOLDER_NAME.fullmatch(aside.name) and not final.exists():
            aside.rename(final)


def load(path: str | Path, names: Collection[str] | None = None) -> Loaded:
    """Verify a checkpoint folder and read it; ``names`` restricts both to the tensor dictionaries of these names.

    Raises UserError with the names of damaged files.
    """
    folder = Path(path)
    problems = folders.verify(folder, names)
    if problems:
        raise UserError(f"Checkpoint {folder} is damaged, use an earlier one: {'; '.join(problems)}.")
    manifest = Manifest.read(folder)
    present = [name for name in manifest.files if name.endswith(TENSORS_SUFFIX)]
    others = [name for name in manifest.files if name not in (STATE, *present)]
    tensors = {}
    for name in present:
        part = name.removesuffix(TENSORS_SUFFIX)
        if names is None or part in names:
            tensors[part] = read_tensors(folder / name)
    return Loaded(
        path=folder,
        step=manifest.step,
        tensors=tensors,
        state=read_json(folder / STATE),
        files={name: (folder / name).read_bytes() for name in others},
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; raises UserError when it is torn or no such file."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}.") from error


def resolve(path: str | Path, which: str = "newest") -> Path:
    """Return the checkpoint folder that a path means: a checkpoint, a checkpoints folder, or a run folder.

    A checkpoint is taken as it is (``load`` verifies it). Otherwise ``which`` picks the ``newest`` good one, with a warning when
    newer ones are damaged, or the ``best``. Raises UserError when there is none, or for another word.
    """
    if not str(path):  # Path("") would be the current folder
        raise UserError("No checkpoint is named: give a run folder or one of its checkpoints, such as init_from=RUN.")
    if which not in ("newest", "best"):
        raise UserError(f"Which checkpoint is {which!r}? Say newest or best, or give the folder of one.")
    path = Path(path)
    root = folders.root_of(path)
    if folders.is_checkpoint(path):
        return path
    if which == "best":
        marked = folders.best_checkpoint(root)
        if marked is None:
            raise UserError(f"No checkpoint in {root} is marked best; take the newest instead.")
        return marked.path
    found = folders.newest_checkpoint(root)
    if found is None:
        raise UserError(f"There is no checkpoint in {root.resolve()}.")
    return found
