"""Rows of equal length made of documents of any length, in two ways; a row is a pure function of its number.

`StreamPacking` (pretraining) joins the documents of an epoch, epoch after epoch, and cuts rows of seq_len + 1 tokens with stride
seq_len, so every token is predicted once and nothing is padding. The rows that end in one window of the order are permuted: in
consecutive rows a batch would hold pieces of one or two long documents, from which a model learns far less. Its position in the
data is an offset in tokens, so the longer rows of a curriculum begin where the shorter ones ended.
`WholePacking` (fine-tuning) keeps documents whole. Best-fit decreasing combines those of a window in rows of seq_len + 1 tokens.
The documents of the emptiest rows move on to the next window, and the rest of a row is padding. A document longer than a row is
cut into consecutive pieces that share one token, so all of it is learned.
`MixedPacking` takes the rows of a run from several sources, each with a packing of its own.

There is no state, so resume is exact at any row.
"""

from __future__ import annotations

import functools
import logging
import threading
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from osler.data.best_fit import best_fit
from osler.data.documents import permutation
from osler.data.mixture import Mixture
from osler.data.order import CACHED_WINDOWS, Order
from osler.data.shard_set import NotPreparedYet, ShardSet
from osler.data.shards import Int64Array, MaskArray, TokenArray
from osler.ops.labels import IGNORED
from osler.runtime.errors import UserError

logger = logging.getLogger(__name__)

CARRIED_ROWS = 4096  # at most this many rows, or half of a window's, are carried: their documents move on to the next window
FULL = 0.99  # a row that is filled to this share is not carried


class PackedRow(NamedTuple):
    """One row, three int64 arrays of seq_len: input ids, the next token of each (or -100), and its document.

    Documents are numbered 0, 1, ... within the row; padding has the last number.
    """

    ids: Int64Array
    labels: Int64Array
    document_ids: Int64Array


