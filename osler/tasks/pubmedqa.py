"""PubMedQA (Jin et al. 2019, arXiv 1909.06146): yes, no or maybe from an abstract, in the schema of qiaojin/PubMedQA.

The abstract without its conclusion is the item's ``context``; the conclusion (``long_answer``) is the reasoning to learn from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from osler.config.schema import config
from osler.files.read import Row
from osler.runtime.errors import UserError
from osler.tasks.item import ExamItem
from osler.tasks.rows import ExamFile, exam_rows, field, text

SCHEMA = "qiaojin/PubMedQA (pqa_labeled): pubid, question, context.contexts, long_answer, final_decision"
OPTIONS = ("yes", "no", "maybe")


@config
class PubmedqaTask(ExamFile):
    """Yes, no or maybe from an abstract, in the schema of qiaojin/PubMedQA."""

    type: Literal["pubmedqa"] = "pubmedqa"


def load(path: str | Path, *, split: str = "", limit: int | None = None) -> list[ExamItem]:
    """Return the first ``limit`` items in the order of the file; raises UserError that names file, line and field."""
    return [_item(row, split) for row in exam_rows(path)][:limit]


def _item(row: Row, split: str) -> ExamItem:
    contexts = field(row, "context.contexts", list, SCHEMA)
    if not contexts or not all(isinstance(part, str) for part in contexts):
        raise UserError(f"{row.where}: 'context.contexts' must be a list of texts.")
    decision = text(row, "final_decision", SCHEMA)
    if decision not in OPTIONS:
        raise UserError(f"{row.where}: 'final_decision' is {decision!r}; expected yes, no or maybe.")
    return ExamItem(
        id=f"pubmedqa-{field(row, 'pubid', int, SCHEMA)}",
        question=text(row, "question", SCHEMA),
        options=OPTIONS,
        answer_index=OPTIONS.index(decision),
        split=split,
        thinking=text(row, "long_answer", SCHEMA),
        context="\n".join(part.strip() for part in contexts),
    )
