"""What a run learns from (the built-in clinic, one's own text, or one's own questions and answers), and in rows of which
length. Torch-free.
"""

from __future__ import annotations

from typing import Literal

from osler.config import config


@config
class ClinicData:
    """The built-in synthetic world: `passages` of textbook prose, `examples` of exam items with reasoning, and, to train
    the form of the exam without any fact, matching `cards` and option `drills` (see `osler.clinic.drills`).
    """

    type: Literal["clinic"] = "clinic"
    seed: int = 0
    passages: int = 20_000
    examples: int = 20_000
    cards: int = 5_000
    drills: int = 5_000
    validation_passages: int = 200
    validation_examples: int = 200

    def __post_init__(self) -> None:
        for name in ("passages", "examples", "cards", "drills", "validation_passages", "validation_examples"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        if self.passages + self.examples == 0:
            raise ValueError("the clinic gives nothing to learn from: set passages or examples above 0")


@config
class FilesData:
    """Text of one's own: a .parquet, .jsonl, .txt or .md file (.gz and .zst too), or a folder of them.

    `field` names the text column of tables; `holdout_fraction` of the documents (at least one) becomes validation data.
    """

    type: Literal["files"] = "files"
    path: str
    field: str = "text"
    holdout_fraction: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        _check_fraction(self.holdout_fraction)


@config
class TurnsData:
    """Questions and answers of one's own, in a .parquet or .jsonl file or a folder of them; one row is one example.

    `thinking_field` names the reasoning between question and answer; null for examples without it.
    """

    type: Literal["turns"] = "turns"
    path: str
    question_field: str = "question"
    thinking_field: str | None = None
    answer_field: str = "answer"
    holdout_fraction: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        _check_fraction(self.holdout_fraction)


@config
class Stage:
    """Part of a curriculum: rows of `seq_len` tokens until the run has seen `until_tokens`; the last stage runs to the end."""

    seq_len: int  # tokens in a row
    until_tokens: int | None = None  # counted from the start of the run; the step that crosses it is the stage's last
    batch_tokens: int | None = None  # None: the run's; a batch is as many whole rows as fit

    def __post_init__(self) -> None:
        for name in ("seq_len", "until_tokens", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.batch_tokens is not None and self.batch_tokens % self.seq_len:
            raise ValueError(f"batch_tokens={self.batch_tokens} is not a multiple of seq_len={self.seq_len}")


def _check_fraction(fraction: float) -> None:
    if not 0 <= fraction < 1:
        raise ValueError(f"holdout_fraction={fraction} must be at least 0 and below 1")