class StreamPacking:
    """Documents joined into an endless stream; rows run on across the end of an epoch.

    The stream begins at token `first_token` of the epochs. A stage that ends has `num_rows` rows: they are permuted among
    themselves, so that together they are the first tokens of the stream, and rows behind them follow in the stream's order. With
    `prompt_loss` every token is learned, whatever the loss masks say.
    """

    def __init__(
        self, order: Order, seq_len: int, *, first_token: int = 0, num_rows: int | None = None, prompt_loss: bool = False
    ) -> None:
        self.order = order
        self.seq_len = seq_len
        self.first_token = first_token
        self.num_rows = num_rows
        self.prompt_loss = prompt_loss
        self._permuted = functools.lru_cache(CACHED_WINDOWS)(self._permute)

    def row(self, index: int) -> PackedRow:
        """Return a row of the stream, in the permuted order."""
        shards = self.order.shards
        epoch, token = self.order.locate(self.first_token + self._cut(index) * self.seq_len)
        parts, size = [], self.seq_len + 1
        room = size
        while room:
            for document, start in self.order.documents_from(epoch, token):
                parts.append(shards.document(document, start, start + room))
                room -= len(parts[-1][0])
                if not room:
                    break
            epoch, token = epoch + 1, 0
        return _packed(parts, size, shards.eos_id, across_documents=True, prompt_loss=self.prompt_loss)

    def _cut(self, index: int) -> int:
        """Return which cut of the stream a row is: token `cut * seq_len` is its first."""
        window = self._window(index)
        return index if window is None else window.start + int(self._permuted(window)[index - window.start])

    def _window(self, index: int) -> range | None:
        """Return the cuts that end in the same window of the order as cut `index`; None where cuts are not permuted."""
        if self.num_rows is not None and index >= self.num_rows:
            return None
        start, stop = map(self._first_cut, self.order.window_at(self.first_token + (index + 1) * self.seq_len))
        return range(start, stop if self.num_rows is None else min(stop, self.num_rows))

    def _first_cut(self, token: int) -> int:
        """Return the first cut that ends with a token or behind it; cut c ends at token first_token + (c + 1) * seq_len."""
        return max(0, -((self.first_token - token) // self.seq_len) - 1)

    def _permute(self, window: range) -> Int64Array:
        return permutation(len(window), self.order.seed, "rows", self.first_token, self.seq_len, window.start)

    def first_needed(self, rows: int) -> int:
        """Return the first token of the epochs that is needed once the first rows have been read."""
        try:
            window = self._window(rows)
            return self.tokens(rows if window is None else window.start)
        except NotPreparedYet:  # the window begins behind those that are prepared
            return self.tokens(min(rows, self._first_cut(max(self.order.epoch(0).ends.tolist(), default=0))))

    def tokens(self, rows: int) -> int:
        """Return how many tokens of the stream the first rows consume; tokens before row 0 count too."""
        return self.first_token + rows * self.seq_len

    @property
    def epoch_tokens(self) -> int | None:
        """Return the tokens of an epoch; None while they are being prepared."""
        return self.order.shards.num_tokens if self.order.shards.is_complete else None

    def padding(self, first: int, stop: int) -> float:
        """Return 0: nothing is padding."""
        return 0.0


class _Pieces(NamedTuple):
    """Pieces of documents: the document of each, its first token in the document, and its tokens."""

    documents: Int64Array
    starts: Int64Array
    lengths: Int64Array

    def take(self, which: Int64Array | slice) -> _Pieces:
        """Return some of the pieces, in the order of an index array or a slice."""
        return _Pieces(*(column[which] for column in self))


_NOTHING = _Pieces(*(np.zeros(0, np.int64) for _ in range(3)))


class _Plan(NamedTuple):
    """The pieces of a window's rows, where each row ends in them, the tokens of each row, and pieces for the next window."""

    pieces: _Pieces
    row_ends: Int64Array
    row_tokens: Int64Array
    carried: _Pieces


class WholePacking:
    """Whole documents and padding; with `drop_torn` a document whose answer would be cut from its question is in no row.

    The first token of a document is never a label, because nothing before it could predict it. Padding is never a label either. A
    window and all before it are planned when one of its rows is first asked for. A plan needs lengths only, and with `drop_torn`
    the loss masks of long documents.
    """

    def __init__(self, order: Order, seq_len: int, *, prompt_loss: bool = False, drop_torn: bool = False) -> None:
        self.order = order
        self.seq_len = seq_len
        self.prompt_loss = prompt_loss
        self.drop_torn = drop_torn
        self._lock = threading.RLock()  # the threads of a loader share the plans
        self._first_rows, self._first_tokens = [0], [0]  # for every planned window, and the next one
        self._carried = [_NOTHING]  # the pieces that each of these windows gets from the window before
        self._plan = functools.lru_cache(CACHED_WINDOWS)(self._plan_window)

    def row(self, index: int) -> PackedRow:
        """Return a row of the endless sequence of epochs."""
        with self._lock:
            window, first_row, _ = self._find(index)
            pieces, row_ends, _, _ = self._plan(window)
        place, shards = index - first_row, self.order.shards
        in_row = slice(int(row_ends[place - 1]) if place else 0, int(row_ends[place]))
        chosen = zip(*(column.tolist() for column in pieces.take(in_row)), strict=True)
        parts = [shards.document(document, start, start + length) for document, start, length in chosen]
        return _packed(parts, self.seq_len + 1, shards.eos_id, across_documents=False, prompt_loss=self.prompt_loss)

    @property
    def rows_of_first_epoch(self) -> int:
        """Return how many rows the first epoch has; later ones may differ by a few."""
        return self._before(len(self.order.epoch(0).ends))[0]

    @property
    def epoch_tokens(self) -> int | None:
        """Return the tokens in the rows of an epoch; with several windows those of its documents, nearly as many.

        None while they are being prepared.
        """
        if not self.order.shards.is_complete:
            return None
        if len(self.order.epoch(1).ends) > 1:
            return self.order.shards.num_tokens
        return self.tokens(self.rows_of_first_epoch)

    def padding(self, first: int, stop: int) -> float:
        """Return the share of the places in rows `first:stop` that is padding."""
        return 1 - (self.tokens(stop) - self.tokens(first)) / ((stop - first) * (self.seq_len + 1))

    def tokens(self, rows: int) -> int:
        """Return how many tokens, without padding, the first rows hold."""
        if rows == 0:
            return 0
        window, first_row, tokens = self._find(rows - 1)  # the row after them may not be prepared yet
        return tokens + int(self._plan(window).row_tokens[: rows - first_row].sum())

    def _find(self, row: int) -> tuple[int, int, int]:
        """Return the window that a row is in, its first row, and the tokens before it; window numbers run through all epochs."""
        with self._lock:
            while self._first_rows[-1] <= row:
                planned = len(self._first_rows) - 1
                if planned and not self._first_rows[-1] and not self.order.has_window(0, planned):
                    raise UserError(f"No document in {self.order.shards.folder} fits into a row of seq_len {self.seq_len}.")
                if self.order.shards.is_complete and len(self.order.epoch(1).ends) == 1:
                    second = len(self.order.epoch(0).ends)  # the number of the second epoch's first window
                    if planned > second:  # later epochs have one window each, and equally many rows
                        (start, tokens), (end, tokens_at_end) = self._before(second), self._before(second + 1)
                        epochs = (row - start) // (end - start)
                        return second + epochs, start + epochs * (end - start), tokens + epochs * (tokens_at_end - tokens)
                self._before(planned + 1)
            window = bisect_right(self._first_rows, row) - 1
            return window, self._first_rows[window], self._first_tokens[window]

    def _before(self, window: int) -> tuple[int, int]:
        """Return how many rows and tokens there are before a window; plans all windows before it."""
        with self._lock:
            for number in range(len(self._first_rows) - 1, window):
                plan = self._plan(number)
                self._first_rows.append(self._first_rows[-1] + len(plan.row_ends))
                self._first_tokens.append(self._first_tokens[-1] + int(plan.row_tokens.sum()))
                self._carried.append(plan.carried)
            return self._first_rows[window], self._first_tokens[window]

    def _place(self, window: int) -> tuple[int, int, bool]:
        """Return the epoch of a window, its number in that epoch, and whether it is the last one there."""
        epoch, number = 0, window
        if not self.order.has_window(0, window):
            first, others = len(self.order.epoch(0).ends), len(self.order.epoch(1).ends)
            epoch, number = 1 + (window - first) // others, (window - first) % others
        return epoch, number, not self.order.has_window(epoch, number + 1)

    def _plan_window(self, window: int) -> _Plan:
        epoch, number, is_last = self._place(window)
        pieces = self._cut(*self.order.window(epoch, number)[:2])
        if number:
            pieces = _Pieces(*(np.concatenate(pair) for pair in zip(self._carried[window], pieces, strict=True)))
        capacity = self.seq_len + 1
        longest_first = np.argsort(-pieces.lengths, kind="stable")
        row_of = np.empty(len(longest_first), np.int64)
        row_of[longest_first] = best_fit(pieces.lengths[longest_first], capacity)
        row_tokens = np.bincount(row_of, pieces.lengths).astype(np.int64)
        emptiest = np.argsort(row_tokens, kind="stable")[: min(CARRIED_ROWS, len(row_tokens) // 2)]
        is_carried = np.zeros(len(row_tokens), bool)
        is_carried[emptiest] = not is_last and row_tokens[emptiest] < FULL * capacity
        kept = np.flatnonzero(~is_carried)
        kept = kept[permutation(len(kept), self.order.seed, self.order.shards.fingerprint_up_to(1), epoch, number, "rows")]
        place_of_row = np.full(len(row_tokens), len(kept), np.int64)
        place_of_row[kept] = np.arange(len(kept))
        by_row = np.argsort(place_of_row[row_of], kind="stable")  # within a row the window's order stays
        counts = np.bincount(place_of_row[row_of], minlength=len(kept))[: len(kept)]
        row_ends = np.cumsum(counts)
        used = int(row_ends[-1]) if len(kept) else 0
        return _Plan(pieces.take(by_row[:used]), row_ends, row_tokens[kept], pieces.take(np.sort(by_row[used:])))

    def _cut(self, documents: Int64Array, lengths: Int64Array) -> _Pieces:
        """Return the pieces of a window's documents."""
        if self.drop_torn:
            pairs = zip(documents.tolist(), lengths.tolist(), strict=True)
            kept = np.array([not is_torn(self.order.shards, *pair, self.seq_len) for pair in pairs], bool)
            if self.order.shards.is_streamed and not kept.all():  # data that are complete at the start are counted there
                what = f"{np.count_nonzero(~kept):,} of the next {len(kept):,} documents of {self.order.shards.folder}"
                logger.warning(f"{what} are examples longer than a row of seq_len {self.seq_len}; they are left out.")
            documents, lengths = documents[kept], lengths[kept]
        counts = np.maximum(1, -(-(lengths - 1) // self.seq_len))
        first = np.cumsum(counts) - counts
        starts = (np.arange(counts.sum()) - np.repeat(first, counts)) * self.seq_len
        return _Pieces(np.repeat(documents, counts), starts, np.minimum(self.seq_len + 1, np.repeat(lengths, counts) - starts))


class MixedPacking:
    """The rows of a stage of a run: each comes from one source, which has a packing of its own."""

    def __init__(
        self, packings: Mapping[str, StreamPacking | WholePacking], mixture: Mixture, skipped: Sequence[int] | None = None
    ) -> None:
        self.packings = packings
        self.mixture = mixture
        self.seq_len = next(iter(packings.values())).seq_len
        self._packings = list(packings.values())
        self._skipped = skipped or [0] * len(packings)  # rows of each source that are passed over

    def row(self, index: int) -> PackedRow:
        """Return a row of the stage."""
        source, row = self.mixture.locate(index)
        return self._packings[source].row(row + self._skipped[source])

    def check_prepared(self, rows: int) -> None:
        """Raise NotPreparedYet while the first rows of the stage are not prepared."""
        for packing, dealt, skipped in zip(self._packings, self.mixture.rows(rows), self._skipped, strict=True):
            if dealt:
                packing.row(dealt + skipped - 1)

    def padding(self, first: int, stop: int) -> float:
        """Return the share of the places in rows `first:stop` that is padding."""
        spans = zip(self._packings, self._rows(first), self._rows(stop), strict=True)
        return sum(packing.padding(a, b) * (b - a) for packing, a, b in spans if b > a) / (stop - first)

    def first_needed(self, rows: int) -> dict[str, int]:
        """Return for each source of a stream the first token that the rows behind the first ones need."""
        counts = zip(self.packings.items(), self._rows(rows), strict=True)
        streams = ((name, packing, count) for (name, packing), count in counts if isinstance(packing, StreamPacking))
        return {name: packing.first_needed(count) for name, packing, count in streams}

    def tokens(self, rows: int) -> dict[str, int]:
        """Return how many tokens of each source a run has consumed after the first rows of this stage."""
        counts = zip(self.packings.items(), self._rows(rows), strict=True)
        return {name: packing.tokens(count) for (name, packing), count in counts}

    def _rows(self, count: int) -> list[int]:
        return [rows + skipped for rows, skipped in zip(self.mixture.rows(count), self._skipped, strict=True)]

    def bytes_per_token(self, rows: int) -> float | None:
        """Return the bytes of text per token of the mixture, over the data up to the first rows of the stage.

        None when only a part of the tokens is learned.
        """
        if not all(packing.prompt_loss for packing in self._packings):
            return None
        consumed = zip(self.mixture.fractions, self._packings, self.tokens(rows).values(), strict=True)
        # A source that rests may have no shard yet.
        return sum(share * packing.order.shards.bytes_per_token(tokens) for share, packing, tokens in consumed if share)

    @property
    def epoch_tokens(self) -> dict[str, int | None]:
        """Return the tokens of an epoch of each source; None while it is being prepared."""
        return {name: packing.epoch_tokens for name, packing in self.packings.items()}


Packing = StreamPacking | WholePacking | MixedPacking


def is_torn(shards: ShardSet, document: int, length: int, seq_len: int) -> bool:
    """Whether a document is an example longer than a row; cutting it would separate its answer from its question.

    An example is a document of which a part is learned. A document that is learned as a whole may be cut anywhere.
    """
    if length <= seq_len + 1:
        return False
    mask = shards.document(document)[1]
    return mask is not None and not mask.all()


def torn_lengths(shards: ShardSet, seq_len: int) -> list[int]:
    """Return the lengths of the examples that are longer than a row."""
    numbers = range(shards.num_shards)
    documents = enumerate(length for number in numbers for length in shards.lengths(number).tolist())
    return [length for document, length in documents if is_torn(shards, document, length, seq_len)]


def _packed(
    parts: Sequence[tuple[TokenArray, MaskArray | None]], size: int, eos_id: int, *, across_documents: bool, prompt_loss: bool
) -> PackedRow:
    """Return the row that joins pieces of documents, each with its loss mask (None: all its tokens are learned).

    With `across_documents` the first token of a document is learned from the end of the document before. A row in the middle of a
    long question has no token to learn. It is learned as text, because a batch of such rows alone would have no loss.
    """
    lengths = [len(tokens) for tokens, _ in parts]
    used = sum(lengths)
    ids = np.full(size, eos_id, np.int64)
    ids[:used] = np.concatenate([tokens for tokens, _ in parts])
    document_ids = np.full(size, len(parts), np.int64)
    document_ids[:used] = np.repeat(np.arange(len(parts)), lengths)
    may_learn = np.ones(size - 1, bool) if across_documents else document_ids[1:] == document_ids[:-1]
    may_learn[max(0, used - 1) :] = False
    learned = may_learn
    if not prompt_loss and any(mask is not None for _, mask in parts):
        masks = [np.ones(len(tokens), bool) if mask is None else mask.astype(bool) for tokens, mask in parts]
        learned = np.zeros(size - 1, bool)
        learned[: used - 1] = may_learn[: used - 1] & np.concatenate(masks)[1:]
        if not learned.any():
            learned = may_learn
    return PackedRow(ids[:-1], np.where(learned, ids[1:], IGNORED), document_ids[:-1])
