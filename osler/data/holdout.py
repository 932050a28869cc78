"""What is held out of training: documents whose hash is small. A document and its copies share a hash, whichever source has them.

So the choice needs no list of documents and is the same in every source, process and order. A document that one source would hold
out is left out of the training data of all of them. Explicit validation corpora have their own keys, which are left out as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from osler.data.documents import Corpus, Document

Keys = npt.NDArray[np.uint64]


class Limit(NamedTuple):
    """What a source holds out: documents whose key is below `below`, and the one whose key is `only`."""

    below: int = 0
    only: int | None = None


@dataclass(frozen=True)
class HeldOut:
    """The limits of the sources of a mixture, and the sorted keys of explicit validation documents."""

    limits: Mapping[str, Limit]
    keys: Keys

    def by(self, source: str, keys: Keys) -> npt.NDArray[np.bool_]:
        """Return which documents a source holds out."""
        below, only = self.limits[source]
        held = keys < np.uint64(below)
        return held if only is None else held | (keys == np.uint64(only))

    def by_any(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Return which documents are held out of all training data."""
        held = keys < np.uint64(max((limit.below for limit in self.limits.values()), default=0))
        extra = [limit.only for limit in self.limits.values() if limit.only is not None]
        if extra:
            held |= np.isin(keys, np.array(extra, np.uint64))
        if len(self.keys):
            places = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
            held |= self.keys[places] == keys
        return held

    def has(self, document: Document) -> bool:
        """Return whether a document is held out of all training data."""
        return bool(self.by_any(np.array([document.split_key()], np.uint64))[0])


def find_limits(corpora: Mapping[str, Corpus]) -> dict[str, Limit]:
    """Return what each source holds out; reads until a document to hold out and one to learn from are found."""
    return {name: _limit(corpus) for name, corpus in corpora.items()}


def _limit(corpus: Corpus) -> Limit:
    """Return the limit of a corpus: at least one document is held out and one is not, if there are two that differ."""
    if corpus.validation is not None or corpus.holdout_fraction <= 0:
        return Limit()
    below = int(corpus.holdout_fraction * 2**64)
    smallest, largest = 1 << 64, -1
    for number in corpus.order().tolist():
        for document in corpus.kept(number):
            key = document.split_key()
            smallest, largest = min(smallest, key), max(largest, key)
            if smallest < below <= largest:
                return Limit(below)
    if smallest >= largest:
        return Limit()
    return Limit(below, smallest) if below <= smallest else Limit(largest)
