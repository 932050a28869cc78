"""Documents, the units that are read, tokenised, held out and shuffled; a corpus of them, and permutations."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from osler.tokenizer.chat import Turn

STRETCH_CHARACTERS = 1 << 25


@dataclass(frozen=True)
class Document:
    """A text, or (with `turn`) a question and its answer whose prompt is not learned.

    `where` ("notes.jsonl:12") is for messages.
    """

    text: str = ""
    turn: Turn | None = None
    where: str = ""

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


@dataclass(frozen=True)
class Mixed:
    """Documents in an order that mixes those within `STRETCH_CHARACTERS`: neighbours in a file or folder are often alike."""

    documents: Iterable[Document]
    seed: int

    def __iter__(self) -> Iterator[Document]:
        stretch: list[Document] = []
        characters = number = 0
        for document in self.documents:
            stretch.append(document)
            characters += sum(map(len, document.parts))
            if characters >= STRETCH_CHARACTERS:
                yield from (stretch[place] for place in permutation(len(stretch), self.seed, number, "stretch"))
                stretch, characters, number = [], 0, number + 1
        yield from (stretch[place] for place in permutation(len(stretch), self.seed, number, "stretch"))


def permutation(count: int, seed: int, *purpose: object) -> npt.NDArray[np.int64]:
    """Return a permutation of `range(count)`; those of different seeds and purposes are independent.

    It is the order of the raw words of a Philox counter generator (Salmon et al. 2011) keyed by a hash. numpy guarantees this
    raw stream in every version, which it does not for `Generator.permutation`.
    """
    name = ":".join(map(str, (seed, *purpose)))
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "big")
    words = np.random.Philox(key=key).random_raw(count)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


def _digest(parts: tuple[str, ...]) -> bytes:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:  # lengths first, so that ("ab", "c") and ("a", "bc") differ
        data = part.encode("utf-8")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()
