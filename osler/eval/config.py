"""The configuration of `osler eval`, an exam and how it is taken, or a text to predict, and of `osler distill`. Torch-free."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from osler.config.recipe import override
from osler.config.schema import Gt, Le, PositiveInt, Seed, config, decode, encode
from osler.data.config import HubData
from osler.ops.sampling_params import check_temperature
from osler.runtime.errors import UserError
from osler.tasks.config import HubExam
from osler.tasks.registry import ClinicTask, NeedleTask, TaskConfig

EXAM_SEED = 7_001  # of the clinic's exam: the same items for every model, and not those that training draws for its own exams
CLINIC_EXAM = ClinicTask(split="new_findings,new_questions", limit=500, seed=EXAM_SEED)


@config
class DistillConfig:
    """Questions that a teacher answers, and how many of its right answers are kept."""

    # the questions; a split that models are examined on is allowed, and named in every row
    task: TaskConfig
    samples: PositiveInt = 8  # answers drawn to each question, its options in another order each time
    keep: PositiveInt = 2  # right answers of a question that are kept at most, each reasoning once
    reasoning: bool | None = None  # think before the answer; null: as the teacher was trained
    max_new_tokens: PositiveInt = 128  # thinking and answer together
    temperature: float = 0.7  # higher: more varied answers, fewer of them right
    top_p: Annotated[float, Gt(0), Le(1)] = 0.95  # draw from the fewest likeliest tokens that have this share
    seed: Seed = 0  # of option orders and sampling
    rows: PositiveInt = 256  # answers written at once; fewer need less memory

    which: Literal["newest", "best"] = "newest"  # checkpoint of a run folder
    device: str = "auto"  # auto, cpu, cuda or cuda:N

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples above 1 needs a temperature above 0, for example 0.7: at 0 all samples are the same")


@config
class ExamSettings:
    """Exams, and how they are taken."""

    # the exam; the clinic takes several splits with commas between them, and limit items of each. On the command line also
    # TYPE:FILE, or the NAME of an exam, or several with commas between them
    task: TaskConfig | None = None
    tasks: tuple[TaskConfig, ...] = ()  # several exams, one after the other, instead of task
    root: str = ""  # a folder that has a folder of files for each exam or text by name; empty: the hub
    subset: PositiveInt | None = None  # questions of each exam, drawn at random by seed; null: all
    # generation lets the model write and reads its answer; letters and cloze take the option whose letter, or whose text without
    # a list of options, it finds most likely; likelihood: the option as it was taught to answer, or without that both of these;
    # both: generation and likelihood; auto: generation unless the model was trained on plain text alone
    method: Literal["auto", "generation", "likelihood", "letters", "cloze", "both"] = "auto"
    # taught: the template, if the model learned it; plain: as lm-evaluation-harness asks, with the same score of every item
    prompt: Literal["taught", "plain"] = "taught"
    permutations: PositiveInt = 1  # option orders in which every question is shown; "All of the above" and the like stay put
    samples: PositiveInt = 1  # answers written to each question; two or more, at a temperature, give pass@k and majority vote
    reasoning: bool | None = None  # think before the answer; null: as the model was trained
    max_new_tokens: PositiveInt = 128  # thinking and answer together
    temperature: float = 0.0  # 0: always the likeliest token
    # divides an option's log-likelihood; the raw score is shown beside. lm-evaluation-harness's acc_norm divides by characters
    normalise: Literal["bytes", "characters", "tokens", "none"] = "bytes"
    seed: Seed = 0  # of option orders, subsets and sampling
    rows: PositiveInt = 256  # answers written at once; fewer need less memory
    device: str = "auto"  # auto, cpu, cuda or cuda:N

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples above 1 needs a temperature above 0, for example 0.7: at 0 all samples are the same")

    @property
    def exams(self) -> tuple[TaskConfig, ...]:
        """All exams, however they were given."""
        return self.tasks if self.task is None else (self.task,)


@config
class EvalConfig(ExamSettings):
    """One evaluation; with neither ``task`` nor ``text`` a model is examined on what it was trained for."""

    text: str | None = None  # a file or folder of text, measured in bits per byte; not one that the model was trained on
    text_field: str = "text"  # the column of tables
    source: HubData | None = None  # a text by name, as source.name=wikitext or c4, in its last split unless another is given
    documents: PositiveInt | None = None  # of a text, counted from its start; null: all
    seq_len: PositiveInt | None = None  # tokens read at once; null: as many as in training

    which: Literal["newest", "best"] = "newest"  # checkpoint of a run folder


def config_of(overrides: Sequence[str]) -> EvalConfig:
    """Return the config that the overrides describe; a task without type and path is the clinic's exam with changed fields.

    Exams may also be given as text (``named_task``), several with commas between them.
    """
    given = override({}, overrides)
    if {"task", "tasks"} <= given.keys():
        raise UserError("task and tasks are both given: put all exams into one of them.")
    for key in {"task", "tasks"}.intersection(given):
        asked = given[key].split(",") if isinstance(given[key], str) else given[key]
        exams = asked if isinstance(asked, list) else [asked]
        if "subset" in given and any(isinstance(task, dict) and "limit" in task for task in exams):
            raise UserError("subset and limit both say how many questions: give subset for random ones, or limit for the first.")
        written = [_written_out(task) for task in exams]
        given |= {key: None, "tasks": written} if isinstance(asked, list) else {key: written[0]}
    return decode(EvalConfig, given)


def _written_out(task: Any) -> Any:
    task = named_task(task)
    if isinstance(task, dict) and task.get("type") == NeedleTask.type:
        return {"seed": EXAM_SEED, **task}
    if isinstance(task, dict) and "path" not in task and task.get("type", CLINIC_EXAM.type) == CLINIC_EXAM.type:
        return {**encode(CLINIC_EXAM), **task}
    return task


def distill_config_of(overrides: Sequence[str]) -> DistillConfig:
    """Return the config of ``osler distill`` that the overrides describe; its task may also be given as text."""
    given = override({}, overrides)
    if "task" in given:
        given["task"] = named_task(given["task"])
    return decode(DistillConfig, given, source="osler distill")


def named_task(task: Any) -> Any:
    """Return the section of a task given as text: TYPE:FILE, ``clinic`` or ``clinic:SPLIT``, ``needle`` likewise, or a NAME."""
    if not isinstance(task, str):
        return task
    kind, colon, place = task.strip().partition(":")
    is_made = kind in (ClinicTask.type, NeedleTask.type)
    if not colon and not is_made:
        return {"type": HubExam.type, "name": kind}
    return {"type": kind, **({"split" if is_made else "path": place} if colon else {})}
