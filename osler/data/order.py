"""The order of documents, computed from (seed, shard fingerprint, epoch).

Each epoch has its own permutation: the sorted raw words of a Philox counter generator (Salmon et al. 2011) keyed by a hash.
numpy guarantees this raw stream in every version, which it does not for `Generator.permutation`. Any epoch can be computed at
once, on any rank, after any number of restarts, so a resume needs nothing but a position.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np

from osler.data.shards import Int64Array, ShardSet

CACHED_EPOCHS = 4


class Order:
    """The permutations of a split's documents under one seed."""

    def __init__(self, shards: ShardSet, seed: int) -> None:
        self.shards = shards
        self.seed = seed
        self.laid_out = functools.lru_cache(CACHED_EPOCHS)(self._lay_out)

    def permutation(self, epoch: int) -> Int64Array:
        """Return all document indices in the order of an epoch (0, 1, ...)."""
        return self.shuffled(self.shards.num_documents, epoch, "documents")

    def shuffled(self, count: int, epoch: int, purpose: str) -> Int64Array:
        """Return a permutation of `range(count)`; those of different purposes are independent."""
        name = f"{self.seed}:{self.shards.fingerprint}:{epoch}:{purpose}"
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "big")
        words = np.random.Philox(key=key).random_raw(count)
        return np.argsort(words, kind="stable").astype(np.int64, copy=False)

    def _lay_out(self, epoch: int) -> tuple[Int64Array, Int64Array]:
        """Return the documents of an epoch in order, and the number of tokens up to the end of each."""
        permutation = self.permutation(epoch)
        return permutation, np.cumsum(self.shards.lengths[permutation])
