"""The order of a source's tokens, computed from (seed, the shards' fingerprints, `first_window_tokens`, epoch) and nothing else.

An epoch is a sequence of windows of shards, and the documents of a window are permuted. The first epoch takes the shards as they
were written, in windows that grow to `WINDOW_SHARDS`. So a run may begin while later shards are still being written, and it sees
the same order as a run over finished data. The first window has `first_window_tokens` or more (unless those are more than
`WINDOW_SHARDS`), because a model that begins with a few long documents, such as books, learns far less. A window that is not
written yet raises NotPreparedYet. Later epochs permute all shards and then group them into windows.

Any window can be computed at once, on any rank, after any number of restarts, so a resume needs nothing but a position.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from osler.data.documents import permutation
from osler.data.shard_set import ShardSet
from osler.data.shards import Int64Array

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
        self._epochs = functools.lru_cache(3)(self._epoch)  # a packing needs the first two to know where any other begins
        self.window = functools.lru_cache(CACHED_WINDOWS)(self._window)

    def epoch(self, epoch: int) -> Epoch:
        """Return an epoch. While shards are being written, the first one has the windows that are complete.

        Raises NotPreparedYet for a later epoch while shards are being written.
        """
        if epoch and not self.shards.is_complete:
            self.shards.refresh()
            if not self.shards.is_complete:
                raise self.shards.not_yet()
        is_complete = self.shards.is_complete  # read before the number of shards, which may grow in between
        return self._epochs(epoch, self.shards.num_shards, is_complete)

    def has_window(self, epoch: int, number: int) -> bool:
        """Return whether an epoch has a window of this number; raises NotPreparedYet while that is not known yet."""
        if number >= len(self.epoch(epoch).ends):
            self.shards.refresh()
            if number >= len(self.epoch(epoch).ends) and not self.shards.is_complete:
                raise self.shards.not_yet()
        return number < len(self.epoch(epoch).ends)

    def locate(self, token: int) -> tuple[int, int]:
        """Return the epoch of a token of the endless sequence of epochs, and its place in that epoch."""
        ends = self.epoch(0).ends
        if len(ends) and token < ends[-1]:
            return 0, token
        if self.has_window(0, len(ends)):  # it has grown
            return self.locate(token)
        return divmod(token, self.shards.num_tokens)

    def window_at(self, token: int) -> tuple[int, int]:
        """Return the first token and the end of the window that a token is in, all of the endless sequence of epochs."""
        epoch, place = self.locate(token)
        ends = self.epoch(epoch).ends
        number = int(np.searchsorted(ends, place, side="right"))
        before = token - place
        return before + (int(ends[number - 1]) if number else 0), before + int(ends[number])

    def first_shard(self, token: int) -> int:
        """Return the first shard that the first epoch needs from a token on; later epochs are not considered."""
        epoch = self.epoch(0)
        return int(epoch.borders[np.searchsorted(epoch.ends, token, side="right")])

    def documents_from(self, epoch: int, token: int) -> Iterator[tuple[int, int]]:
        """Yield the documents from a token of an epoch to its end, each with the token in it to start at.

        This is 0 for all but the first document.
        """
        number = int(np.searchsorted(self.epoch(epoch).ends, token, side="right"))
        while self.has_window(epoch, number):
            window = self.window(epoch, number)
            for place in range(int(np.searchsorted(window.ends, token, side="right")), len(window.documents)):
                end = int(window.ends[place])
                yield int(window.documents[place]), token - (end - int(window.lengths[place]))
                token = end
            number += 1

    def _epoch(self, epoch: int, count: int, is_complete: bool) -> Epoch:
        shards = self.shards
        if epoch == 0:
            borders, first = [0], int(np.searchsorted(shards.ends_of_tokens[:count], shards.first_window_tokens)) + 1
            while (end := borders[-1] + min(max(borders[-1], first), WINDOW_SHARDS)) <= count:
                borders.append(end)
            if is_complete and borders[-1] < count:
                borders.append(count)
            numbers = np.arange(borders[-1], dtype=np.int64)
        else:
            numbers = permutation(count, self.seed, shards.fingerprint, epoch, "shards")
            borders = [*range(0, count, WINDOW_SHARDS), count]
        tokens = np.cumsum(np.diff(shards.ends_of_tokens[:count], prepend=0)[numbers])
        return Epoch(numbers, np.array(borders), tokens[np.array(borders[1:], np.int64) - 1])

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
