"""MedQA (Jin et al. 2020, arXiv 2009.13081): USMLE questions with four options, in the schema of
GBaker/MedQA-USMLE-4-options.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from osler.config import config
from osler.errors import UserError
from osler.tasks.item import LETTERS, ExamItem, content_id, plain
from osler.tasks.rows import Row, read_rows

SCHEMA = "GBaker/MedQA-USMLE-4-options: question, options {A..D}, answer, answer_idx"


@config
class MedqaTask:
    """USMLE questions with four options, in the schema of GBaker/MedQA-USMLE-4-options."""

    type: Literal["medqa"] = "medqa"
    path: str  # a .parquet, .jsonl or .ndjson file (also .jsonl.gz and the like)
    split: str = ""  # a name for the file in tables and metrics
    limit: int | None = None  # the first so many questions; null: all


def load(path: str | Path, *, split: str = "", limit: int | None = None) -> list[ExamItem]:
    """All items of a local file (the first ``limit``), in file order; raises UserError naming file, line and field."""
    return [_item(row, split) for row in read_rows(path)][:limit]


def _item(row: Row, split: str) -> ExamItem:
    question = row.text("question", SCHEMA)
    options = row.get("options", dict, SCHEMA)
    letters = [
        letter for letter in LETTERS if options.get(letter) is not None
    ]  # parquet fills absent letters with None
    if len(letters) < 2 or letters != list(LETTERS[: len(letters)]):
        raise UserError(
            f"{row.where}: 'options' must hold the letters A, B, ... without a gap, not {', '.join(sorted(options))}."
        )
    texts = tuple(row.text(f"options.{letter}", SCHEMA) for letter in letters)
    letter, answer = row.text("answer_idx", SCHEMA), row.text("answer", SCHEMA)
    if letter not in letters:
        raise UserError(f"{row.where}: 'answer_idx' is {letter!r}, which is none of the options {', '.join(letters)}.")
    index = letters.index(letter)
    if plain(texts[index]) != plain(answer) and plain(answer) in map(plain, texts):
        raise UserError(
            f"{row.where}: 'answer' is the text of another option than 'answer_idx' {letter}; which one is right?"
        )
    return ExamItem(
        id=content_id("medqa", question, *texts), question=question, options=texts, answer_index=index, split=split
    )
