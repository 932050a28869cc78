"""Which tokenizer a run uses. Torch-free."""

from __future__ import annotations

from osler.config.schema import PositiveInt, config

SMALLEST_VOCABULARY = 300  # of a tokenizer that is trained


@config
class TokenizerConfig:
    """The tokenizer: one that exists, or one trained on the run's own text."""

    # a tokenizer.json, or GPT-2's vocab.bpe with encoder.json beside it; null: train one on the run's own text
    path: str | None = None
    vocab_size: int = 2048  # of a tokenizer that is trained; a loaded one has its own
    max_bytes: PositiveInt = 32_000_000  # of text to train on; more is sampled evenly

    def __post_init__(self) -> None:
        if self.path is None and self.vocab_size < SMALLEST_VOCABULARY:
            needed = f"256 bytes and the special tokens need {SMALLEST_VOCABULARY}"
            raise ValueError(f"vocab_size {self.vocab_size} is too small: {needed}")
