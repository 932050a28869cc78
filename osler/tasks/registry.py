"""The exams that Osler knows: the clinic's (a synthetic test bench, not medical advice) and those in files."""

from typing import Annotated, Literal

from osler.clinic.exam import ClinicItem, drills, exam
from osler.config.schema import TAGGED, PositiveInt, Seed, config
from osler.tasks.config import AnyExam
from osler.tasks.item import ExamItem


@config
class ClinicTask:
    """Questions of the built-in synthetic world, made from a seed."""

    type: Literal["clinic"] = "clinic"
    split: str = "validation"  # train, validation, validation_questions, new_findings, new_questions, or drill
    limit: PositiveInt = 400  # questions
    seed: Seed = 0  # of the questions that are drawn

    @property
    def exam(self) -> str:
        """The name of the exam."""
        return self.type


TaskConfig = Annotated[ClinicTask | AnyExam, TAGGED]


def load_clinic(*, split: str = "validation", limit: int = 400, seed: int = 0) -> list[ExamItem]:
    """Return ``limit`` items of a clinic split, the same for the same seed; items of "drill" state no fact."""
    return list(map(exam_item, drills(seed, limit) if split == "drill" else exam(seed, split, limit)))


def exam_item(item: ClinicItem) -> ExamItem:
    """Return a clinic item as an exam item; its group is ``relation/condition``, the fact that it asks for."""
    group = f"{item.relation}/{item.condition}"
    return ExamItem(item.id, item.question, item.options, item.answer_index, item.split, item.thinking, group=group)
