"""Documents, corpora and permutations. A document is the unit that is read, tokenised, held out and shuffled."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BufferedReader, UnsupportedOperation
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt

from osler.data.clean import KEEP, Cleaner, Look
from osler.data.duplicates import Rows
from osler.files.parts import PART_BYTES, File, Part, Parts
from osler.runtime.errors import UserError
from osler.tokenizer.chat import Turn

EMPTY = "empty"  # the reason why a document without text is left out
LOOK_CHARACTERS = 1 << 17  # about this much text is judged at a time


@dataclass(frozen=True)
class Document:
    """A text or, with `turn`, a question with its answer; the question is a prompt, which is not learned.

    `where` ("notes.jsonl:12") is for messages. Documents with the same `group` are learned or held out together. A document's
    near copies are found by its `signature`.
    """

    text: str = ""
    turn: Turn | None = None
    where: str = ""
    group: str = ""
    signature: Rows | None = field(default=None, compare=False, repr=False)

    @property
    def texts(self) -> tuple[str, ...]:
        """Return what the document consists of: its text, or question, thinking (if any) and answer."""
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
        return _digest(self.texts)

    def split_key(self) -> int:
        """Return 64 bits that decide whether the document is held out: a hash of its group, or without one its content key."""
        return _plain_digest((self.group,)) if self.group else self.content_key()

    def content_key(self) -> int:
        """Return 64 bits that identify the content, whatever its case and spacing."""
        return _plain_digest(self.texts)


@dataclass(frozen=True)
class Corpus:
    """Documents in parts. `read` gives the documents of a part, the same ones in any process; it can be pickled.

    `options` are the settings that decide what is read from the files, such as the column. The files of `parts` tell whether
    data have changed. Documents whose hash is below `holdout_fraction` are held out, unless there are `validation` documents.
    `seed` decides the order in which parts and documents are taken, and `clean` leaves documents out. `about` is what the data
    card says of the source, such as its licence.
    """

    parts: Parts | Sequence[Part]
    read: Callable[[Part], Iterable[Document]]
    options: Mapping[str, Any] = field(default_factory=dict)
    validation: Corpus | None = None
    holdout_fraction: float = 0.0
    seed: int = 0
    clean: Cleaner | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> Sequence[File]:
        """Return the files of the parts."""
        return self.parts.files if isinstance(self.parts, Parts) else list(dict.fromkeys(part.file for part in self.parts))

    def order(self) -> npt.NDArray[np.int64]:
        """Return the numbers of the parts in the order in which they are taken."""
        return permutation(len(self.parts), self.seed, "parts")

    def cut(self, min_parts: int) -> Corpus:
        """Return the corpus with its files cut into at least so many parts where they can be; documents in memory stay."""
        return replace(self, parts=Parts(self.parts.files, min_parts)) if isinstance(self.parts, Parts) else self

    def documents(self) -> Iterator[Document]:
        """Yield all documents as they stand in the files."""
        for part in map(Part, self.parts.files) if isinstance(self.parts, Parts) else self.parts:
            yield from self.read(part)

    def judged(self, part: Part) -> Iterator[tuple[Document, bytes, Look]]:
        """Yield the documents of a part with their exact digests and what cleaning says of them; raises UserError."""
        try:
            for batch in batches(self.read(part), LOOK_CHARACTERS):
                given = [document.texts for document in batch if not document.is_empty]
                looks = repeat(KEEP) if self.clean is None else iter(self.clean.looks(given))
                for document in batch:
                    look = KEEP._replace(reason=EMPTY) if document.is_empty else next(looks)
                    yield document, document.exact_digest(), look
        except OSError as error:
            raise UserError(f"{part.file.name} could not be read: {error.strerror or error}.") from error

    def kept(self, number: int) -> Iterator[Document]:
        """Yield the documents of part `number` that are not left out, copies included."""
        return (document for document, _, look in self.judged(self.parts[number]) if not look.reason)


@dataclass(frozen=True)
class _Memory:
    """Stands for a file where documents are in memory."""

    name: str
    size: int
    stamp: str

    def open(self) -> BufferedReader:
        raise UnsupportedOperation(f"{self.name} is in memory")

    def check(self) -> None:
        """Do nothing: memory does not change."""


@dataclass(frozen=True)
class _MemoryPart(Part):
    """A part that brings its documents along."""

    documents: tuple[Document, ...] = ()


def _documents(part: Part) -> Iterable[Document]:
    assert isinstance(part, _MemoryPart)
    return part.documents


def in_memory(
    documents: Iterable[Document], validation: Corpus | None = None, holdout_fraction: float = 0.0, seed: int = 0
) -> Corpus:
    """Return a corpus of documents in memory. They are permuted before they are cut into parts, because neighbours are alike."""
    given = list(documents)
    digest = hashlib.sha256()
    for document in given:
        digest.update(document.exact_digest())
    sizes = [sum(map(len, document.texts)) for document in given]
    file = _Memory("documents", sum(sizes), digest.hexdigest()[:16])
    parts, own, size, start = [], list[Document](), 0, 0
    for place in permutation(len(given), seed, "documents").tolist():
        own.append(given[place])
        size += sizes[place]
        if size >= PART_BYTES:
            parts.append(_MemoryPart(file, start, start + size, documents=tuple(own)))
            own, size, start = [], 0, start + size
    parts.append(_MemoryPart(file, start, start + size, documents=tuple(own)))
    return Corpus(parts, _documents, {}, validation, holdout_fraction, seed)


def batches(documents: Iterable[Document], characters: int) -> Iterator[list[Document]]:
    """Yield documents in lists of at least this many characters; the last list may have fewer."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += sum(map(len, document.texts))
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def permutation(count: int, seed: int, *purpose: object) -> npt.NDArray[np.int64]:
    """Return a permutation of `range(count)`; those of different seeds and purposes are independent.

    It is the order of the raw words of a Philox counter generator (Salmon et al. 2011) keyed by a hash. numpy guarantees this
    raw stream in every version, but not the results of `Generator.permutation`.
    """
    name = ":".join(map(str, (seed, *purpose)))
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "big")
    words = np.random.Philox(key=key).random_raw(count)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


def _plain_digest(texts: tuple[str, ...]) -> int:
    return int.from_bytes(_digest(tuple(" ".join(text.split()).casefold() for text in texts)), "big")


def _digest(texts: tuple[str, ...]) -> bytes:
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:  # lengths first, so that ("ab", "c") and ("a", "bc") differ
        data = text.encode("utf-8")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()
