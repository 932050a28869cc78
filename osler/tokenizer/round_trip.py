"""Check that text survives a tokenizer: ``decode(encode(text)) == text``.

A tokenizer that drops characters makes its text easier to predict, so a model that trains on it reports far too few bits per
byte. A byte-level tokenizer must lose nothing, and `refuse_missing_bytes` checks that without a text. For any other
tokenizer losses depend on the text, so `Losses` checks samples. Changes by a normalizer (case, accents, spaces) are no losses.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from osler.runtime.errors import UserError
from osler.tokenizer.bpe import Tokenizer

logger = logging.getLogger(__name__)

MAX_LOST = 0.01  # the largest share of the characters that a tokenizer which is not byte-level may lose
SAMPLE_CHARS = 4096  # the start of each text that is looked at
EXAMPLE_CHARS = 40
# Characters with every byte that UTF-8 uses: ASCII, each last byte, each first byte.
_CODES = (*range(0x100), *range(0x100, 0x800, 64), *range(0x800, 0xD800, 0x800), *range(0xE000, 0x11_0000, 0x1000))
# Letters come first, so that a message shows a letter if any is lost.
PROBES = sorted(map(chr, _CODES), key=lambda character: (not character.isalpha(), not character.isprintable()))
_SPACES = re.compile(r"[\s\u2581]+")  # U+2581 is SentencePiece's space


@dataclass
class Losses:
    """How many characters were looked at, lost and changed, and the first example of a loss (True) and of a change (False)."""

    chars: int = 0
    lost: int = 0
    changed: int = 0
    examples: dict[bool, str] = field(default_factory=dict)

    def look(self, tokenizer: Tokenizer, texts: Iterable[str]) -> None:
        """Look at the start of each text. Raises UserError when the texts so far lose too many characters."""
        starts = [text[:SAMPLE_CHARS] for text in texts]
        for text, ids in zip(starts, tokenizer.encode_batch(starts), strict=True):
            back = tokenizer.decode(ids)
            lost = _missing(_SPACES.sub("", tokenizer.normalize(text)), _SPACES.sub("", back))
            self.chars += len(text)
            self.lost += lost
            self.changed += max(lost, _missing(text, back), _missing(back.strip(), text))
            if lost or back.strip() != text.strip():
                self.examples.setdefault(lost > 0, _example(text, back))
        if self.lost > (0 if tokenizer.is_byte_level else MAX_LOST * self.chars):
            raise UserError(
                f"The tokenizer loses text: {self.examples[True]}; {self.lost / self.chars:.2%} of the characters looked at "
                "vanish. A model could not read them, and its bits per byte would be too good. The vocabulary of a byte-level "
                "tokenizer must begin with all 256 bytes. Give another tokenizer.path, or leave it out to train one on this text."
            )

    def add(self, other: Losses) -> None:
        """Add the counts of other texts."""
        self.chars, self.lost, self.changed = self.chars + other.chars, self.lost + other.lost, self.changed + other.changed
        self.examples = {**other.examples, **self.examples}

    def warn(self) -> None:
        """Log a warning when the tokenizer changes the text."""
        if self.changed:
            example = self.examples.get(True) or self.examples.get(False, "")
            logger.warning(
                f"The tokenizer changes {self.changed / self.chars:.2%} of the text's characters: {example}. Bits per byte "
                "count the bytes of the original text."
            )


def refuse_missing_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """Return the tokenizer. Raises UserError when it is byte-level but has no token for some byte of UTF-8."""
    if tokenizer.is_byte_level:
        Losses().look(tokenizer, PROBES)
    return tokenizer


def _missing(text: str, back: str) -> int:
    """Return how many characters of one text the other lacks, whatever their positions."""
    return 0 if text == back else (Counter(text) - Counter(back)).total()


def _example(text: str, back: str) -> str:
    """Return what a text and its decoded tokens say around the first place where they differ."""
    text, back = text.strip(), back.strip()
    pairs = enumerate(zip(text, back, strict=False))
    place = next((index for index, (one, other) in pairs if one != other), min(len(text), len(back)))
    start = max(0, place - EXAMPLE_CHARS // 2)
    return f"{text[start : start + EXAMPLE_CHARS]!r} is read back as {back[start : start + EXAMPLE_CHARS]!r}"
