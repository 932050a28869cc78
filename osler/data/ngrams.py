"""Words of a text and sequences of them (n-grams) as 64-bit numbers, for whatever looks for copies.

Case and punctuation do not matter. A sequence costs a few operations on arrays, whatever its length: with the prefix sums S of
h[i] * B^i, where h are the hashes of the words, it is (S[i + length] - S[i]) * B^-i modulo 2^64. The numbers are the same in
every process and on every machine.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]

MOST_WORDS = 1 << 19  # whose hashes a process remembers
_WORD = re.compile(r"[^\W_]+")
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse
_INVERSE = pow(_BASE, -1, 1 << 64)


class _WordHashes(dict[str, int]):
    def __missing__(self, word: str) -> int:
        if len(self) >= MOST_WORDS:
            self.clear()
        digest = hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest()
        self[word] = value = int.from_bytes(digest, "little")
        return value


_word_hashes = _WordHashes()


def words_of(text: str) -> list[str]:
    """Return the words of a text, without case and punctuation."""
    return _WORD.findall((text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold())


def prefix_sums(words: Sequence[str]) -> Hashes:
    """Return the prefix sums of the hashes of words, from which sequences are computed."""
    sums = np.zeros(len(words) + 1, np.uint64)
    hashes = np.fromiter(map(_word_hashes.__getitem__, words), np.uint64, len(words))
    np.cumsum(hashes * _powers(_BASE, len(words)), out=sums[1:])
    return sums


def sequences(sums: Hashes, length: int) -> Hashes:
    """Return a number for each sequence of `length` words, in order; none when there are fewer words."""
    return sequences_at(sums, slice(0, len(sums) - length), length) if len(sums) > length else sums[:0]


def sequences_at(sums: Hashes, places: Places | slice, length: int) -> Hashes:
    """Return the numbers of the sequences of `length` words that begin at some places."""
    ends = slice(length, None) if isinstance(places, slice) else places + length
    hashes: Hashes = (sums[ends] - sums[places]) * _powers(_INVERSE, len(sums))[places]
    return hashes


def _powers(base: int, count: int) -> Hashes:
    """Return at least the first `count` powers of a number, modulo 2^64."""
    return _some_powers(base, max(12, (count - 1).bit_length()))[:count]


@lru_cache(maxsize=8)
def _some_powers(base: int, bits: int) -> Hashes:
    powers = np.full(1 << bits, base, np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)
