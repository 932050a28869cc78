"""Find the files at a path that can be read, and log what else is there.

The ending of a name tells the kind of a file, in upper or lower case, with or without the ending of a compression behind it. A
folder is searched with all its subfolders. Links to folders are followed, but each folder is read once, so circles end.
"""

from __future__ import annotations

import logging
import os
import stat
from collections import Counter, deque
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from osler.runtime.errors import UserError

logger = logging.getLogger(__name__)

PARQUET_ENDING = ".parquet"
ROW_ENDINGS = (PARQUET_ENDING, ".jsonl", ".ndjson")
TEXT_ENDINGS = (".txt", ".md")
# A file that is named itself is read as JSON lines. In a folder it is more often a description of the files than one of them.
NAMED_ONLY_ENDING = ".json"
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
NAMES_SHOWN = 3  # of folders that cannot be opened


def find_files(path: str | Path, endings: Sequence[str], *, key: str) -> list[Path]:
    """Return the files at `path` with one of these `endings`, sorted, and log what is left out ("3 .json, 1 .csv").

    Raises UserError, which names the config key of the path, when there is none.
    """
    if not str(path):  # Path("") would be the current folder
        raise UserError(f"{key} is empty: name a file or a folder, such as {key}=MY_TEXTS.")
    path = Path(path)
    mode = _mode(path)
    packed = [kind + compression for kind in endings if kind != PARQUET_ENDING for compression in COMPRESSIONS]
    readable = f"{', '.join(endings)}, or compressed {', '.join(packed)}"
    if stat.S_ISREG(mode):
        if ending(path) not in (*endings, NAMED_ONLY_ENDING):
            raise UserError(f"{shown(path)} is of a kind that cannot be read here; give a file that ends in {readable}.")
        return [path]
    if not stat.S_ISDIR(mode):
        raise UserError(f"There is no file or folder {shown(path)}; set {key} to one that exists.")
    files, left_out = _walk(path, endings)
    if not files:
        reason = f"left out: {left_out}" if left_out else "it is empty"
        raise UserError(f"The folder {shown(path)} holds no file that can be read ({reason}). Readable files end in {readable}.")
    if left_out:
        log_once(f"{shown(path)}: left out: {left_out}.")
    return files


@cache
def log_once(text: str) -> None:
    """Log what this process has not logged before: files are read several times, and one line about them is enough."""
    logger.info(text)


def ending(file: Path) -> str:
    """Return the ending that tells the kind of a file, without that of a compression; parquet files compress inside."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if len(suffixes) > 1 and suffixes[-1] in COMPRESSIONS and suffixes[-2] != PARQUET_ENDING:
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


def shown(name: str | Path) -> str:
    """Return a name that can be printed anywhere: bytes that are not UTF-8 and control characters are escaped."""
    name = str(name)
    return name if name.isprintable() else repr(name)[1:-1]


def _walk(root: Path, endings: Sequence[str]) -> tuple[list[Path], str]:
    """Return the files in a folder, and in words what is left out; first real folders are searched, then linked ones."""
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
                others[_kind(path, mode)] += 1
    left_out = [f"{count:,} {what}" for what, count in others.most_common()]
    if unopened:
        more = ", ..." if len(unopened) > NAMES_SHOWN else ""
        left_out.append(f"{len(unopened):,} that cannot be opened: {', '.join(unopened[:NAMES_SHOWN])}{more}")
    return sorted(files, key=lambda file: file.relative_to(root).as_posix()), ", ".join(left_out)


def _mode(path: Path) -> int:
    """Return the mode of what is at `path`; 0 where nothing is or can be (a NUL in the name, a link in a circle)."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return 0


def _kind(path: Path, mode: int) -> str:
    """Return what a person calls the kind of a file that is left out."""
    if not stat.S_ISREG(mode):
        return "linked nowhere" if path.is_symlink() else "neither file nor folder"
    is_packed = len(path.suffixes) > 1 and path.suffix.lower() in COMPRESSIONS
    return shown("".join(path.suffixes[-2:] if is_packed else path.suffixes[-1:]).lower()) or "without an ending"
