"""The words of texts and sequences of them (n-grams) as 64-bit numbers, for whatever looks for copies.

Case and punctuation do not matter. No object is made for a word: the characters of many texts are one array. A sequence costs a
few operations on arrays, whatever its length: with the prefix sums S of v[i] * B^i, where v are the values in it, its number is
(S[end] - S[start]) * B^-start modulo 2^64. A word is such a sequence of characters, and an n-gram is one of words. The
numbers are the same in every process and on every machine.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]

PIECE = 1 << 16  # characters that are split at a time, so that their arrays stay in the cache
_END = "\0"  # ends a text
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse
_INVERSE = pow(_BASE, -1, 1 << 64)


class Words:
    """The words of some texts; text k has those from `firsts[k]` up to but without `firsts[k + 1]`."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._text = "".join(_plain(text) + _END for text in texts)
        firsts, starts, ends, hashes = [np.zeros(1, np.int64)], [_NONE], [_NONE], [np.zeros(0, np.uint64)]
        start = count = 0
        while start < len(self._text):
            stop = start + PIECE
            if stop < len(self._text):  # a word longer than a piece is cut
                stop = max(self._text.rfind(" ", start, stop), self._text.rfind(_END, start, stop)) + 1 or stop
            own_ends_of_texts, own_starts, own_ends, own_hashes = _split(self._text[start:stop])
            firsts.append(np.searchsorted(own_starts, own_ends_of_texts) + count)
            starts.append(own_starts + start)
            ends.append(own_ends + start)
            hashes.append(own_hashes)
            start, count = stop, count + len(own_starts)
        self.firsts: Places = np.concatenate(firsts)
        self._starts, self._ends = np.concatenate(starts), np.concatenate(ends)
        self._sums = _prefix_sums(np.concatenate(hashes))

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def counts(self) -> Places:
        """Return how many words each text has."""
        return np.diff(self.firsts)

    @property
    def letters(self) -> Places:
        """Return how many characters the words of each text have."""
        sums = np.concatenate([[0], np.cumsum(self._ends - self._starts)])
        return np.diff(sums[self.firsts])

    def between(self, first: int, last: int) -> list[str]:
        """Return the words from `first` up to but without `last`, without case."""
        places = zip(self._starts[first:last].tolist(), self._ends[first:last].tolist(), strict=True)
        return [self._text[start:end] for start, end in places]

    def sequences(self, length: int) -> Hashes:
        """Return the numbers of all sequences of `length` words, also of sequences that cross the end of a text."""
        return self.sequences_at(slice(0, max(0, len(self) + 1 - length)), length)

    def sequences_of(self, text: int, length: int) -> Hashes:
        """Return the numbers of the sequences of `length` words in a text; if it has fewer words, the number of all of them."""
        first, last = int(self.firsts[text]), int(self.firsts[text + 1])
        length = min(length, last - first)
        return self.sequences_at(slice(first, last + 1 - length if length else first), length)

    def sequences_at(self, places: Places | slice, length: int) -> Hashes:
        """Return the numbers of the sequences of `length` words that begin at some places."""
        ends = slice(places.start + length, places.stop + length) if isinstance(places, slice) else places + length
        hashes: Hashes = (self._sums[ends] - self._sums[places]) * _powers(_INVERSE, len(self))[places]
        return hashes

    def texts_of(self, places: Places, length: int) -> tuple[Places, Places]:
        """Return the places whose sequences end in the text in which they begin, and the numbers of these texts."""
        texts = np.searchsorted(self.firsts, places, side="right") - 1
        inside = places + length <= self.firsts[texts + 1]
        return places[inside], texts[inside]


_NONE = np.zeros(0, np.int64)


def _plain(text: str) -> str:
    return (text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold().replace(_END, " ")


def _split(text: str) -> tuple[Places, Places, Places, Hashes]:
    """Return where texts end, where words begin and end, and the hashes of the words."""
    characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    edges = np.flatnonzero(np.diff(_is_of_words()[characters], prepend=False, append=False))
    starts, ends = edges[::2], edges[1::2]
    sums = _prefix_sums(characters)
    hashes = (sums[ends] - sums[starts]) * _powers(_INVERSE, len(text))[starts]
    hashes ^= hashes >> np.uint64(32)  # without this mixing, swapping letters of neighbouring words could go unnoticed
    hashes *= np.uint64(0xD6E8FEB86659FD93)
    return np.flatnonzero(characters == ord(_END)), starts, ends, hashes ^ (hashes >> np.uint64(32))


@cache
def _is_of_words() -> npt.NDArray[np.bool_]:
    """Return which characters words are made of: letters and digits."""
    return np.fromiter(map(str.isalnum, map(chr, range(0x110000))), bool, 0x110000)


def _prefix_sums(values: npt.NDArray[np.uint32] | Hashes) -> Hashes:
    sums = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(values * _powers(_BASE, len(values)), out=sums[1:])
    return sums


def _powers(base: int, count: int) -> Hashes:
    """Return at least the first `count` powers of a number, modulo 2^64."""
    return _some_powers(base, max(17, (count - 1).bit_length()))[:count]


@lru_cache(maxsize=4)
def _some_powers(base: int, bits: int) -> Hashes:
    powers = np.full(1 << bits, base, np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)
