"""The exams that Osler knows: those made of the clinic (a synthetic test bench, not medical advice), and those in files."""

from typing import Annotated, Literal

from osler.clinic.exam import ClinicItem, drills, exam
from osler.config.schema import TAGGED, Ge, Le, PositiveInt, Seed, config
from osler.tasks.config import AnyExam
from osler.tasks.item import ExamItem


@config
class MadeExam:
    """An exam that is made from a seed."""

    type: str  # which exam
    split: str  # which of its questions
    limit: PositiveInt  # how many questions
    seed: Seed = 0  # for drawing questions

    @property
    def exam(self) -> str:
        """The name of the exam."""
        return self.type


@config
class ClinicTask(MadeExam):
    """Questions of the built-in synthetic world."""

    type: Literal["clinic"] = "clinic"
    split: str = "validation"  # train, validation, validation_questions, new_findings, new_questions, or drill
    limit: PositiveInt = 400  # questions


@config
class NeedleTask(MadeExam):
    """Long histories made of the clinic's texts, in which one visit tells the answer."""

    type: Literal["needle"] = "needle"
    split: str = "needle,copy"  # needle asks for the diagnosis that one finding tells, copy for a phrase that was said
    limit: PositiveInt = 20  # questions of each split, length and depth, the same in every length and depth
    # tokens of a history with its question and answer; empty: those of 256, 512, 1,024 and so on that hold all histories
    # and that the model can read
    lengths: tuple[PositiveInt, ...] = ()
    # where the telling visit is, in percent of the history: 0 is its beginning
    depths: tuple[Annotated[int, Ge(0), Le(100)], ...] = (0, 25, 50, 75, 100)

    def __post_init__(self) -> None:
        for name, given in (("lengths", self.lengths), ("depths", self.depths)):
            if len(set(given)) < len(given):
                raise ValueError(f"{name} {list(given)} has a number twice: give each once")
        if not self.depths:
            raise ValueError("depths is empty: give at least one, for example depths=[50]")


TaskConfig = Annotated[ClinicTask | NeedleTask | AnyExam, TAGGED]


def load_clinic(*, split: str = "validation", limit: int = 400, seed: int = 0) -> list[ExamItem]:
    """Return ``limit`` items of a clinic split, the same for the same seed; items of "drill" state no fact."""
    return list(map(exam_item, drills(seed, limit) if split == "drill" else exam(seed, split, limit)))


def exam_item(item: ClinicItem) -> ExamItem:
    """Return a clinic item as an exam item; items that ask for the same fact are a cluster."""
    return ExamItem(
        item.id,
        item.question,
        item.options,
        item.answer_index,
        item.split,
        item.thinking,
        group=item.relation,
        cluster=f"{item.relation}/{item.condition}",
    )
