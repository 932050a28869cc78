"""What a run learns from, and the lengths of its rows. Torch-free."""

from __future__ import annotations

from typing import Annotated, Literal

from osler.config.schema import Ge, Lt, NonNegativeInt, PositiveInt, Seed, config

HoldoutFraction = Annotated[float, Ge(0), Lt(1)]


@config
class ClinicData:
    """The built-in synthetic world: textbook prose, exam questions with reasoning, and drills of the form of the exam."""

    type: Literal["clinic"] = "clinic"
    seed: Seed = 0  # of every text and question that is drawn
    passages: NonNegativeInt = 20_000  # of textbook prose
    examples: NonNegativeInt = 20_000  # exam questions with reasoning and answer
    cards: NonNegativeInt = 5_000  # exercises in matching a word with its partner: form, no fact
    drills: NonNegativeInt = 5_000  # multiple-choice questions about nothing but the options themselves: form, no fact
    validation_passages: NonNegativeInt = 200  # of textbook prose, held out
    validation_examples: NonNegativeInt = 200  # exam questions, held out

    def __post_init__(self) -> None:
        if self.passages + self.examples == 0:
            raise ValueError("the clinic gives nothing to learn from: set passages or examples above 0")


@config
class FilesData:
    """Text of one's own."""

    type: Literal["files"] = "files"
    path: str  # a .parquet, .jsonl, .ndjson, .txt or .md file (all but parquet also .gz and .zst), or a folder of them
    field: str = "text"  # the column of text in tables
    holdout_fraction: HoldoutFraction = 0.05  # share of the documents kept for validation, one at least; 0: none
    seed: Seed = 0  # of the choice of what is held out


@config
class TurnsData:
    """Questions and answers of one's own, with or without the reasoning between them."""

    type: Literal["turns"] = "turns"
    path: str  # a .parquet, .jsonl or .ndjson file (also .jsonl.gz and the like), or a folder of them; one row is one example
    question_field: str = "question"  # the column with the question
    thinking_field: str | None = None  # the column with the reasoning between question and answer; null: there is none
    answer_field: str = "answer"  # the column with the answer
    holdout_fraction: HoldoutFraction = 0.05  # share of the examples kept for validation, one at least; 0: none
    seed: Seed = 0  # of the choice of what is held out


@config
class PreparedData:
    """Shards that `osler data prepare` wrote, with their tokenizer and their validation data."""

    type: Literal["prepared"] = "prepared"
    path: str  # the folder of shards; the run reads them there and makes no copy


@config
class CurriculumStage:
    """Part of a curriculum: rows of `seq_len` tokens until the run has seen `until_tokens`; the last one runs to the end."""

    seq_len: PositiveInt  # tokens in a row
    until_tokens: PositiveInt | None = None  # counted from the start of the run; the step that crosses it is the stage's last
    batch_tokens: PositiveInt | None = None  # None: the run's; a batch is as many whole rows as fit

    def __post_init__(self) -> None:
        if self.batch_tokens is not None and self.batch_tokens % self.seq_len:
            raise ValueError(f"batch_tokens={self.batch_tokens} is not a multiple of seq_len={self.seq_len}")
