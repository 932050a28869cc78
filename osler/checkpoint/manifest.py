"""The manifest of a checkpoint folder: the files that belong to it, their sizes and hashes, and a hash of the manifest itself.

It is written last, so a folder with a valid manifest was complete once; ``verify`` tells whether it still is. ``sequence`` counts
the saves into one checkpoints folder: the newest checkpoint is the one saved last, which after going back to an earlier step is
not the one with the highest step.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osler.runtime.errors import UserError
from osler.runtime.files import canonical_json, no_pause, read_json, sha256_file, write_json

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
TENSORS_SUFFIX = ".safetensors"
# A checkpoint has the second name while another of its step takes its place; it is a full checkpoint until then.
REPLACED_SUFFIX = ".replaced"
FOLDER_NAME = re.compile(r"step-(\d{9,})(\.replaced)?")

_HEX_SHA256 = re.compile(r"[0-9a-f]{64}")

Signature = tuple[object, ...]
_known: dict[Path, tuple[Signature, list[str]]] = {}  # what this process found in a folder, and the signature it had then


@dataclass(frozen=True)
class FileRecord:
    """The size and hash that a file must have."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``."""

    step: int
    sequence: int
    files: dict[str, FileRecord]
    milestone: bool = False  # rotation never deletes it

    def write(self, folder: Path) -> None:
        """Write ``manifest.json`` into a folder, durably, with a hash of its own content."""
        content = {
            "format": FORMAT,
            "step": self.step,
            "sequence": self.sequence,
            "milestone": self.milestone,
            "files": {name: {"bytes": record.size_bytes, "sha256": record.sha256} for name, record in self.files.items()},
        }
        write_json(folder / MANIFEST, {**content, "sha256": _content_hash(content)})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read ``manifest.json``; raises UserError when it is missing, torn, changed, or of an unknown format."""
        path = folder / MANIFEST
        content = read_json(path)
        try:
            claimed = content.pop("sha256")
            if claimed != _content_hash(content):
                raise UserError(f"{path} was changed after it was written.")
            if content["format"] != FORMAT:
                raise UserError(f"{path} has format {content['format']}; this version of Osler reads format {FORMAT}.")
            files = {name: FileRecord(int(entry["bytes"]), entry["sha256"]) for name, entry in content["files"].items()}
            if any(Path(name).name != name or not _HEX_SHA256.fullmatch(record.sha256) for name, record in files.items()):
                raise UserError(f"{path} names a file outside its folder or a malformed hash.")
            return cls(int(content["step"]), int(content["sequence"]), files, content.get("milestone") is True)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not a checkpoint manifest.") from error


def folder_name(step: int) -> str:
    """Return ``step-000000123``, which sorts by step."""
    return f"step-{step:09d}"


def padded(path: Path) -> Path:
    """Return the checkpoint folder that a person means, who may leave out the zeros of its name."""
    match = re.fullmatch(r"step-(\d+)", path.name)
    return path.with_name(folder_name(int(match[1]))) if match and not path.is_dir() else path


def _content_hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(content)).hexdigest()


def verify(path: str | Path, names: Collection[str] | None = None, *, pause: Callable[[], None] = no_pause) -> list[str]:
    """Return what is wrong with a checkpoint folder, one line per file; an empty list means that it is good.

    ``names`` restricts the hashing to the tensors of those names; every file is checked for presence and size all the same. A
    file that the manifest does not list is a problem, because nothing would read it; hidden ones are not, because file managers
    and network disks leave them. ``pause`` is called after each block that was hashed.
    """
    folder = Path(path)
    signature = _signature(folder)
    problems, manifest = _check_names_and_sizes(folder)
    is_readable = True
    for name, record in manifest.files.items() if manifest else ():
        is_unwanted = names is not None and name.endswith(TENSORS_SUFFIX) and name.removesuffix(TENSORS_SUFFIX) not in names
        if name in problems or is_unwanted:
            continue
        try:
            if sha256_file(folder / name, pause) != record.sha256:
                problems[name] = "its content changed since it was saved (SHA-256 differs)"
        except OSError as error:
            is_readable = False
            problems[name] = f"cannot be read ({error.strerror})"
    found = [f"{name}: {text}" for name, text in problems.items()]
    if names is None and signature and is_readable:  # what cannot be read may be readable later
        _known[folder.absolute()] = (signature, found)
    return found


def known_problems(folder: Path) -> list[str] | None:
    """Return what ``verify`` found in this process; None if it was not called, could not read a file, or the folder changed."""
    signature, found = _known.get(folder.absolute(), (None, None))
    return found if signature == _signature(folder) else None


def _signature(folder: Path) -> Signature | None:
    """Return what changes when a file is touched; None when the folder cannot be read."""
    try:
        stats = {entry.name: entry.stat() for entry in os.scandir(folder)}
        files = sorted((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats.items())
        return (folder.stat().st_mtime_ns, *files)
    except OSError:
        return None


def looks_whole(folder: Path) -> bool:
    """Return whether manifest, names and sizes agree, which is known without reading the tensors."""
    return not _check_names_and_sizes(folder)[0]


def _check_names_and_sizes(folder: Path) -> tuple[dict[str, str], Manifest | None]:
    """Return what is wrong, by file, and the manifest if it can be read."""
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
        except FileNotFoundError:
            problems[name] = "missing"
        except OSError as error:
            problems[name] = f"cannot be read ({error.strerror})"
        else:
            if size != record.size_bytes:
                problems[name] = f"{size} bytes instead of {record.size_bytes}"
    unlisted = {entry.name for entry in folder.iterdir()} - {*manifest.files, MANIFEST}
    return problems | {name: "not listed in the manifest, remove it" for name in sorted(unlisted) if name[0] != "."}, manifest
