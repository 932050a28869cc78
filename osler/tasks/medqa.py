"""MedQA (Jin et al. 2020, arXiv 2009.13081): USMLE questions, in the schema of GBaker/MedQA-USMLE-4-options."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from osler.config.schema import config
from osler.files.read import Row
from osler.runtime.errors import UserError
from osler.tasks.item import LETTERS, ExamItem, content_id, plain
from osler.tasks.rows import ExamFile, exam_rows, field, text

SCHEMA = "GBaker/MedQA-USMLE-4-options: question, options {A..D}, answer, answer_idx"


@config
class MedqaTask(ExamFile):
    """USMLE questions with four options, in the schema of GBaker/MedQA-USMLE-4-options."""

    type: Literal["medqa"] = "medqa"


def load(path: str | Path, *, split: str = "", limit: int | None = None) -> list[ExamItem]:
    """Return the first ``limit`` items in the order of the file; raises UserError that names file, line and field."""
    return [_item(row, split) for row in exam_rows(path)][:limit]


def _item(row: Row, split: str) -> ExamItem:
    question = text(row, "question", SCHEMA)
    options = field(row, "options", dict, SCHEMA)
    letters = [letter for letter in LETTERS if options.get(letter) is not None]  # parquet fills absent letters with None
    if len(letters) < 2 or letters != list(LETTERS[: len(letters)]):
        empty = ", ".join(sorted(letter for letter, value in options.items() if value is None))
        problem = f"; without a text: {empty}" if empty else ""
        raise UserError(
            f"{row.where}: 'options' must hold the letters A, B, ... without a gap, not {', '.join(letters) or 'none'}{problem}."
        )
    texts = tuple(text(row, f"options.{letter}", SCHEMA) for letter in letters)
    letter, answer = text(row, "answer_idx", SCHEMA), text(row, "answer", SCHEMA)
    if letter not in letters:
        raise UserError(f"{row.where}: 'answer_idx' is {letter!r}, which is none of the options {', '.join(letters)}.")
    index = letters.index(letter)
    if plain(texts[index]) != plain(answer) and plain(answer) in map(plain, texts):
        raise UserError(f"{row.where}: 'answer' is the text of another option than 'answer_idx' {letter}; which one is right?")
    return ExamItem(id=content_id("medqa", question, *texts), question=question, options=texts, answer_index=index, split=split)
