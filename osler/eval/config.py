"""The configuration of `osler eval` (an exam and how it is taken, or a text to predict) and of `osler distill`. Torch-free."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from osler.config.recipe import override
from osler.config.schema import Gt, Le, PositiveInt, Seed, config, decode, encode
from osler.data.config import HubData
from osler.ops.sampling_params import check_temperature
from osler.runtime.errors import UserError
from osler.tasks.config import HubExam
from osler.tasks.registry import ClinicTask, NeedleTask, TaskConfig

EXAM_SEED = 7_001  # gives every model the same items of the clinic, and not those that training draws for its own exams
CLINIC_EXAM = ClinicTask(split="new_findings,new_questions", limit=500, seed=EXAM_SEED)


@config
class DistillConfig:
    """Questions that a teacher answers, and how many of its right answers are kept."""

    # the questions; a split that models are examined on is allowed, and named in every row
    task: TaskConfig
    samples: PositiveInt = 8  # answers drawn to each question, each with its options in another order
    keep: PositiveInt = 2  # the most right answers to keep for a question; no two have the same reasoning
    reasoning: bool | None = None  # think before the answer; null: as the teacher was trained
    max_new_tokens: PositiveInt = 128  # thinking and answer together
    temperature: float = 0.7  # higher: more varied answers, fewer of them right
    top_p: Annotated[float, Gt(0), Le(1)] = 0.95  # draw from the fewest likeliest tokens that have this share of the probability
    seed: Seed = 0  # for option orders and sampling
    rows: PositiveInt = 256  # answers written at once; fewer need less memory

    which: Literal["newest", "best"] = "newest"  # checkpoint of a run folder
    device: str = "auto"  # auto, cpu, cuda or cuda:N

    def __post_init__(self) -> None:
        _check_sampling(self.samples, self.temperature)


@config
class ExamSettings:
    """Exams, and how they are taken."""

    # the exam; the clinic's split takes several names with commas between them, each with limit items. In a command an exam
    # may be TYPE:FILE, clinic:SPLIT or the NAME of an exam, or several of these with commas between them
    task: TaskConfig | None = None
    tasks: tuple[TaskConfig, ...] = ()  # several exams, one after the other, instead of task
    root: str = ""  # a folder with a folder of files for each exam or text that is given by name; empty: the hub
    subset: PositiveInt | None = None  # questions of each exam, drawn at random by seed; null: all
    # generation: the model writes, and its answer is read; letters: the likeliest letter counts; cloze: the likeliest text of an
    # option, without a list of the options; likelihood: the likeliest answer in the form that is taught, or with a plain prompt
    # cloze as well as letters; both: generation and likelihood; auto: cloze for needle, likelihood for options after a plain
    # prompt, else generation
    method: Literal["auto", "generation", "likelihood", "letters", "cloze", "both"] = "auto"
    # taught: the template, if the model learned it; plain: as lm-evaluation-harness asks, with the same score of every item
    prompt: Literal["taught", "plain"] = "taught"
    permutations: PositiveInt = 1  # option orders in which a question is shown; options like "All of the above" fix the order
    samples: PositiveInt = 1  # answers written to each question; two or more, at a temperature, give pass@k and majority vote
    reasoning: bool | None = None  # think before the answer; null: as the model was trained
    max_new_tokens: PositiveInt = 128  # thinking and answer together
    temperature: float = 0.0  # 0: always the likeliest token
    # divides an option's log-likelihood; the raw score is shown beside it. lm-evaluation-harness's acc_norm divides by characters
    normalise: Literal["bytes", "characters", "tokens", "none"] = "bytes"
    seed: Seed = 0  # for option orders, subsets and sampling
    rows: PositiveInt = 256  # answers written at once; fewer need less memory
    device: str = "auto"  # auto, cpu, cuda or cuda:N

    def __post_init__(self) -> None:
        _check_sampling(self.samples, self.temperature)
        if self.task is not None and self.tasks:
            raise ValueError("task and tasks are both given: put all exams into one of them")

    @property
    def exams(self) -> tuple[TaskConfig, ...]:
        """All exams, however they were given."""
        return self.tasks if self.task is None else (self.task,)


@config
class EvalConfig(ExamSettings):
    """One evaluation; without an exam, ``text`` and ``source`` a model is examined on what it was trained for."""

    text: str | None = None  # a file or folder of text, measured in bits per byte; not one that the model was trained on
    text_field: str = "text"  # the column of tables
    source: HubData | None = None  # a text by name, as source.name=wikitext or c4, in its last split unless another is given
    documents: PositiveInt | None = None  # how many of a text, from its start; null: all
    seq_len: PositiveInt | None = None  # tokens read at once; null: as many as in training, or with a window max_seq_len

    which: Literal["newest", "best"] = "newest"  # checkpoint of a run folder


def _check_sampling(samples: int, temperature: float) -> None:
    """Raise ValueError for a temperature that cannot be used, or at which several samples would be the same."""
    check_temperature(temperature)
    if samples > 1 and temperature == 0:
        raise ValueError("samples above 1 needs a temperature above 0, for example 0.7: at 0 all samples are the same")


def config_of(overrides: Sequence[str], fields: Mapping[str, Any] | None = None) -> EvalConfig:
    """Return the config that ``fields`` and overrides describe. Exams may be texts (``named_task``), several with commas between.

    A task without a path and with the type clinic, or none, is ``CLINIC_EXAM`` with changed fields.
    """
    given = override(fields or {}, overrides, {"task": _named_tasks, "tasks": _named_tasks})
    if {"task", "tasks"} <= given.keys():
        raise UserError("task and tasks are both given: put all exams into one of them.")
    for key in {"task", "tasks"}.intersection(given):
        asked = _named_tasks(given[key])  # fields may have texts, too
        exams = asked if isinstance(asked, list) else [asked]
        if "subset" in given and any(isinstance(task, dict) and "limit" in task for task in exams):
            raise UserError("subset and limit both say how many questions: give subset for random ones, or limit for the first.")
        sections = [_section_of(task) for task in exams]
        given |= {key: None, "tasks": sections} if isinstance(asked, list) else {key: sections[0]}
    return decode(EvalConfig, given)


def _named_tasks(tasks: Any) -> Any:
    """Return the section of a task that is given as text, or a list of sections if there are several, with commas between."""
    several = tasks.split(",") if isinstance(tasks, str) and "," in tasks else tasks
    return [named_task(task) for task in several] if isinstance(several, list) else named_task(several)


def _section_of(task: Any) -> Any:
    if isinstance(task, dict) and task.get("type") == NeedleTask.type:
        return {"seed": EXAM_SEED, **task}
    if isinstance(task, dict) and "path" not in task and task.get("type", CLINIC_EXAM.type) == CLINIC_EXAM.type:
        return {**encode(CLINIC_EXAM), **task}
    return task


def distill_config_of(overrides: Sequence[str]) -> DistillConfig:
    """Return the config of ``osler distill`` that the overrides describe; its task may also be given as text."""
    return decode(DistillConfig, override({}, overrides, {"task": named_task}), source="osler distill")


def named_task(task: Any) -> Any:
    """Return the section of a task given as text: TYPE:FILE, ``clinic`` or ``clinic:SPLIT``, ``needle`` likewise, or a NAME.

    A task that is no text is returned as it is.
    """
    if not isinstance(task, str):
        return task
    kind, colon, place = task.strip().partition(":")
    is_made = kind in (ClinicTask.type, NeedleTask.type)
    if not colon and not is_made:
        return {"type": HubExam.type, "name": kind}
    return {"type": kind, **({"split" if is_made else "path": place} if colon else {})}
