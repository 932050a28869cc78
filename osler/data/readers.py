"""Local files as documents: parquet and JSONL tables, text and Markdown, plain or compressed, or folders of any mix.

A reader is lazy: each iteration opens the files again and gives the same documents in the same order (files sorted by name), and
any part of a file can be read alone. A text file is one document, or several if it is long; a table has one per row. The log
names once which files and columns are not read.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osler.data.config import TurnsData
from osler.data.documents import Document
from osler.files.find import ROW_ENDINGS, TEXT_ENDINGS, ending, log_once, shown
from osler.files.parts import File, Part, find_local
from osler.files.rows import Row, read_rows, read_texts
from osler.runtime.errors import UserError
from osler.tokenizer.chat import Turn


@dataclass(frozen=True)
class TextFiles:
    """The documents in a file or a folder: whole text files, and the column `field` of tables.

    `path_key` and `field_key` are the config keys of `path` and `field`, for messages.
    """

    path: str | Path
    field: str = "text"
    path_key: str = "data.path"
    field_key: str = "data.field"

    def files(self) -> list[File]:
        """Return the files in the order of their names."""
        return find_local(self.path, (*ROW_ENDINGS, *TEXT_ENDINGS), self.path_key)

    def read(self, part: Part) -> Iterator[Document]:
        """Yield the documents of a part."""
        if ending(part.file.name) in TEXT_ENDINGS:
            yield from read_text_file(part)
            return
        for row in read_rows(part, [self.field]):
            text = text_of(row, self.field, self.field_key) or ""
            _log_unread(self.path, row)
            yield Document(text=text, where=row.where)

    def __iter__(self) -> Iterator[Document]:
        return (document for file in self.files() for document in self.read(Part(file)))


def read_turns(data: TurnsData, key: str, part: Part) -> Iterator[Document]:
    """Yield the questions and answers in a part of a table; `key` is the place of the source in the config, for messages."""
    fields = {f"{key}.question_field": data.question_field, f"{key}.answer_field": data.answer_field}
    if data.thinking_field is not None:
        fields[f"{key}.thinking_field"] = data.thinking_field
    for row in read_rows(part, list(fields.values())):
        question, answer, *thinking = (text_of(row, field, name) for name, field in fields.items())
        _log_unread(data.path, row)
        yield Document(turn=Turn(question or "", thinking[0] if thinking else None, answer or ""), where=row.where)


def read_text_file(part: Part) -> Iterator[Document]:
    """Yield the content of a text file, as several documents where it is long."""
    for number, text in enumerate(read_texts(part), 1):
        yield Document(text=text, where=part.file.name if number == 1 else f"{part.file.name}, document {number}")


def value_of(row: Row, field: str, key: str = "") -> Any:
    """Return a field of a row. `key` is the config key that chooses the field; without one, dots in `field` name nested fields.

    Raises UserError when the row has no such field.
    """
    value: Any = row.values
    for name in [field] if key else field.split("."):
        if not isinstance(value, Mapping) or name not in value:
            columns, remedy = ", ".join(map(shown, row.columns)) or "none", f" {_remedy(key)}" if key else ""
            raise UserError(f"{row.where} has no field '{field}'; it has: {columns}.{remedy}")
        value = value[name]
    return value


def text_of(row: Row, field: str, key: str = "") -> str | None:
    """Return a field of text, or None for null; see `value_of`."""
    value = value_of(row, field, key)
    if value is None or isinstance(value, str):
        return value
    raise UserError(f"{row.where}: the field '{field}' must be text, but it is {type(value).__name__}.")


def _log_unread(path: str | Path, row: Row) -> None:
    """Name the columns that look like content and are not read."""
    if row.unread:
        log_once(f"{shown(path)}: columns not read: {', '.join(map(shown, row.unread))}.")


def _remedy(key: str) -> str:
    """Return which settings read other columns, when the one that `key` chooses is missing."""
    source, _, field = key.rpartition(".")
    if field == "thinking_field":
        return f"Set {key}=NAME to the column with the reasoning, or {key}=null where there is none."
    if field == "field":
        names = ", ".join(f"{source}.{name}_field=NAME" for name in ("question", "answer", "thinking"))
        return f"Set {key}=NAME to the column of text, or {source}.type=turns for questions with answers ({names})."
    return f"Set {key}=NAME to the column that holds it."
