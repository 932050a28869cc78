"""Documents, the units that are read, tokenised, held out and shuffled, and a corpus of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from osler.tokenizer.chat import Turn


@dataclass(frozen=True)
class Document:
    """A text, or (with `turn`) a question and its answer whose prompt is not learned.

    `where` ("notes.jsonl:12") is for messages. `source` is the file or kind of text that metrics count the document under.
    """

    text: str = ""
    turn: Turn | None = None
    where: str = ""
    source: str = ""

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the texts in it: the text, or question, thinking (if any) and answer."""
        if self.turn is None:
            return (self.text,)
        if self.turn.thinking is None:
            return (self.turn.question, self.turn.answer)
        return (self.turn.question, self.turn.thinking, self.turn.answer)

    @property
    def is_empty(self) -> bool:
        """Return whether there is nothing to learn: the text, the question or the answer is blank."""
        if self.turn is None:
            return not self.text.strip()
        return not self.turn.question.strip() or not self.turn.answer.strip()

    def exact_digest(self) -> bytes:
        """Return 8 bytes that identify the content to the character."""
        return _digest(self.parts)

    def split_key(self) -> int:
        """Return 64 bits that identify the content but for case and spacing; equal documents go to one side of a split."""
        return int.from_bytes(_digest(tuple(" ".join(part.split()).casefold() for part in self.parts)), "big")


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, and to validate on; both can be iterated repeatedly and always give the same.

    Without `validation` documents, a share `holdout_fraction` of the training documents, chosen by `seed`, takes their place.
    """

    train: Iterable[Document]
    validation: Iterable[Document] | None = None
    holdout_fraction: float = 0.0
    seed: int = 0


def _digest(parts: tuple[str, ...]) -> bytes:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:  # lengths first, so that ("ab", "c") and ("a", "bc") differ
        data = part.encode("utf-8")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()
