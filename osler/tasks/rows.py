"""Rows of a local exam file (JSON lines, plain or gzipped, or parquet) with the schema checked as they are read.

Every row is checked, the first one before anything else happens; an error names the file, the line and the field, so a
file in another schema is refused at once instead of giving a silently smaller exam.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osler.errors import UserError

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
                here = ", ".join(sorted(value)) if isinstance(value, Mapping) else repr(value)[:60]
                raise UserError(
                    f"{self.where}: the field '{field}' is missing (found: {here}). Expected the schema of {schema}; "
                    "the files of another exam are read with another task.type."
                )
            value = value[part]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(
                f"{self.where}: the field '{field}' must be {_NAMES[kind]}, not {value!r:.60}. "
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
    if not Path(path).is_file():
        raise UserError(f"There is no exam file {path}; set {key}=FILE to a .jsonl, .jsonl.gz or .parquet file.")


def read_rows(path: str | Path) -> Iterator[Row]:
    """The rows of a ``.jsonl``/``.json`` (an object per line, optionally ``.gz``) or ``.parquet`` file, in order."""
    path = Path(path)
    check_file(path)
    name = path.name.removesuffix(".gz")
    count = 0
    if name.endswith((".jsonl", ".json")):
        rows = _json_rows(path)
    elif path.suffix == ".parquet":
        rows = _parquet_rows(path)
    else:
        raise UserError(f"{path}: exam files are read from .jsonl, .jsonl.gz or .parquet; rename or convert this one.")
    for row in rows:
        count += 1
        yield row
    if count == 0:
        raise UserError(f"{path} has no rows.")


def _json_rows(path: Path) -> Iterator[Row]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    values = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{where}: not JSON ({error.msg}). Each line must hold one JSON object.") from None
                if not isinstance(values, dict):
                    raise UserError(f"{where}: expected one JSON object per line, found a {type(values).__name__}.")
                yield Row(where, values)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}). Is the file complete and its name right?") from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, row {number}", values)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} is not a readable parquet file ({error}).") from None
