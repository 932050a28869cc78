"""The configuration of `osler eval`: an exam and how it is taken, or a text to predict. Torch-free."""

from typing import Literal

from osler.config.schema import PositiveInt, Seed, config
from osler.ops.sampling_params import check_temperature
from osler.tasks.registry import ClinicTask, TaskConfig

EXAM_SEED = 7_001  # of the clinic's exam: the same items for every model, and other ones than training draws on the way
CLINIC_EXAM = ClinicTask(split="new_findings,new_questions", limit=500, seed=EXAM_SEED)


@config
class EvalConfig:
    """One evaluation; with neither ``task`` nor ``text`` a model is examined on what it was trained for."""

    task: TaskConfig | None = None  # the exam; the clinic takes several splits with commas between them, and limit items of each
    # generation lets the model write and reads its answer, likelihood takes the option it finds most likely; auto: generation
    # unless the model was trained on plain text alone
    method: Literal["auto", "generation", "likelihood", "both"] = "auto"
    permutations: PositiveInt = 1  # option orders in which every question is shown; "All of the above" and the like stay put
    reasoning: bool | None = None  # think before the answer; null: as the model was trained
    max_new_tokens: PositiveInt = 128  # thinking and answer together
    temperature: float = 0.0  # 0: always the likeliest token
    normalise: Literal["bytes", "tokens", "none"] = "bytes"  # what an option's log-likelihood is divided by
    seed: Seed = 0  # of option orders and sampling
    rows: PositiveInt = 256  # answers written at once; fewer need less memory

    text: str | None = None  # a file or folder of text, measured in bits per byte; not one that the model was trained on
    text_field: str = "text"  # the column of tables
    seq_len: PositiveInt | None = None  # tokens read at once; null: as many as in training

    which: Literal["newest", "best"] = "newest"  # checkpoint of a run folder
    device: str = "auto"  # auto, cpu, cuda or cuda:N

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
