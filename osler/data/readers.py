"""Local files as documents: parquet and JSONL tables, text and Markdown, plain or compressed, or folders of any mix.

A reader is lazy: each iteration opens the files anew and gives the same documents in the same order (files sorted by name), and
any part of a file can be read alone. A text file is one document, a table has one document per row. The log names once which
files and columns are not read.
"""

from collections.abc import Iterator, Mapping, Sequence
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

# Common names of the columns of questions and answers, in lower case; the message about a missing column proposes them.
TURN_COLUMNS = {
    "question_field": ("question", "prompt", "instruction"),
    "answer_field": ("answer", "response", "completion", "output"),
    "thinking_field": ("thinking", "reasoning", "rationale", "explanation", "cot", "complex_cot"),
}
CHAT_COLUMNS = {"messages", "conversations", "conversation"}


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
        _log_unread(data.path, row, wants_thinking="" if thinking else key)
        yield Document(turn=Turn(question or "", thinking[0] if thinking else None, answer or ""), where=row.where)


def read_text_file(part: Part) -> Iterator[Document]:
    """Yield the content of a text file, as several documents where it is long."""
    for number, text in enumerate(read_texts(part), 1):
        yield Document(text=text, where=part.file.name if number == 1 else f"{part.file.name}, part {number}")


def value_of(row: Row, field: str, key: str = "") -> Any:
    """Return a field of a row. `key` is the config key that chooses the field; without one, dots in `field` go into objects.

    Raises UserError when the row has no such field.
    """
    value: Any = row.values
    for name in [field] if key else field.split("."):
        if not isinstance(value, Mapping) or name not in value:
            columns = [shown(name) for name in row.columns]
            remedy = f" {_remedy(key, columns)}" if key else ""
            raise UserError(f"{row.where} has no field '{field}'; it has: {', '.join(columns) or 'none'}.{remedy}")
        value = value[name]
    return value


def text_of(row: Row, field: str, key: str = "") -> str | None:
    """Return a field of text, or None for null; see `value_of`."""
    value = value_of(row, field, key)
    if value is None or isinstance(value, str):
        return value
    raise UserError(f"{row.where}: the field '{field}' must be text, but it is {type(value).__name__}.")


def _log_unread(path: str | Path, row: Row, *, wants_thinking: str = "") -> None:
    """Name the columns that look like content and are not read; ``wants_thinking`` is the key of a source without reasoning."""
    if not row.unread:
        return
    reasoning = [name for name in row.unread if wants_thinking and name.lower() in TURN_COLUMNS["thinking_field"]]
    hint = f" {wants_thinking}.thinking_field={shown(reasoning[0])} would read the reasoning." if reasoning else ""
    log_once(f"{shown(path)}: columns not read: {', '.join(map(shown, row.unread))}.{hint}")


def _remedy(key: str, columns: Sequence[str]) -> str:
    """Return which settings would read these columns, when the column that `key` chooses is missing."""
    source, _, field = key.rpartition(".")
    lower = {column.lower(): column for column in columns}
    likely = {field: next((lower[name] for name in names if name in lower), "") for field, names in TURN_COLUMNS.items()}
    if field == "thinking_field":
        name = f"={likely[field]}" if likely[field] else " to the column that holds the reasoning"
        return f"Set {key}{name}, or {key}=null where there is no reasoning."
    if source and likely["question_field"] and likely["answer_field"]:
        settings = [f"{source}.type=turns"]
        for name, column in likely.items():
            is_default = column == name.removesuffix("_field") and name != "thinking_field"  # its default is null
            if column and (not is_default or field == name):
                settings.append(f"{source}.{name}={column}")
        if not likely["thinking_field"] and len(lower) > 2:
            settings.append(f"(and {source}.thinking_field=NAME if one of the others is the reasoning)")
        other = f", or {key}=NAME to learn one column as text" if field == "field" else ""
        return f"These look like questions and answers: set {' '.join(settings)}{other}."
    if source and CHAT_COLUMNS.intersection(columns):
        return (
            "Lists of chat messages are not read: write one row with a question and an answer for each exchange, and set "
            f"{source}.type=turns."
        )
    rows = f" of text, or {source}.type=turns for rows of questions and answers" if field == "field" else " that holds it"
    return f"Set {key}=NAME to the column{rows}."
