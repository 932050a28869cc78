"""MedMCQA (Pal et al. 2022, arXiv 2203.14371): Indian medical entrance questions, in the schema of openlifescienceai/medmcqa.

``cop`` is the right option, counted from 0 on the hub (-1 in the unlabelled test split) and from 1 in the authors' original
files, whose other fields have the same names. Mistaking one for the other shifts every answer, so the numbering of the whole
file is checked: a file with a 4, or a file of some size without a single 0, is refused unless ``first_option=1`` says that it
is an original.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from osler.config.schema import config
from osler.files.read import Row
from osler.runtime.errors import UserError
from osler.tasks.item import ExamItem
from osler.tasks.rows import ExamFile, exam_rows, field, text

logger = logging.getLogger(__name__)

SCHEMA = "openlifescienceai/medmcqa: id, question, opa, opb, opc, opd, cop, exp"
_ROWS_THAT_TELL = 32  # about a third of all answers are A: 32 rows without one happen by chance once in 100,000 files
# The opening of an explanation: "Ans. (B) ", "Answer- C. ", "Ans. BSolitary bone cyst" (glued to the first word).
_STUB = re.compile(r"^\W*(?i:ans(?:wer)?s?\b)\W*(?:(?i:is\b)\W*)?(?:(?i:[a-d])\b\W*|[A-D](?=[A-Z][a-z]))?")
_NAMES_A_LETTER = re.compile(r"\b(?:ans(?:wer)?|option|choice)s?\b\W*(?:is\b\W*)?[a-d1-4]\b|\([a-d]\)", re.IGNORECASE)


@config
class MedmcqaTask(ExamFile):
    """Indian medical entrance questions, in the schema of openlifescienceai/medmcqa."""

    type: Literal["medmcqa"] = "medmcqa"
    first_option: int = 0  # the number of option A in the file: 0 in the hub's files, 1 in the authors' original


def load(path: str | Path, *, split: str = "", limit: int | None = None, first_option: int = 0) -> list[ExamItem]:
    """Return the first ``limit`` labelled items in the order of the file; ``first_option`` is the number of option A, 0 or 1.

    Rows without a label are left out and counted in a message. Raises UserError when no row has one.
    """
    if first_option not in (0, 1):
        raise UserError(f"first_option must be 0 (the hub's files) or 1 (the original files), not {first_option}.")
    rows = [(row, _cop(row)) for row in exam_rows(path)]
    labelled = [(row, cop) for row, cop in rows if cop is not None]
    if not labelled:
        raise UserError(
            f"{path}: no row has a label (cop is -1 everywhere): this is the test split, whose answers are not public. "
            "Give the file of the validation split."
        )
    _check_numbering(path, [cop for _, cop in labelled], first_option)
    if len(labelled) < len(rows):
        logger.warning(f"{path}: {len(rows) - len(labelled)} of {len(rows)} rows have no label and are left out")
    return [_item(row, cop - first_option, split) for row, cop in labelled][:limit]


def _cop(row: Row) -> int | None:
    if row.values.get("cop", 0) is None:
        return None
    cop: int = field(row, "cop", int, SCHEMA)
    if not -1 <= cop <= 4:
        raise UserError(f"{row.where}: 'cop' is {cop}; it must be the number of one of four options.")
    return None if cop == -1 else cop


def _check_numbering(path: str | Path, cops: Sequence[int], first_option: int) -> None:
    low, high = min(cops), max(cops)
    if first_option == 1 and low == 0:
        raise UserError(
            f"{path}: first_option=1 was given, but 'cop' is 0 in some rows: this file counts from 0, like the hub's."
        )
    if first_option == 0 and high == 4 and low == 0:
        raise UserError(f"{path}: 'cop' takes the values 0 and 4: two numberings are mixed. Load each file by itself.")
    if first_option == 0 and (high == 4 or (low > 0 and len(cops) >= _ROWS_THAT_TELL)):
        raise UserError(
            f"{path}: 'cop' runs from {low} to {high}: this file counts its options from 1, as the authors' "
            "original does, and the hub's files count from 0. Set first_option=1 beside its path."
        )


def _item(row: Row, index: int, split: str) -> ExamItem:
    subject = row.values.get("subject_name")
    return ExamItem(
        id=f"medmcqa-{text(row, 'id', SCHEMA)}",
        question=text(row, "question", SCHEMA),
        options=tuple(text(row, name, SCHEMA) for name in ("opa", "opb", "opc", "opd")),
        answer_index=index,
        split=split,
        thinking=_explanation(row.values.get("exp")),
        group=subject if isinstance(subject, str) else "",
    )


def _explanation(text: object) -> str | None:
    """Return an explanation without its "Ans. B" opening; None when it is absent, trivial, or names a letter (options move)."""
    if not isinstance(text, str):
        return None
    text = _STUB.sub("", text.replace("\xa0", " "), count=1).strip()
    return None if len(text.split()) < 5 or _NAMES_A_LETTER.search(text) else text
