"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): grade-school arithmetic with a numeric answer, in the schema of openai/gsm8k.

The dataset's answer is the worked solution, ``####``, the number. The calculator annotations ``<<48/2=24>>`` are removed: they
are a tool call of the paper, not text that a person would write.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from osler.config.schema import config
from osler.files.read import Row
from osler.runtime.errors import UserError
from osler.tasks.answers import read_number
from osler.tasks.item import ExamItem, content_id
from osler.tasks.rows import ExamFile, exam_rows, text

SCHEMA = "openai/gsm8k (main): question, answer ('... #### number')"


@config
class Gsm8kTask(ExamFile):
    """Grade-school arithmetic with a numeric answer, in the schema of openai/gsm8k."""

    type: Literal["gsm8k"] = "gsm8k"


def load(path: str | Path, *, split: str = "", limit: int | None = None) -> list[ExamItem]:
    """Return the first ``limit`` items in the order of the file, without options; raises UserError like ``medqa.load``."""
    return [_item(row, split) for row in exam_rows(path)][:limit]


def _item(row: Row, split: str) -> ExamItem:
    question, solution = text(row, "question", SCHEMA), text(row, "answer", SCHEMA)
    work, mark, final = solution.rpartition("####")
    number = read_number(final)
    if not mark or number is None:
        raise UserError(f"{row.where}: 'answer' must end in '#### ' and a number, not in {solution[-40:]!r}.")
    return ExamItem(
        id=content_id("gsm8k", question),
        question=question,
        options=(),
        answer_index=-1,
        split=split,
        thinking=re.sub(r"<<[^<>]*>>", "", work).strip(),
        answer=f"{number:f}",
    )
