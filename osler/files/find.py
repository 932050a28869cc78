"""Which files at a path can be read, and what lies beside them that cannot: nothing is left out in silence.

The ending of a name tells the kind, whatever its case, with a compression's ending behind it or not. A folder is walked
with every folder below it. Links to folders are followed, and each folder is read once, so a link into a circle ends.
"""

from __future__ import annotations

import os
import stat
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from osler.errors import UserError

PARQUET_ENDING = ".parquet"
ROW_ENDINGS = (PARQUET_ENDING, ".jsonl", ".ndjson")
TEXT_ENDINGS = (".txt", ".md")
# Read as JSON lines when it is named itself. Beside other files it is more often a description of them than a part.
NAMED_ONLY_ENDING = ".json"
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
NAMES_SHOWN = 3  # of folders that cannot be opened


@dataclass(frozen=True)
class Found:
    """The files to read, sorted, and in words what is left out ("3 .json, 1 .csv"; empty: nothing is)."""

    files: list[Path]
    left_out: str = ""


def find_files(path: str | Path, endings: Sequence[str], *, key: str) -> Found:
    """Find the files at `path` with one of these `endings`. Raises UserError, naming `key`, when there is none."""
    if not str(path):  # Path("") would be the folder that happens to be the current one
        raise UserError(f"{key} is empty: name a file or a folder, such as {key}=MY_TEXTS.")
    path = Path(path)
    mode = _mode(path)
    if stat.S_ISREG(mode):
        if ending(path) not in (*endings, NAMED_ONLY_ENDING):
            raise UserError(f"{shown(path)} is of a kind that cannot be read here; give a file that ends in {listed(endings)}.")
        return Found([path])
    if not stat.S_ISDIR(mode):
        raise UserError(f"There is no file or folder {shown(path)}; set {key} to one that is there.")
    found = _walk(path, endings)
    if not found.files:
        reason = f"left out: {found.left_out}" if found.left_out else "it is empty"
        raise UserError(f"The folder {shown(path)} holds no file that can be read ({reason}). Read are {listed(endings)}.")
    return found


def is_file(path: Path) -> bool:
    """Whether there is a file at `path`, whatever the name: no name makes it raise."""
    return stat.S_ISREG(_mode(path))


def ending(file: Path) -> str:
    """The ending that tells the kind of a file, below a compression's ending; parquet compresses inside."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if len(suffixes) > 1 and suffixes[-1] in COMPRESSIONS and suffixes[-2] != PARQUET_ENDING:
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


def listed(endings: Sequence[str]) -> str:
    """The endings as a person reads them, each with its compressions."""
    packed = [f"{ending}{compression}" for ending in endings if ending != PARQUET_ENDING for compression in COMPRESSIONS]
    return f"{', '.join(endings)}, or compressed {', '.join(packed)}"


def shown(name: str | Path) -> str:
    """A name as every terminal and file can hold it: bytes that are not UTF-8 and control characters are escaped."""
    name = str(name)
    return name if name.isprintable() else repr(name)[1:-1]


def _walk(root: Path, endings: Sequence[str]) -> Found:
    """Walk through a folder: first through all that really is in it, then through what links lead to."""
    files: list[Path] = []
    others: Counter[str] = Counter()
    unopened: list[str] = []
    seen: set[tuple[int, int]] = set()
    folders, links = [root], deque[Path]()
    while folders or links:
        folder = folders.pop() if folders else links.popleft()
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                others["linked twice"] += 1
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            unopened.append(f"{shown(folder)} ({error.strerror})")
            continue
        for entry in entries:
            path = Path(entry.path)
            mode = stat.S_IFDIR if entry.is_dir(follow_symlinks=False) else _mode(path)
            if entry.name.startswith("."):
                others["hidden"] += 1
            elif stat.S_ISDIR(mode):
                (links if entry.is_symlink() else folders).append(path)
            elif stat.S_ISREG(mode) and ending(path) in endings:
                files.append(path)
            else:
                others[_label(path, mode)] += 1
    left_out = [f"{count:,} {what}" for what, count in others.most_common()]
    if unopened:
        more = ", ..." if len(unopened) > NAMES_SHOWN else ""
        left_out.append(f"{len(unopened):,} that cannot be opened: {', '.join(unopened[:NAMES_SHOWN])}{more}")
    return Found(sorted(files, key=lambda file: file.relative_to(root).as_posix()), ", ".join(left_out))


def _mode(path: Path) -> int:
    """The mode of what is at `path`; 0 when nothing is, or nothing can be: a NUL in the name, a link in a circle."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return 0


def _label(path: Path, mode: int) -> str:
    """What a person calls a kind of file that is left out."""
    if not stat.S_ISREG(mode):
        return "linked nowhere" if path.is_symlink() else "neither file nor folder"
    packed = len(path.suffixes) > 1 and path.suffix.lower() in COMPRESSIONS
    return shown("".join(path.suffixes[-2:] if packed else path.suffixes[-1:]).lower()) or "without an ending"
