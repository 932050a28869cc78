"""Check that text survives a tokenizer: ``decode(encode(text)) == text``.

A tokenizer that drops characters makes its text easier to predict, so a model that trains on it reports a bits per byte that is
far too good. A byte-level tokenizer must lose nothing, and `refuse_missing_bytes` checks that without a text. For any other
tokenizer losses depend on the text, so `RoundTrip` checks samples. Changes by a normalizer (case, accents, spaces) are no losses.
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
SAMPLE_CHARS = 4096  # of a text are looked at
EXAMPLE_CHARS = 40
# Characters with every byte that UTF-8 uses: ASCII, each last byte, each first byte.
_CODES = (*range(0x100), *range(0x100, 0x800, 64), *range(0x800, 0xD800, 0x800), *range(0xE000, 0x11_0000, 0x1000))
_PROBES = [chr(code) for code in _CODES]
_SPACES = re.compile(r"[\s\u2581]+")  # U+2581 is SentencePiece's space


@dataclass
class Losses:
    """How many characters were looked at, lost and changed, and the first example of a loss (True) and of a change (False)."""

    chars: int = 0
    lost: int = 0
    changed: int = 0
    examples: dict[bool, str] = field(default_factory=dict)

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
                "count the bytes of the text as it was."
            )


class RoundTrip:
    """Counts the characters that a tokenizer loses or changes in the texts that it is shown."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.losses = Losses()

    def look(self, texts: Iterable[str]) -> None:
        """Look at the start of each text. Raises UserError when the texts so far lose too many characters."""
        starts, seen = [text[:SAMPLE_CHARS] for text in texts], self.losses
        for text, back, lost in _read_back(self._tokenizer, starts):
            seen.chars += len(text)
            seen.lost += lost
            seen.changed += max(lost, _missing(text, back), _missing(back.strip(), text))
            if lost or back.strip() != text.strip():
                seen.examples.setdefault(lost > 0, _example(text, back))
        if seen.lost > (0 if self._tokenizer.is_byte_level else MAX_LOST * seen.chars):
            raise UserError(
                f"The tokenizer loses text: {seen.examples[True]}; {seen.lost / seen.chars:.2%} of the characters looked at "
                "vanish. A model could not read them, and its bits per byte would be too good. Give another tokenizer.path, or "
                "leave it out to train one on this text."
            )


def lost_characters(tokenizer: Tokenizer) -> list[str]:
    """Return the characters that a tokenizer loses, letters first; the probes together have every byte of UTF-8."""
    lost = [text for text, _, missing in _read_back(tokenizer, _PROBES) if missing]
    return sorted(lost, key=lambda character: (not character.isalpha(), not character.isprintable()))


def refuse_missing_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """Return the tokenizer. Raises UserError when it is byte-level but has no token for some byte of UTF-8."""
    if tokenizer.is_byte_level and (lost := lost_characters(tokenizer)):
        raise UserError(
            f"The tokenizer loses text: it is byte-level but has no token for some bytes, so {describe_lost(lost)} vanish. Its "
            "vocabulary must begin with all 256 bytes (in `tokenizers`: initial_alphabet=ByteLevel.alphabet()). Give another "
            "tokenizer.path, or leave it out to train one."
        )
    return tokenizer


def describe_lost(lost: list[str]) -> str:
    """Return a text that names a few of the lost characters."""
    return ", ".join(map(repr, lost[:5])) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")


def _read_back(tokenizer: Tokenizer, texts: list[str]) -> Iterable[tuple[str, str, int]]:
    """Yield each text, the text that is read back, and how many characters are lost."""
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        back = tokenizer.decode(ids)
        yield text, back, _missing(_SPACES.sub("", tokenizer.normalize(text)), _SPACES.sub("", back))


def _missing(text: str, back: str) -> int:
    """Return how many characters of one text the other lacks, whatever their positions."""
    return 0 if text == back else (Counter(text) - Counter(back)).total()


def _example(text: str, back: str) -> str:
    """Show the first place where a text and what is read back differ."""
    text, back = text.strip(), back.strip()
    pairs = enumerate(zip(text, back, strict=False))
    place = next((index for index, (one, other) in pairs if one != other), min(len(text), len(back)))
    start = max(0, place - EXAMPLE_CHARS // 2)
    return f"{text[start : start + EXAMPLE_CHARS]!r} is read back as {back[start : start + EXAMPLE_CHARS]!r}"
