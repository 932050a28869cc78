"""What is held out of training: documents whose hash is small. A document and its copies share a hash, whichever source has them.

So the choice needs no list of documents and is the same in every source, process and order. A document that one source would hold
out is left out of the training data of all sources. Explicit validation corpora have keys of their own, which are left out too.

If one source holds out a larger share, the others would also lose documents of which it has no copy. If its files are small,
they are read beforehand, so the others lose only copies of what it really holds out. One process reads these files whenever a
tokenizer is trained and whenever a preparation begins or resumes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from osler.data.documents import Corpus, Document
from osler.files.find import PARQUET_ENDING, compression, ending
from osler.files.parts import File
from osler.runtime.errors import UserError

HELD_OUT = "copies of held-out documents"  # the reason why a document is left out
LISTED_BYTES = 1 << 27  # a source with at most this much text is read to list what it holds out, which takes a few seconds
PACKED_TIMES = 4  # bytes of text for a byte of a compressed or parquet file, roughly: snappy and gzip have three, zstd has more

Keys = npt.NDArray[np.uint64]
NO_KEYS: Keys = np.zeros(0, np.uint64)


class HeldOut(NamedTuple):
    """What is held out, of a source or of all training data: documents whose key is below `below`, or in the sorted `keys`."""

    below: int = 0
    keys: Keys = NO_KEYS

    def holds(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Return which documents are held out."""
        held = keys < np.uint64(self.below)
        if len(self.keys):
            held |= self.keys[np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)] == keys
        return held

    def has(self, document: Document) -> bool:
        """Return whether a document is held out."""
        return bool(self.holds(np.array([document.split_key()], np.uint64))[0])


NOTHING = HeldOut()


def keys_of(documents: Iterable[Document]) -> Keys:
    """Return the sorted keys of validation documents."""
    return np.sort(np.array([document.split_key() for document in documents], np.uint64))


def hold_out(corpora: Mapping[str, Corpus], limits: Sequence[HeldOut], keys: Keys) -> HeldOut:
    """Return what sources with these limits hold out together, and with it the sorted keys of explicit validation documents."""
    least = min((limit.below for limit in limits), default=0)
    below, listed = 0, [keys]
    for corpus, limit in zip(corpora.values(), limits, strict=True):
        if limit.below > least and sum(map(_text_bytes, corpus.files)) <= LISTED_BYTES:
            own = keys_of(document for document in corpus.documents() if not document.is_empty)
            listed.append(own[limit.holds(own)])
        else:
            below = max(below, limit.below)
            listed.append(limit.keys)
    return HeldOut(below, np.sort(np.concatenate(listed)))


def _text_bytes(file: File) -> int:
    """Return about how much text is in a file."""
    is_packed = ending(file.name) == PARQUET_ENDING or compression(file.name) is not None
    return file.size * (PACKED_TIMES if is_packed else 1)


def find_limits(corpora: Mapping[str, Corpus]) -> list[HeldOut]:
    """Return what each source holds out. If it is to hold out anything and two documents differ, it holds out some and not all.

    Each source is read until a document to hold out and one to learn from are found. Raises UserError when all are left out.
    """
    return [_limit(name, corpus) for name, corpus in corpora.items()]


def _limit(name: str, corpus: Corpus) -> HeldOut:
    holds_out = corpus.validation is None and corpus.holdout_fraction > 0
    below = int(corpus.holdout_fraction * 2**64) if holds_out else 0
    smallest, largest = 1 << 64, -1
    for document in _kept(name, corpus):
        key = document.split_key()
        smallest, largest = min(smallest, key), max(largest, key)
        if not holds_out or smallest < below <= largest:
            return HeldOut(below)
    if smallest == largest:
        return HeldOut()
    return HeldOut(below, np.array([smallest], np.uint64)) if below <= smallest else HeldOut(largest)


def check_rest(name: str, corpus: Corpus, held: HeldOut) -> None:
    """Raise UserError when all documents that a source keeps are held out. The source is read up to the first to learn from."""
    next(_kept(name, corpus, held))


def _kept(name: str, corpus: Corpus, held: HeldOut = NOTHING) -> Iterator[Document]:
    """Yield the documents of a source that are neither left out nor in `held`; raises UserError when there are none."""
    has_any, dropped = False, Counter[str]()
    for number in corpus.order().tolist():
        for document, _, look in corpus.judged(corpus.parts[number]):
            if reason := look.reason or (HELD_OUT if held.has(document) else ""):
                dropped[reason] += 1
            else:
                has_any = True
                yield document
    if not has_any:
        raise nothing_to_learn(name, dropped)


def nothing_to_learn(name: str, dropped: Mapping[str, int]) -> UserError:
    """Return the error that says why no document of a source is learned."""
    told = ", ".join(f"{reason}: {count:,}" for reason, count in dropped.items() if count)
    found = f"all its documents are left out ({told})" if dropped else "it has no documents"
    return UserError(
        f"There is nothing to learn from in the source {name}: {found}. Change what it reads or its `clean`, or leave it out."
    )
