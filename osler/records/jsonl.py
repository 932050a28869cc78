"""Files of JSON lines: one object per line, which is on the disk whole or not at all.

A kill can tear the last line only, so a reader passes over what is not an object, and a writer that goes on ends or removes the
torn line first. A binary file ends its lines at the newline byte alone, as JSON does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from itertools import compress
from pathlib import Path
from typing import Any

from osler.runtime.errors import UserError
from osler.runtime.files import write_atomic


def parse(line: bytes) -> dict[str, Any] | None:
    """Return the object on a line, None when there is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def step_of(fields: Mapping[str, Any] | None) -> int | None:
    """Return the step that an object names, None when it names none."""
    step = fields.get("step") if fields else None
    if type(step) is float and step.is_integer() and abs(step) < 2**53:
        step = int(step)
    return step if type(step) is int and abs(step) < 2**53 else None


def read_lines(path: Path) -> Iterator[bytes]:
    """Return the lines of a file one by one, with their newlines; none when there is no file.

    Raises UserError when the file is there and cannot be read.
    """
    try:
        with path.open("rb") as file:
            yield from file
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error


def read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the objects of a file, and how many lines before the last hold none; raises UserError as ``read_lines`` does."""
    found = [parse(line) for line in read_lines(path) if line.strip()]
    return [fields for fields in found if fields is not None], found[:-1].count(None)


def to_line(fields: Mapping[str, Any]) -> str:
    """Return an object as a line; raises ValueError on a number that is not finite, which JSON does not have."""
    return json.dumps(fields, ensure_ascii=False, allow_nan=False) + "\n"


def append(path: Path, fields: Mapping[str, Any]) -> None:
    """Append an object as one whole line, after ending a torn one; raises OSError when the disk refuses it."""
    text = to_line(fields)
    with path.open("ab+") as file:
        if file.tell() and file.seek(-1, 2) and file.read(1) != b"\n":
            text = "\n" + text
        file.write(text.encode("utf-8", "backslashreplace"))  # a name that is not UTF-8 is written escaped, as JSON would


def heal(path: Path, last_step: float = math.inf) -> None:
    """Take out of a file the lines that are torn, name no step, or are of a later one; leave a good file untouched.

    The file is read line by line: it may be larger than what the machine has left beside a model. Raises UserError when it cannot
    be read, OSError when it cannot be written.
    """
    is_whole, is_kept = True, bytearray()
    for line in read_lines(path):
        is_whole = line.endswith(b"\n")
        step = step_of(parse(line))
        is_kept.append(step is not None and step <= last_step)
    if not is_whole or not all(is_kept):
        write_atomic(path, (line if line.endswith(b"\n") else line + b"\n" for line in compress(read_lines(path), is_kept)))


def split(path: Path, last_step: int) -> tuple[list[bytes], list[bytes]]:
    """Return the lines of a file up to a step, and those of later ones; a line that is torn is among the first."""
    kept: list[bytes] = []
    later: list[bytes] = []
    for line in read_lines(path):
        step = step_of(parse(line))
        (kept if step is None or step <= last_step else later).append(line)
    return kept, later
