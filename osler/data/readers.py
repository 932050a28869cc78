"""Local files as documents: parquet and JSONL tables, text and Markdown, plain or compressed, or folders of any mix.

A reader is lazy: each iteration opens the files anew and gives the same documents in the same order (files sorted by name). A
text file is one document, a table has one per row. Files and columns that are not read are named once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from osler.data.documents import Document
from osler.files import ROW_ENDINGS, TEXT_ENDINGS, Row, ending, find_files, log_once, read_rows, read_text, shown
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

    `path_key` and `field_key` are the config keys of the two, for messages.
    """

    path: str | Path
    field: str = "text"
    path_key: str = "data.path"
    field_key: str = "data.field"

    def __iter__(self) -> Iterator[Document]:
        for file in find_files(self.path, (*ROW_ENDINGS, *TEXT_ENDINGS), key=self.path_key):
            if ending(file) in TEXT_ENDINGS:
                yield Document(text=read_text(file), where=shown(file))
                continue
            for row in read_rows(file, [self.field]):
                text = _text(row, self.field, self.field_key) or ""
                _log_unread(self.path, row)
                yield Document(text=text, where=row.where)


@dataclass(frozen=True)
class TurnFiles:
    """The questions and answers in a table or a folder of tables; `thinking_field` None means no reasoning."""

    path: str | Path
    question_field: str = "question"
    thinking_field: str | None = None
    answer_field: str = "answer"

    def __iter__(self) -> Iterator[Document]:
        fields = [self.question_field, self.answer_field, *([] if self.thinking_field is None else [self.thinking_field])]
        for file in find_files(self.path, ROW_ENDINGS, key="data.path"):
            for row in read_rows(file, fields):
                question = _text(row, self.question_field, "data.question_field") or ""
                answer = _text(row, self.answer_field, "data.answer_field") or ""
                thinking = None
                if self.thinking_field is not None:
                    thinking = _text(row, self.thinking_field, "data.thinking_field")
                _log_unread(self.path, row, wants_thinking=self.thinking_field is None)
                yield Document(turn=Turn(question, thinking, answer), where=row.where)


def _log_unread(path: str | Path, row: Row, *, wants_thinking: bool = False) -> None:
    """Name the columns that look like content and are not read, and the one that looks like reasoning."""
    if not row.unread:
        return
    reasoning = [name for name in row.unread if wants_thinking and name.lower() in TURN_COLUMNS["thinking_field"]]
    hint = f" data.thinking_field={shown(reasoning[0])} would read the reasoning." if reasoning else ""
    log_once(f"{shown(path)}: columns not read: {', '.join(map(shown, row.unread))}.{hint}")


def _text(row: Row, field: str, key: str) -> str | None:
    """Return the text of a column, None for null; `key` is the config key that chooses the column."""
    if field not in row.values:
        columns = [shown(name) for name in row.columns]
        raise UserError(f"{row.where} has no field '{field}'; it has: {', '.join(columns) or 'none'}. {_remedy(key, columns)}")
    value = row.values[field]
    if value is None or isinstance(value, str):
        return value
    raise UserError(f"{row.where}: the field '{field}' must be text, but it is {type(value).__name__}.")


def _remedy(key: str, columns: Sequence[str]) -> str:
    """Return which settings would read these columns, where the one that `key` chooses is missing."""
    settings = _turn_settings(columns, key) if key.startswith("data.") else None
    if key == "data.thinking_field":
        likely = [column for column in columns if column.lower() in TURN_COLUMNS["thinking_field"]]
        name = f"={likely[0]}" if likely else " to the column that holds the reasoning"
        return f"Set {key}{name}, or {key}=null where there is no reasoning."
    if settings is not None:
        other = f", or {key}=NAME to learn one column as text" if key == "data.field" else ""
        return f"These look like questions and answers: set {settings}{other}."
    if key.startswith("data.") and CHAT_COLUMNS.intersection(columns):
        return (
            "Lists of chat messages are not read: write one row with a question and an answer for each exchange, and set "
            "data.type=turns."
        )
    if key == "data.field":
        return f"Set {key}=NAME to the column of text, or data.type=turns for rows of questions and answers."
    return f"Set {key}=NAME to the column that holds it."


def _turn_settings(columns: Sequence[str], missing: str) -> str | None:
    """Return the settings that read these columns as questions and answers, `missing` among them; None if they look otherwise."""
    lower = {column.lower(): column for column in columns}
    named = {key: next((lower[name] for name in names if name in lower), None) for key, names in TURN_COLUMNS.items()}
    if named["question_field"] is None or named["answer_field"] is None:
        return None
    settings = ["data.type=turns"]
    for key, column in named.items():
        is_default = column == key.removesuffix("_field") and key != "thinking_field"  # whose default is null
        if column is not None and (not is_default or missing == f"data.{key}"):
            settings.append(f"data.{key}={column}")
    if named["thinking_field"] is None and len(lower) > 2:
        settings.append("(and data.thinking_field=NAME if one of the others is the reasoning)")
    return " ".join(settings)
