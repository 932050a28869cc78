"""The quickstart's three stages and its exam. Torch-free."""

from __future__ import annotations

from typing import Literal

from osler.config.schema import Fraction, PositiveInt, Seed, config
from osler.rl.config import GrpoConfig
from osler.train.config import TrainConfig


@config
class QuickstartConfig:
    """Tokenizer and pretraining, reasoning, GRPO, exam and report on the built-in clinic, in one run folder."""

    kind: Literal["quickstart"] = "quickstart"  # the command sets it
    description: str = ""  # for the reader; changes nothing
    seed: Seed = 0  # of every stage
    pretrain: TrainConfig = TrainConfig()  # the first stage: a tokenizer, then the next token of the textbook
    sft: TrainConfig = TrainConfig(kind="sft")  # the second stage: worked exam questions
    # the third stage: own answers, rewarded when right; seed and init_from are set by the quickstart
    grpo: GrpoConfig = GrpoConfig(init_from="sft")
    exam_splits: tuple[str, ...] = ("new_findings", "new_questions")  # of the clinic, examined after sft and after grpo
    exam_items: PositiveInt = 500  # questions of each split
    exam_new_tokens: PositiveInt = 64  # thinking and answer together, at most
    start_accuracy: Fraction = 0.68  # GRPO starts from the earlier checkpoint whose validation accuracy is nearest to this

    def __post_init__(self) -> None:
        if not self.exam_splits:
            raise ValueError("exam_splits is empty: the exam needs at least one split")
        if self.sft.exam.every_tokens < 1:
            raise ValueError("sft.exam.every_tokens must be above 0: the earlier checkpoint is chosen by these exams")
