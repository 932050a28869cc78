"""The manifest of a checkpoint folder: which files belong to it, their sizes and hashes, and a hash of itself.

It is written last, so a folder with a valid manifest was whole once; verifying tells whether it still is. ``sequence``
counts the saves into one checkpoints root: the newest checkpoint is the one saved last, which after going back to an
earlier step is not the one with the highest step.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osler.errors import UserError
from osler.runtime.files import canonical_json, no_pause, read_json, sha256_file, write_json

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
TENSORS_SUFFIX = ".safetensors"
# A folder is set aside under the second name while another takes its place; until then it is a full checkpoint.
REPLACED_SUFFIX = ".replaced"
FOLDER_NAME = re.compile(r"step-(\d{9,})(\.replaced)?")

Signature = tuple[object, ...]
_verdicts: dict[Path, tuple[Signature, list[str]]] = {}  # of checkpoints that this process has read: their files then, problems

_HEX_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileRecord:
    """What a file must look like."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``."""

    step: int
    sequence: int
    files: dict[str, FileRecord]
    milestone: bool = False  # rotation keeps it for good


def folder_name(step: int) -> str:
    """``step-000000123``: sorts by step as text."""
    return f"step-{step:09d}"


def padded(path: Path) -> Path:
    """Return the checkpoint folder that a person means, who may leave out the zeros of its name."""
    match = re.fullmatch(r"step-(\d+)", path.name)
    return path.with_name(folder_name(int(match[1]))) if match and not path.is_dir() else path


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` into the folder, durably, with a hash of its own content."""
    files = {name: {"bytes": record.size_bytes, "sha256": record.sha256} for name, record in manifest.files.items()}
    content = {
        "format": FORMAT,
        "step": manifest.step,
        "sequence": manifest.sequence,
        "milestone": manifest.milestone,
        "files": files,
    }
    write_json(folder / MANIFEST, {**content, "sha256": _content_hash(content)})


def read_manifest(folder: Path) -> Manifest:
    """Read ``manifest.json``; raises UserError when it is missing, torn, changed, or of a format not known here."""
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
        return Manifest(int(content["step"]), int(content["sequence"]), files, content.get("milestone") is True)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a checkpoint manifest.") from error


def _content_hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(content)).hexdigest()


def verify(path: str | Path, names: Collection[str] | None = None, *, pause: Callable[[], None] = no_pause) -> list[str]:
    """What is wrong with a checkpoint folder, one line per problem that names the file; empty when it is good.

    ``names`` restricts the hashing to the tensors of those names; every file is checked for presence and size all the
    same. Files that the manifest does not list are a problem (nothing would read them, so why are they there?), except
    hidden ones, which file managers and network disks leave behind. ``pause`` is called after each block that was hashed.
    """
    folder = Path(path)
    signature = _signature(folder)
    problems, manifest = _check_names_and_sizes(folder)
    was_read = True
    reported = {name for name, _ in problems}
    for name, record in manifest.files.items() if manifest else ():
        unwanted = names is not None and name.endswith(TENSORS_SUFFIX) and name[: -len(TENSORS_SUFFIX)] not in names
        if name in reported or unwanted:
            continue
        try:
            if sha256_file(folder / name, pause) != record.sha256:
                problems.append((name, "its content changed since it was saved (SHA-256 differs)"))
        except OSError as error:
            was_read = False
            problems.append((name, f"cannot be read ({error.strerror})"))
    found = [f"{name}: {text}" for name, text in problems]
    if names is None and signature and was_read:  # what could not be read may be read later
        _verdicts[folder.absolute()] = (signature, found)
    return found


def verdict(folder: Path) -> list[str] | None:
    """What ``verify`` has found in this process.

    None when it was not asked, when it could not read a file, or when somebody has touched the folder since.
    """
    signature, found = _verdicts.get(folder.absolute(), (None, None))
    return found if signature == _signature(folder) else None


def _signature(folder: Path) -> Signature | None:
    """What tells, without reading them, that files were touched; None when they cannot be looked at."""
    try:
        stats = {entry.name: entry.stat() for entry in os.scandir(folder)}
        files = sorted((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats.items())
        return (folder.stat().st_mtime_ns, *files)
    except OSError:
        return None


def looks_whole(folder: Path) -> bool:
    """Whether manifest, names and sizes agree: what can be told without reading the tensors."""
    return not _check_names_and_sizes(folder)[0]


def _check_names_and_sizes(folder: Path) -> tuple[list[tuple[str, str]], Manifest | None]:
    """(file, what is wrong with it) pairs, and the manifest if there is a readable one."""
    if not folder.is_dir():
        return [(folder.name, "no such folder")], None
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        return [(MANIFEST, str(error))], None
    problems = []
    match = FOLDER_NAME.fullmatch(folder.name)
    if match and int(match[1]) != manifest.step:
        problems.append((MANIFEST, f"it belongs to step {manifest.step}, not to this folder"))
    for name, record in manifest.files.items():
        try:
            size = (folder / name).stat().st_size
        except FileNotFoundError:
            problems.append((name, "missing"))
        except OSError as error:
            problems.append((name, f"cannot be read ({error.strerror})"))
        else:
            if size != record.size_bytes:
                problems.append((name, f"{size} bytes instead of {record.size_bytes}"))
    expected = {*manifest.files, MANIFEST}
    extra = sorted(entry.name for entry in folder.iterdir() if entry.name not in expected)
    problems += [(name, "not listed in the manifest, remove it") for name in extra if not name.startswith(".")]
    return problems, manifest
