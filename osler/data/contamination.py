"""Which items of exams a document contains, by the words that they share.

An item is found where a document has at least 60 % of the sequences of 13 words in its question, or in the passage that it comes
with. Sequences that several items have are the exam's own phrases ("Which of the following is the most likely ...") and do not
count. One shared sequence would be too little: by that rule a quarter of MedQA's test items are in its own training items.

A question of fewer than 13 words is found where all of it stands and at least half of its options follow within 100 words, or its
answer where it has no options: a sentence of a textbook that begins like a question is no leak. Questions of fewer than 4 words
say too little to be looked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from osler.data.ngrams import Hashes, Places, prefix_sums, sequences, sequences_at, words_of
from osler.tasks.item import ExamItem, points_at_options

SEQUENCE_WORDS = 13
LEAST_WORDS = 4  # of a question that is looked for
COVERAGE = 0.6  # share of its sequences by which an item is found
MOST_ITEMS = 3  # a sequence that more items have is a phrase of the exam
OPTIONS_WITHIN = 100  # words after a short question
FILTER_BITS = 24  # most sequences of a text are in no exam, as a table of so many bits says at once


class _Short(NamedTuple):
    """An item with a short question, its options between spaces, and how many of these make it found."""

    item: int
    options: Sequence[str]
    needed: int


class ExamIndex:
    """The items of some exams, by their ids, to be found in documents."""

    def __init__(self, items: Iterable[ExamItem]) -> None:
        self.ids: list[str] = []
        self.too_short: list[str] = []  # those that are not looked for
        long: dict[tuple[str, ...], list[int]] = {}  # questions and passages, with the numbers of the items that have them
        short: dict[int, list[tuple[list[str], _Short]]] = {}  # by the number of words
        for number, item in enumerate(items):
            self.ids.append(item.id)
            question, context = words_of(item.question), words_of(item.context)
            for words in (question, context):
                if len(words) >= SEQUENCE_WORDS:
                    long.setdefault(tuple(words), []).append(number)
            if len(question) < LEAST_WORDS:
                self.too_short.append(item.id)
            elif len(question) < SEQUENCE_WORDS:
                own = [option for option in item.options if not points_at_options(option)]
                options = [f" {' '.join(words_of(option))} " for option in own or item.options or (item.answer,)]
                short.setdefault(len(question), []).append((question, _Short(number, options, math.ceil(len(options) / 2))))
        self._items_of = list(long.values())
        self._long = _Table([np.unique(sequences(prefix_sums(words), SEQUENCE_WORDS)) for words in long], MOST_ITEMS)
        counted = np.bincount(self._long.owners, minlength=len(long))
        self._needed = np.maximum(1, np.ceil(COVERAGE * counted).astype(np.int64))
        self._short = {
            length: (_Table([_whole(words) for words, _ in asked]), [item for _, item in asked])
            for length, asked in short.items()
        }
        self._beginnings = _Table([_whole(words[:LEAST_WORDS]) for asked in short.values() for words, _ in asked])

    def find(self, words: Sequence[str], sums: Hashes) -> list[str]:
        """Return the ids of the items that are found in a document, given by its words and their prefix sums."""
        found = set[int]()
        long = sequences(sums, SEQUENCE_WORDS)
        if len(passing := self._long.passing(long)):
            _, texts = self._long.look_up(np.unique(long[passing]))
            texts, counts = np.unique(texts, return_counts=True)
            for text in texts[counts >= self._needed[texts]].tolist():
                found.update(self._items_of[text])
        beginnings = self._beginnings.passing(sequences(sums, LEAST_WORDS))
        for length, (table, asked) in self._short.items() if len(beginnings) else ():
            places = beginnings[beginnings <= len(words) - length]
            hits, owners = table.look_up(sequences_at(sums, places, length))
            for end, owner in zip((places[hits] + length).tolist(), owners.tolist(), strict=True):
                after = f" {' '.join(words[end : end + OPTIONS_WITHIN])} "
                if sum(option in after for option in asked[owner].options) >= asked[owner].needed:
                    found.add(asked[owner].item)
        return [self.ids[number] for number in sorted(found)]


def _whole(words: Sequence[str]) -> Hashes:
    """Return the number of the sequence of all the words."""
    return sequences(prefix_sums(words), len(words))


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
        self._bits = FILTER_BITS if len(self._hashes) else 1
        self._filter = np.zeros(1 << self._bits, bool)
        self._filter[self._hashes >> np.uint64(64 - self._bits)] = True

    def passing(self, hashes: Hashes) -> Places:
        """Return the places of the hashes that are in the table, and of a few others."""
        return np.flatnonzero(self._filter[hashes >> np.uint64(64 - self._bits)])

    def look_up(self, hashes: Hashes) -> tuple[Places, Places]:
        """Return which of the hashes are in the table, each as often as it has owners, and these owners."""
        if not len(self._hashes):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        entries = np.searchsorted(self._hashes, hashes).clip(max=len(self._hashes) - 1)
        hits = np.flatnonzero(self._hashes[entries] == hashes)
        counts, ends = self._counts[entries[hits]], self._ends[entries[hits]]
        before = np.cumsum(counts) - counts
        return np.repeat(hits, counts), self.owners[np.repeat(ends - counts - before, counts) + np.arange(counts.sum())]
