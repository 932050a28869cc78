"""Rows of a local exam, with their schema checked as they are read.

An error names the file, the line and the field, so a file in another schema is refused and never gives a smaller exam.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from osler.config.schema import PositiveInt, config
from osler.files.find import ROW_ENDINGS, find_files, shown
from osler.files.read import Row, read_rows
from osler.runtime.errors import UserError

_NAMES = {str: "text", int: "a whole number", dict: "an object", list: "a list"}


@config
class ExamFile:
    """An exam in a file of a person's."""

    type: str  # of exam
    path: str  # a .parquet, .jsonl or .ndjson file (also .jsonl.gz and the like), or a folder of them
    split: str = ""  # a name for the file in tables and metrics
    limit: PositiveInt | None = None  # the first so many questions; null: all


def exam_rows(path: str | Path) -> Iterator[Row]:
    """Yield the rows of a file of JSON lines or parquet, or of a folder of them; raises UserError when there is none."""
    is_empty = True
    for file in find_files(path, ROW_ENDINGS, key="task.path"):
        for row in read_rows(file):
            is_empty = False
            yield row
    if is_empty:
        raise UserError(f"{shown(path)} has no rows.")


def field(row: Row, name: str, kind: type, schema: str) -> Any:
    """Return the value of a field (dots go into objects); raises UserError when it is missing or not a ``kind``."""
    value: Any = row.values
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            here = ", ".join(sorted(value)) if isinstance(value, Mapping) else f"{reprlib.repr(value):.60}"
            raise UserError(
                f"{row.where}: the field '{name}' is missing (found: {here}). Expected the schema of {schema}; the files of "
                "another exam are read with another task.type."
            )
        value = value[part]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(
            f"{row.where}: the field '{name}' must be {_NAMES[kind]}, not {reprlib.repr(value):.60}. Expected the schema of "
            f"{schema}."
        )
    return value


def text(row: Row, name: str, schema: str) -> str:
    """Return a text field; raises UserError when it is missing or blank."""
    value: str = field(row, name, str, schema)
    if not value.strip():
        raise UserError(f"{row.where}: the field '{name}' is empty. Remove the row or fill it in.")
    return value.strip()
