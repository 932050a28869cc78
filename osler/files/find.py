"""Find the files that people have, by their endings, and names that can be printed."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from osler.runtime.errors import UserError

logger = logging.getLogger(__name__)

PARQUET_ENDING = ".parquet"
ROW_ENDINGS = (PARQUET_ENDING, ".jsonl", ".ndjson")
TEXT_ENDINGS = (".txt", ".md")
# A .json file is read, as JSON lines, only if the path names it. In a folder it more often describes the other files.
NAMED_ONLY_ENDING = ".json"
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
NAMES_SHOWN = 3  # the most folders that a message names because they cannot be opened


def find_files(path: str | Path, endings: Sequence[str], *, key: str) -> list[Path]:
    """Return the files at `path` with one of these `endings`, sorted, and log what is left out ("3 .json, 1 .csv").

    Capitals do not matter, and the ending of a compression may follow all but .parquet. A folder is searched with all its
    subfolders that are not hidden. Links to folders are followed, but each folder is read once, so circles end. A `path` to a
    file may also end in .json. Raises UserError when there is no such file; `key` is the config key of `path`, for messages.
    """
    if not str(path):  # Path("") would be the current folder
        raise UserError(f"{key} is empty: name a file or a folder, such as {key}=MY_TEXTS.")
    path = Path(path)
    packed = [kind + compression for kind in endings if kind != PARQUET_ENDING for compression in COMPRESSIONS]
    readable = f"{', '.join(endings)}, or compressed {', '.join(packed)}"
    if os.path.isfile(path):
        if ending(path) not in (*endings, NAMED_ONLY_ENDING):
            raise UserError(f"{shown(path)} is of a kind that cannot be read here; give a file that ends in {readable}.")
        return [path]
    if not os.path.isdir(path):
        raise UserError(f"There is no file or folder {shown(path)}; set {key} to one that exists.")
    files, left_out = _walk(path, endings)
    if not files:
        reason = f"left out: {left_out}" if left_out else "it is empty"
        raise UserError(f"The folder {shown(path)} holds no file that can be read ({reason}). Readable files end in {readable}.")
    if left_out:
        log_once(f"{shown(path)}: left out: {left_out}.")
    return files


@cache
def log_once(text: str, *, warn: bool = False) -> None:
    """Log a text that this process has not logged before. Files are read several times, and one line about them is enough."""
    logger.log(logging.WARNING if warn else logging.INFO, text)


def ending(name: str | Path) -> str:
    """Return the ending that tells the kind of a file: the one before .gz or .zst. Parquet compresses inside, so that stays."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    if len(suffixes) > 1 and suffixes[-1] in COMPRESSIONS and suffixes[-2] != PARQUET_ENDING:
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


def compression(name: str | Path) -> str | None:
    """Return how a file is compressed as a whole, by its ending; None where it is not."""
    return COMPRESSIONS.get(Path(name).suffix.lower())


def shown(name: str | Path) -> str:
    """Return a name that can be printed anywhere: bytes that are not UTF-8 and control characters are escaped."""
    name = str(name)
    return name if name.isprintable() else repr(name)[1:-1]


def _walk(root: Path, endings: Sequence[str]) -> tuple[list[Path], str]:
    """Return the files in a folder, and a text about what is left out. Real folders are searched first, then linked ones."""
    files: list[Path] = []
    others: Counter[str] = Counter()
    unopened: list[OSError] = []
    seen: set[tuple[int, int]] = set()
    starts = [root]
    for start in starts:  # the list grows by the links that are found
        for folder, folders, names in os.walk(start, onerror=unopened.append):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                others["linked twice"] += 1
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            others["hidden"] += sum(name.startswith(".") for name in (*folders, *names))
            folders[:] = [name for name in folders if not name.startswith(".")]
            starts += [Path(folder, name) for name in sorted(folders) if os.path.islink(os.path.join(folder, name))]
            for path in (Path(folder, name) for name in sorted(names) if not name.startswith(".")):
                if os.path.isfile(path) and ending(path) in endings:
                    files.append(path)
                else:
                    others[_kind(path)] += 1
    left_out = [f"{count:,} {what}" for what, count in others.most_common() if count]
    if unopened:
        shortened = [f"{shown(error.filename)} ({error.strerror})" for error in unopened[:NAMES_SHOWN]]
        more = ", ..." if len(unopened) > NAMES_SHOWN else ""
        left_out.append(f"{len(unopened):,} that cannot be opened: {', '.join(shortened)}{more}")
    return sorted(files, key=lambda file: file.relative_to(root).as_posix()), ", ".join(left_out)


def _kind(path: Path) -> str:
    """Return the name of the kind of a file that is left out."""
    if not os.path.isfile(path):
        return "linked nowhere" if path.is_symlink() else "neither file nor folder"
    is_packed = len(path.suffixes) > 1 and path.suffix.lower() in COMPRESSIONS
    return shown("".join(path.suffixes[-2:] if is_packed else path.suffixes[-1:]).lower()) or "without an ending"
