"""A document: the unit that is read, tokenised, held out and shuffled as a whole."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from osler.tokenizer.chat import Turn


@dataclass(frozen=True)
class Document:
    """A text, or (with `turn`) a question and its answer whose prompt is not learned.

    `source` says where it came from ("notes.jsonl:12"), for messages only; `collection` is what it is one of, for counting.
    """

    text: str = ""
    turn: Turn | None = None
    source: str = ""
    collection: str = ""

    @property
    def parts(self) -> tuple[str, ...]:
        """The texts in it: the text, or question, thinking (if any) and answer."""
        if self.turn is None:
            return (self.text,)
        if self.turn.thinking is None:
            return (self.turn.question, self.turn.answer)
        return (self.turn.question, self.turn.thinking, self.turn.answer)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to learn: a blank text, or a blank question or answer."""
        if self.turn is None:
            return not self.text.strip()
        return not self.turn.question.strip() or not self.turn.answer.strip()

    def exact_digest(self) -> bytes:
        """8 bytes that name the content to the character."""
        return _digest(self.parts)

    def split_key(self) -> int:
        """64 bits, the same for documents equal but for case and spacing, which may not be on both sides of a split."""
        return int.from_bytes(_digest(tuple(" ".join(part.split()).casefold() for part in self.parts)), "big")


def _digest(parts: tuple[str, ...]) -> bytes:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:  # lengths first, so that ("ab", "c") and ("a", "bc") differ
        data = part.encode("utf-8")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()
