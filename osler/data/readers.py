"""Local files as documents: parquet and JSONL tables, text and Markdown, plain or compressed, or folders of any mix.

The idea: reading is lazy and restartable. A source is a path, iterating it opens the files anew and gives the same
documents in the same order (files sorted by name), so whoever needs two passes makes two. A text file is one document,
a table has one per row. Whatever is wrong with a file is a UserError that names the file and the line, row or byte;
what is left out, files or columns, is named once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from osler.data.documents import Document
from osler.errors import UserError
from osler.files.find import ROW_ENDINGS, TEXT_ENDINGS, ending, find_files, shown
from osler.files.read import Row, read_rows, read_text
from osler.tokenizer.chat import Turn

logger = logging.getLogger(__name__)

# How tables of questions and answers call their columns, in lower case: what the message about a missing column proposes.
TURN_COLUMNS = {
    "question_field": ("question", "prompt", "instruction"),
    "answer_field": ("answer", "response", "completion", "output"),
    "thinking_field": ("thinking", "reasoning", "rationale", "explanation", "cot", "complex_cot"),
}
CHAT_COLUMNS = {"messages", "conversations", "conversation"}


@dataclass(frozen=True)
class TextFiles:
    """The documents in a file or a folder: whole text files, and the column `field` of tables.

    `path_key` and `field_key` are what the two are called where a person sets them, for messages.
    """

    path: str | Path
    field: str = "text"
    path_key: str = "data.path"
    field_key: str = "data.field"

    def __iter__(self) -> Iterator[Document]:
        for file in _files(self.path, (*ROW_ENDINGS, *TEXT_ENDINGS), self.path_key):
            name = shown(file.name)
            if ending(file) in TEXT_ENDINGS:
                yield Document(text=read_text(file), source=shown(file), collection=name)
                continue
            for row in read_rows(file, [self.field]):
                text = _text(row, self.field, self.field_key) or ""
                _tell_unread(self.path, row)
                yield Document(text=text, source=row.where, collection=name)


@dataclass(frozen=True)
class TurnFiles:
    """The questions and answers in a table file or a folder of them; `thinking_field` None means no reasoning."""

    path: str | Path
    question_field: str = "question"
    thinking_field: str | None = None
    answer_field: str = "answer"

    def __iter__(self) -> Iterator[Document]:
        columns = [self.question_field, self.answer_field]
        if self.thinking_field is not None:
            columns.append(self.thinking_field)
        for file in _files(self.path, ROW_ENDINGS, "data.path"):
            for row in read_rows(file, columns):
                question = _text(row, self.question_field, "data.question_field") or ""
                answer = _text(row, self.answer_field, "data.answer_field") or ""
                thinking = None
                if self.thinking_field is not None:
                    thinking = _text(row, self.thinking_field, "data.thinking_field")
                _tell_unread(self.path, row, wants_thinking=self.thinking_field is None)
                yield Document(turn=Turn(question, thinking, answer), source=row.where, collection=shown(file.name))


def _files(path: str | Path, endings: Sequence[str], key: str) -> list[Path]:
    found = find_files(path, endings, key=key)
    if found.left_out:
        _tell_once(f"{shown(path)}: left out: {found.left_out}.")
    return found.files


@cache
def _tell_once(text: str) -> None:
    """Log what this process has not logged before: files are read several times, and one line about them is enough."""
    logger.info(text)


def _tell_unread(path: str | Path, row: Row, *, wants_thinking: bool = False) -> None:
    """Name the columns that look like content and are not read, and the one that looks like reasoning."""
    if not row.unread:
        return
    reasoning = [name for name in row.unread if wants_thinking and name.lower() in TURN_COLUMNS["thinking_field"]]
    hint = f" data.thinking_field={shown(reasoning[0])} would read the reasoning." if reasoning else ""
    _tell_once(f"{shown(path)}: columns not read: {', '.join(map(shown, row.unread))}.{hint}")


def _text(row: Row, field: str, key: str) -> str | None:
    """The text of a column, None for null; `key` is what chooses the column."""
    if field not in row.values:
        raise UserError(_no_field(row.where, field, key, [shown(name) for name in row.columns]))
    value = row.values[field]
    if value is None or isinstance(value, str):
        return value
    raise UserError(f"{row.where}: the field '{field}' must be text, but it is {type(value).__name__}.")


def _no_field(where: str, field: str, key: str, columns: Sequence[str]) -> str:
    """What is there instead of a column, and which keys would read it."""
    found = f"{where} has no field '{field}'; it has: {', '.join(columns) or 'none'}."
    settings = _turn_settings(columns, key) if key.startswith("data.") else None
    if key == "data.thinking_field":
        likely = [column for column in columns if column.lower() in TURN_COLUMNS["thinking_field"]]
        name = f"={likely[0]}" if likely else " to the column that holds the reasoning"
        return f"{found} Set {key}{name}, or {key}=null where there is no reasoning."
    if settings is not None:
        other = f", or {key}=NAME to learn one column as text" if key == "data.field" else ""
        return f"{found} These look like questions and answers: set {settings}{other}."
    if key.startswith("data.") and CHAT_COLUMNS.intersection(columns):
        return (
            f"{found} Lists of chat messages are not read: write one row with a question and an answer for each exchange, "
            "and set data.type=turns."
        )
    if key == "data.field":
        return f"{found} Set {key}=NAME to the column of text, or data.type=turns for rows of questions and answers."
    return f"{found} Set {key}=NAME to the column that holds it."


def _turn_settings(columns: Iterable[str], missing: str) -> str | None:
    """The keys under which these columns are questions and answers, `missing` among them; None when they look otherwise."""
    lower = {column.lower(): column for column in columns}
    named = {key: next((lower[name] for name in names if name in lower), None) for key, names in TURN_COLUMNS.items()}
    if named["question_field"] is None or named["answer_field"] is None:
        return None
    settings = ["data.type=turns"]
    for key, column in named.items():
        by_default = column == key.removesuffix("_field") and key != "thinking_field"  # which is null by default
        if column is not None and (not by_default or missing == f"data.{key}"):
            settings.append(f"data.{key}={column}")
    if named["thinking_field"] is None and len(lower) > 2:
        settings.append("(and data.thinking_field=NAME if one of the others is the reasoning)")
    return " ".join(settings)
