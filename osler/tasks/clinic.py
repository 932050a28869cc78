"""The clinic as a task: items of the built-in synthetic world, made from a seed (a test bench, not medical advice)."""

from __future__ import annotations

from typing import Literal

from osler.clinic.drills import drills
from osler.clinic.exam import ClinicItem, exam
from osler.config.schema import PositiveInt, Seed, config
from osler.tasks.item import ExamItem


@config
class ClinicTask:
    """Questions of the built-in synthetic world, made from a seed."""

    type: Literal["clinic"] = "clinic"
    split: str = "validation"  # train, validation, validation_questions, new_findings, new_questions, or drill
    limit: PositiveInt = 400  # questions
    seed: Seed = 0  # of the questions that are drawn
    split_seed: Seed = 0  # of what is held out; training uses 0


def load(*, split: str = "validation", limit: int = 400, seed: int = 0, split_seed: int = 0) -> list[ExamItem]:
    """Return ``limit`` items of a clinic split, the same for the same seeds; ``split_seed`` decides what is held out.

    The split "drill" is not an exam: its items train the form of the exam and state no fact.
    """
    items = drills(seed, limit) if split == "drill" else exam(seed, split, limit, split_seed=split_seed)
    return list(map(exam_item, items))


def exam_item(item: ClinicItem) -> ExamItem:
    """Return a clinic item as an exam item; its group is ``relation/condition``, the fact that it asks for."""
    return ExamItem(
        id=item.id,
        question=item.question,
        options=tuple(item.options),
        answer_index=item.answer_index,
        split=item.split,
        thinking=item.thinking,
        group=f"{item.relation}/{item.condition}",
    )
