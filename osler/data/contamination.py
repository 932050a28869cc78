"""Which items of exams a document contains, by the words that they share.

An item is found where a document has at least 60 % of the sequences of 13 words in its question, or in the passage that it comes
with. Sequences that several items have are the exam's own phrases ("Which of the following is the most likely ...") and do not
count. One shared sequence would be too little: by that rule a quarter of MedQA's test items are in its own training items.

A question of fewer than 13 words is found where all of it stands and at least half of its options follow within 100 words, or its
answer if it has no options, because a sentence of a textbook that begins like a question is no leak. Questions of fewer than 4
words say too little to be looked for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from osler.data.ngrams import Hashes, Places, Words
from osler.tasks.item import ExamItem, points_at_options

SEQUENCE_WORDS = 13  # the length of the sequences that are compared
LEAST_WORDS = 4  # a shorter question is not looked for
COVERAGE = 0.6  # share of an item's sequences that a document must have
MOST_ITEMS = 3  # a sequence that more items have is a phrase of the exam
OPTIONS_WITHIN = 100  # words after a short question in which its options are looked for
FILTER_BITS = 24  # leading bits of a hash that are compared first: most sequences of a text differ from all of the exam's in them


class _Short(NamedTuple):
    """An item with a short question, its options between spaces, and how many of these make it found."""

    item: int
    options: Sequence[str]
    needed: int


class ExamIndex:
    """The items of some exams, by their ids, to be found in documents."""

    def __init__(self, items: Iterable[ExamItem]) -> None:
        given = list(items)
        self.ids = [item.id for item in given]
        self.too_short: list[str] = []  # ids of items whose questions are not looked for
        long: dict[bytes, list[int]] = {}  # questions and passages, by their sequences, with the items that have them
        short: dict[int, list[tuple[Hashes, _Short]]] = {}  # keys: the number of words
        words = Words([text for item in given for text in (item.question, item.context)])
        sequences = words.sequences(SEQUENCE_WORDS)
        for text, (first, last) in enumerate(pairwise(words.firsts.tolist())):
            number, is_context = divmod(text, 2)
            if last - first >= SEQUENCE_WORDS:
                own = np.unique(sequences[first : last + 1 - SEQUENCE_WORDS])
                long.setdefault(own.tobytes(), []).append(number)
            elif not is_context and last - first < LEAST_WORDS:
                self.too_short.append(self.ids[number])
            elif not is_context:
                item = given[number]
                telling = [option for option in item.options if not points_at_options(option)]
                options = Words(telling or item.options or (item.answer,))
                texts = [f" {' '.join(options.between(*ends))} " for ends in pairwise(options.firsts.tolist())]
                whole = words.sequences_at(np.array([first]), last - first)
                short.setdefault(last - first, []).append((whole, _Short(number, texts, math.ceil(len(texts) / 2))))
        self._items_of = list(long.values())
        self._long = _Table([np.frombuffer(own, np.uint64) for own in long], MOST_ITEMS)
        counted = np.bincount(self._long.owners, minlength=len(long))
        self._needed = np.maximum(1, np.ceil(COVERAGE * counted).astype(np.int64))
        self._short = {
            length: (_Table([whole for whole, _ in asked]), [item for _, item in asked]) for length, asked in short.items()
        }
        beginnings = words.firsts[2 * np.array([item.item for _, asked in self._short.values() for item in asked], np.int64)]
        self._beginnings = _Table([words.sequences_at(beginnings, LEAST_WORDS)])

    def find(self, words: Words) -> dict[int, list[str]]:
        """Return the ids of the items that are found in each text, by its number; texts without any are left out."""
        found: dict[int, set[int]] = {}
        sequences = words.sequences(SEQUENCE_WORDS)
        places, texts = words.texts_of(self._long.passing(sequences), SEQUENCE_WORDS)
        hits, owners = self._long.look_up(sequences[places])
        if len(hits):
            distinct = np.unique(np.stack([texts[hits], owners, sequences[places[hits]].view(np.int64)]), axis=1)
            pairs, counts = np.unique(distinct[:2], axis=1, return_counts=True)
            for text, owner in pairs[:, counts >= self._needed[pairs[1]]].T.tolist():
                found.setdefault(text, set()).update(self._items_of[owner])
        beginnings = self._beginnings.passing(words.sequences(LEAST_WORDS))
        for length, (table, asked) in self._short.items() if len(beginnings) else ():
            places, texts = words.texts_of(beginnings, length)
            hits, owners = table.look_up(words.sequences_at(places, length))
            for text, end, owner in zip(texts[hits].tolist(), (places[hits] + length).tolist(), owners.tolist(), strict=True):
                after = words.between(end, min(end + OPTIONS_WITHIN, int(words.firsts[text + 1])))
                if sum(option in f" {' '.join(after)} " for option in asked[owner].options) >= asked[owner].needed:
                    found.setdefault(text, set()).add(asked[owner].item)
        return {text: [self.ids[number] for number in sorted(numbers)] for text, numbers in found.items()}


class _Table:
    """Sequences with their owners, which are numbered as they are given; sequences of more than `most` owners are left out."""

    def __init__(self, given: Sequence[Hashes], most: int | None = None) -> None:
        hashes = np.concatenate([np.zeros(0, np.uint64), *given])
        order = np.argsort(hashes, kind="stable")
        owners = np.repeat(np.arange(len(given)), [len(own) for own in given])[order]
        self._hashes, counts = np.unique(hashes[order], return_counts=True)
        if most is not None:
            owners = owners[np.repeat(counts <= most, counts)]
            self._hashes, counts = self._hashes[counts <= most], counts[counts <= most]
        self.owners = owners
        self._ends = np.cumsum(counts)
        self._counts = counts
        self._shift = np.uint64(64 - (FILTER_BITS if len(self._hashes) else 1))

    @functools.cached_property
    def _filter(self) -> npt.NDArray[np.bool_]:
        """Return which first bits the hashes have. It is large, so each process makes it only for a table that needs it."""
        found = np.zeros(1 << (64 - int(self._shift)), bool)
        found[self._hashes >> self._shift] = True
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_filter"}

    def passing(self, hashes: Hashes) -> Places:
        """Return the places of the hashes that are in the table, and of a few others."""
        return np.flatnonzero(self._filter[hashes >> self._shift])

    def look_up(self, hashes: Hashes) -> tuple[Places, Places]:
        """Return the places of the hashes that are in the table, each as often as it has owners, and these owners."""
        if not len(self._hashes):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        entries = np.searchsorted(self._hashes, hashes).clip(max=len(self._hashes) - 1)
        hits = np.flatnonzero(self._hashes[entries] == hashes)
        counts, ends = self._counts[entries[hits]], self._ends[entries[hits]]
        before = np.cumsum(counts) - counts
        return np.repeat(hits, counts), self.owners[np.repeat(ends - counts - before, counts) + np.arange(counts.sum())]
