"""Rows of a local exam file with the schema checked as they are read.

Every row is checked, the first one before anything else happens; an error names the file, the line and the field, so a
file in another schema is refused at once instead of giving a silently smaller exam.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osler.errors import UserError
from osler.files import read
from osler.files.find import NAMED_ONLY_ENDING, ROW_ENDINGS, ending, is_file, listed, shown

_NAMES = {str: "text", int: "a whole number", dict: "an object", list: "a list"}


@dataclass(frozen=True)
class Row:
    """One row and where it stands, for error messages."""

    where: str
    values: Mapping[str, Any]

    def get(self, field: str, kind: type, schema: str) -> Any:
        """The value of ``field`` (dots go into objects); raises UserError when it is absent or not a ``kind``."""
        value: Any = self.values
        for part in field.split("."):
            if not isinstance(value, Mapping) or part not in value:
                here = ", ".join(sorted(value)) if isinstance(value, Mapping) else f"{reprlib.repr(value):.60}"
                raise UserError(
                    f"{self.where}: the field '{field}' is missing (found: {here}). Expected the schema of {schema}; "
                    "the files of another exam are read with another task.type."
                )
            value = value[part]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(
                f"{self.where}: the field '{field}' must be {_NAMES[kind]}, not {reprlib.repr(value):.60}. "
                f"Expected the schema of {schema}."
            )
        return value

    def text(self, field: str, schema: str) -> str:
        """A text field that must not be blank."""
        value: str = self.get(field, str, schema)
        if not value.strip():
            raise UserError(f"{self.where}: the field '{field}' is empty. Remove the row or fill it in.")
        return value.strip()


def check_file(path: str | Path, key: str = "task.path") -> None:
    """Raise UserError, naming the key that a person sets it with, when there is no exam file at ``path``."""
    if not is_file(Path(path)):
        raise UserError(f"There is no exam file {shown(path)}; set {key}=FILE to one that ends in {listed(ROW_ENDINGS)}.")


def read_rows(path: str | Path) -> Iterator[Row]:
    """The rows of a file of JSON lines or parquet, in order."""
    path = Path(path)
    check_file(path)
    if ending(path) not in (*ROW_ENDINGS, NAMED_ONLY_ENDING):
        raise UserError(f"{shown(path)}: exam files end in {listed(ROW_ENDINGS)}; rename or convert this one.")
    is_empty = True
    for row in read.read_rows(path):
        is_empty = False
        yield Row(row.where, row.values)
    if is_empty:
        raise UserError(f"{shown(path)} has no rows.")
