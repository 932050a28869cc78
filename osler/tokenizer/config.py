"""Which tokenizer a run uses. Torch-free."""

from typing import Annotated, Literal

from osler.config.schema import TAGGED, Ge, Le, PositiveInt, config

SMALLEST_VOCABULARY = 300  # 256 bytes, the special tokens and some merges
LARGEST_TRANSITION = 0x10_0000  # while superwords are learned, each token of BPE is one character above U+FFFF


@config
class Vocabulary:
    """A tokenizer that exists, or the size of one that is trained on the run's own text."""

    # a tokenizer.json, or GPT-2's vocab.bpe with encoder.json beside it; null: train one on the run's own text
    path: str | None = None
    vocab_size: Annotated[int, Ge(SMALLEST_VOCABULARY)] = 2048  # the size to train; a loaded tokenizer has its own
    max_bytes: PositiveInt = 32_000_000  # the most text to train on; more is sampled evenly


@config
class BPEConfig(Vocabulary):
    """Byte-level BPE: no token is longer than a word."""

    type: Literal["bpe"] = "bpe"


@config
class SuperBPEConfig(Vocabulary):
    """SuperBPE (arXiv 2503.13423): BPE first, then tokens of up to four words, so that a text needs fewer tokens."""

    type: Literal["superbpe"] = "superbpe"
    # size of the vocabulary from which on a token may span words, no larger than vocab_size; null: half of vocab_size
    transition: Annotated[int, Ge(SMALLEST_VOCABULARY), Le(LARGEST_TRANSITION)] | None = None

    def __post_init__(self) -> None:
        if self.path is None and self.bpe_size > self.vocab_size:
            raise ValueError(f"transition {self.transition} is larger than vocab_size {self.vocab_size}")

    @property
    def bpe_size(self) -> int:
        """The size of the vocabulary before its first superword."""
        half = min(max(self.vocab_size // 2, SMALLEST_VOCABULARY), LARGEST_TRANSITION)
        return half if self.transition is None else self.transition


TokenizerConfig = Annotated[BPEConfig | SuperBPEConfig, TAGGED]
