"""PubMedQA (Jin et al. 2019, arXiv 1909.06146): yes, no or maybe from an abstract, in the schema of
qiaojin/PubMedQA.

The abstract without its conclusion is the item's ``context`` (a caller with a short context window shortens that
field); the conclusion (``long_answer``) is the reasoning to learn from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from osler.config import config
from osler.errors import UserError
from osler.tasks.item import ExamItem
from osler.tasks.rows import Row, read_rows

SCHEMA = "qiaojin/PubMedQA (pqa_labeled): pubid, question, context.contexts, long_answer, final_decision"
OPTIONS = ("yes", "no", "maybe")


@config
class PubmedqaTask:
    """Yes, no or maybe from an abstract, in the schema of qiaojin/PubMedQA."""

    type: Literal["pubmedqa"] = "pubmedqa"
    path: str  # a .parquet, .jsonl or .ndjson file (also .jsonl.gz and the like)
    split: str = ""  # a name for the file in tables and metrics
    limit: int | None = None  # the first so many questions; null: all


def load(path: str | Path, *, split: str = "", limit: int | None = None) -> list[ExamItem]:
    """All items of a local file (the first ``limit``), in file order; raises UserError naming file, line and field."""
    return [_item(row, split) for row in read_rows(path)][:limit]


def _item(row: Row, split: str) -> ExamItem:
    question = row.text("question", SCHEMA)
    contexts = row.get("context.contexts", list, SCHEMA)
    if not contexts or not all(isinstance(part, str) for part in contexts):
        raise UserError(f"{row.where}: 'context.contexts' must be a list of texts.")
    decision = row.text("final_decision", SCHEMA)
    if decision not in OPTIONS:
        raise UserError(f"{row.where}: 'final_decision' is {decision!r}; expected yes, no or maybe.")
    return ExamItem(
        id=f"pubmedqa-{row.get('pubid', int, SCHEMA)}",
        question=question,
        options=OPTIONS,
        answer_index=OPTIONS.index(decision),
        split=split,
        thinking=row.text("long_answer", SCHEMA),
        context="\n".join(part.strip() for part in contexts),
    )
