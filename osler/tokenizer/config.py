"""Which tokenizer a run uses. Torch-free."""

from __future__ import annotations

from typing import Annotated

from osler.config.schema import Ge, PositiveInt, config

SMALLEST_VOCABULARY = 300  # 256 bytes, the special tokens and some merges


@config
class TokenizerConfig:
    """The tokenizer: one that exists, or one trained on the run's own text."""

    # a tokenizer.json, or GPT-2's vocab.bpe with encoder.json beside it; null: train one on the run's own text
    path: str | None = None
    vocab_size: Annotated[int, Ge(SMALLEST_VOCABULARY)] = 2048  # of a tokenizer that is trained; a loaded one has its own
    max_bytes: PositiveInt = 32_000_000  # of text to train on; more is sampled evenly
