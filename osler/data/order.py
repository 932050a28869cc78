"""The order of a source's tokens, computed from (seed, the shards' fingerprints, epoch) and nothing else.

An epoch is a sequence of windows of shards, and the documents of a window are permuted. The first epoch takes the shards as they
were written, in windows that grow from one shard to `WINDOW_SHARDS`, so that a run may begin while later shards are still being
written and sees the same order as a run over finished data. Later epochs permute all shards and then group them into windows.

Any window can be computed at once, on any rank, after any number of restarts, so a resume needs nothing but a position.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from osler.data.documents import permutation
from osler.data.shards import Int64Array, ShardSet

WINDOW_SHARDS = 64
CACHED_WINDOWS = 4


class Epoch(NamedTuple):
    """An epoch's shards in order; window k is `shards[borders[k] : borders[k + 1]]` and ends at token `ends[k]` of the epoch."""

    shards: Int64Array
    borders: Int64Array
    ends: Int64Array


class Window(NamedTuple):
    """A window's documents in order, their lengths, and the token of the epoch at which each ends."""

    documents: Int64Array
    lengths: Int64Array
    ends: Int64Array


class Order:
    """The order in which the documents of a split are read, for one seed."""

    def __init__(self, shards: ShardSet, seed: int) -> None:
        self.shards = shards
        self.seed = seed
        self.epoch = functools.lru_cache(3)(self._epoch)  # the first two tell a packing where others begin
        self.window = functools.lru_cache(CACHED_WINDOWS)(self._window)

    def pieces(self, epoch: int, token: int) -> Iterator[tuple[int, int]]:
        """Yield the documents from a token of an epoch to the end of that epoch, each with the token of it to start at.

        That is 0 for all but the first.
        """
        ends = self.epoch(epoch).ends
        for number in range(int(np.searchsorted(ends, token, side="right")), len(ends)):
            window = self.window(epoch, number)
            for place in range(int(np.searchsorted(window.ends, token, side="right")), len(window.documents)):
                end = int(window.ends[place])
                yield int(window.documents[place]), token - (end - int(window.lengths[place]))
                token = end

    def _epoch(self, epoch: int) -> Epoch:
        shards, count = self.shards, self.shards.num_shards
        if epoch == 0:
            numbers, borders = np.arange(count, dtype=np.int64), [0, 1]
            while borders[-1] < count:
                borders.append(min(count, borders[-1] + min(borders[-1], WINDOW_SHARDS)))
        else:
            numbers = permutation(count, self.seed, shards.fingerprint, epoch, "shards")
            borders = [*range(0, count, WINDOW_SHARDS), count]
        tokens = np.cumsum(np.diff(shards.ends_of_tokens, prepend=0)[numbers])
        return Epoch(numbers, np.array(borders), tokens[np.array(borders[1:]) - 1])

    def _window(self, epoch: int, number: int) -> Window:
        numbers, borders, ends = self.epoch(epoch)
        members = numbers[borders[number] : borders[number + 1]].tolist()
        lengths = [self.shards.lengths(shard) for shard in members]
        firsts = map(self.shards.first_document, members)
        documents = [first + np.arange(len(part)) for first, part in zip(firsts, lengths, strict=True)]
        # The first epoch uses the shards up to here alone, so that later ones cannot change its order.
        known = self.shards.fingerprint_up_to(members[-1] + 1) if epoch == 0 else self.shards.fingerprint
        order = permutation(sum(map(len, lengths)), self.seed, known, epoch, number, "documents")
        lengths_in_order = np.concatenate(lengths)[order]
        first = int(ends[number - 1]) if number else 0
        return Window(np.concatenate(documents)[order], lengths_in_order, first + np.cumsum(lengths_in_order))
