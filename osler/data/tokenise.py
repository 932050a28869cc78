"""Turn one part of a corpus into tokens: all that worker processes do. The result depends on nothing but the part.

Documents are permuted within stretches of a part. So a part of any size, such as a large compressed file, takes only the
memory of a stretch.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from osler.data.clean import Cleaner
from osler.data.documents import EMPTY, Corpus, Document, batches, permutation
from osler.data.duplicates import Rows, rows_of
from osler.data.shards import Int64Array, MaskArray, TokenArray, token_dtype
from osler.runtime.faults import fault
from osler.tokenizer.bpe import Tokenizer
from osler.tokenizer.chat import encode_examples
from osler.tokenizer.round_trip import Losses

STRETCH_CHARACTERS = 1 << 23
BATCH_CHARACTERS = 1 << 20
LOOK_EVERY = 64  # the start of every 64th document is decoded again, to see what the tokenizer loses
EXAMPLES, EXAMPLE_CHARACTERS = 3, 160  # examples of dropped documents per reason, and the length of each, for the data card


class Task(NamedTuple):
    """A part to tokenise: the number of its corpus, and its place among the parts of the corpus.

    With `only_keys` the part is not made into tokens, because the corpus has enough of them.
    """

    corpus: int
    number: int
    only_keys: bool = False


class Chunk(NamedTuple):
    """Some documents of a part, one after another: split keys, the end of each in the tokens, and bytes of text.

    `masks` is the loss mask of all tokens, and `is_masked` says which documents have one; both are None if no document has one.
    """

    keys: npt.NDArray[np.uint64]
    ends: Int64Array
    num_bytes: Int64Array
    tokens: TokenArray
    masks: MaskArray | None
    is_masked: npt.NDArray[np.bool_] | None
    rows: Rows | None  # hashes by which copies are found


class PartEnd(NamedTuple):
    """The facts about a part that was read to its end: a digest of its documents, their number, and more.

    `drops` counts dropped documents by reason, `examples` has the beginnings of some, `exam_items` the items of exams found.
    """

    digest: str
    documents: int
    drops: dict[str, int]
    examples: dict[str, list[str]]
    exam_items: list[str]
    losses: Losses


@dataclass(frozen=True)
class Tokeniser:
    """Reads and encodes parts of some corpora; without a tokenizer it only computes their digests."""

    corpora: Sequence[Corpus]
    tokenizer: Tokenizer | None

    def results(self, task: Task) -> Iterator[Chunk | PartEnd]:
        """Yield the content of a part, chunk by chunk, and then its end."""
        fault("prepare-part")
        corpus, tokenizer = self.corpora[task.corpus], self.tokenizer
        digest, drops, count = hashlib.blake2b(digest_size=16), Counter[str](), 0
        examples, exam_items = dict[str, list[str]](), set[str]()

        def kept() -> Iterator[Document]:
            nonlocal count
            for document, exact, look in corpus.judged(corpus.parts[task.number]):
                digest.update(exact)
                count += 1
                exam_items.update(look.exam_items)
                if not look.reason:
                    yield document if look.signature is None else replace(document, signature=look.signature)
                    continue
                drops[look.reason] += 1
                if drops[look.reason] <= EXAMPLES and look.reason != EMPTY:
                    examples.setdefault(look.reason, []).append(beginning(document))

        losses = Losses()
        for number, stretch in enumerate(batches(kept(), STRETCH_CHARACTERS)):
            if tokenizer is None:
                continue
            order = permutation(len(stretch), corpus.seed, task.number, number, "stretch").tolist()
            for batch in batches((stretch[place] for place in order), BATCH_CHARACTERS):
                if not task.only_keys:
                    losses.look(tokenizer, (text for document in batch[::LOOK_EVERY] for text in document.texts))
                yield _chunk(tokenizer, batch, corpus.clean, only_keys=task.only_keys)
        yield PartEnd(digest.hexdigest(), count, dict(drops), examples, sorted(exam_items), losses)


def encode(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[tuple[list[int], list[int] | None]]:
    """Return per document its ids with ``<|endoftext|>``, and its loss mask. A text has None, because all of it is learned."""
    texts = iter(tokenizer.encode_batch([document.text for document in documents if document.turn is None]))
    turns = iter(encode_examples(tokenizer, [document.turn for document in documents if document.turn is not None]))
    eos_id = tokenizer.eos_id
    return [([*next(texts), eos_id], None) if document.turn is None else next(turns) for document in documents]


def beginning(document: Document) -> str:
    """Return the first characters of a document, in one line."""
    return " ".join("\n".join(document.texts)[: 2 * EXAMPLE_CHARACTERS].split())[:EXAMPLE_CHARACTERS]


def _chunk(tokenizer: Tokenizer, documents: Sequence[Document], clean: Cleaner | None, *, only_keys: bool) -> Chunk:
    encoded = [([], None) for _ in documents] if only_keys else encode(tokenizer, documents)
    dtype = token_dtype(tokenizer.vocab_size)
    tokens = np.concatenate([np.frombuffer(array("I", ids), np.uint32) for ids, _ in encoded]).astype(dtype)
    masks = is_masked = None
    if any(mask is not None for _, mask in encoded):
        is_masked = np.array([mask is not None for _, mask in encoded])
        masks = np.frombuffer(b"".join(b"\x01" * len(ids) if mask is None else bytes(mask) for ids, mask in encoded), np.uint8)
    return Chunk(
        np.array([document.split_key() for document in documents], np.uint64),
        np.cumsum([len(ids) for ids, _ in encoded], dtype=np.int64),
        np.array([sum(len(text.encode("utf-8")) for text in document.texts) for document in documents], np.int64),
        tokens,
        masks,
        is_masked,
        rows_of([document.content_key() for document in documents], [document.signature for document in documents])
        if clean is not None and clean.config.duplicates != "keep"
        else None,
    )
