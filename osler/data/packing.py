"""Rows of equal length made of documents of any length, in two ways; a row is a pure function of its number.

`StreamPacking` (pretraining) joins the documents of an epoch, epoch after epoch, and cuts rows of seq_len + 1 tokens with stride
seq_len, so every token is predicted once and nothing is padding. Its position in the data is an offset in tokens, so a curriculum
goes on with longer rows where the shorter ones ended.
`WholePacking` (fine-tuning) keeps documents whole. Best-fit decreasing combines them in rows of seq_len + 1 tokens, and the rest
of a row is padding. A longer document is cut into consecutive pieces that share one token, so all of it is learned.

Row i is found without visiting the rows before it. There is no state, so resume is exact at any row.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from osler.data.order import CACHED_EPOCHS, Order
from osler.data.shards import Int64Array, MaskArray, ShardSet, TokenArray
from osler.ops.labels import IGNORED


class PackedRow(NamedTuple):
    """One row, three int64 arrays of seq_len: input ids, the next token of each (or -100), and its document.

    Documents are numbered 0, 1, ... within the row; padding has the last number.
    """

    ids: Int64Array
    labels: Int64Array
    document_ids: Int64Array


class StreamPacking:
    """Documents joined into an endless stream; rows run on across the end of an epoch.

    Row 0 begins at token `first_token` of the stream. With `prompt_loss` every token is learned, whatever the loss masks say.
    """

    def __init__(self, order: Order, seq_len: int, *, first_token: int = 0, prompt_loss: bool = False) -> None:
        self.order = order
        self.seq_len = seq_len
        self.first_token = first_token
        self.prompt_loss = prompt_loss
        self.tokens_of_epoch = by_source(order, order.shards.source_of_document, order.shards.lengths)

    def row(self, index: int) -> PackedRow:
        """Return tokens index * seq_len ... (index + 1) * seq_len of the stream, counted from `first_token`."""
        shards = self.order.shards
        epoch, offset = divmod(self.first_token + index * self.seq_len, shards.num_tokens)
        builder = _RowBuilder(self.seq_len + 1, shards.eos_id)
        while builder.room:
            permutation, ends = self.order.laid_out(epoch)
            rank = int(np.searchsorted(ends, offset, side="right"))
            while builder.room and rank < len(permutation):
                document = int(permutation[rank])
                start = offset - (int(ends[rank - 1]) if rank else 0)
                builder.add(*shards.document(document, start, start + builder.room))
                offset = int(ends[rank])
                rank += 1
            epoch, offset = epoch + 1, 0
        return builder.finish(across_documents=True, prompt_loss=self.prompt_loss)

    def epochs(self, rows: int) -> float:
        """Return the epochs of the stream up to the end of `rows` rows; those before row 0 count too."""
        return (self.first_token + rows * self.seq_len) / self.order.shards.num_tokens

    def padding(self, first: int, stop: int) -> float:
        """Return 0: nothing is padding."""
        return 0.0

    def tokens_by_source(self, rows: int) -> Int64Array:
        """Return the tokens of each source in the stream up to the end of `rows` rows; those before row 0 count too."""
        shards = self.order.shards
        epoch, offset = divmod(self.first_token + rows * self.seq_len, shards.num_tokens)
        permutation, ends = self.order.laid_out(epoch)
        lengths = shards.lengths[permutation]
        consumed = np.clip(offset - (ends - lengths), 0, lengths)
        return epoch * self.tokens_of_epoch + by_source(self.order, shards.source_of_document[permutation], consumed)


class WholePacking:
    """Whole documents and padding; documents in `left_out` are in no row.

    The first token of a document is never a label, because nothing before it could predict it; padding is none either. Which
    lengths share a row is planned once, because it depends on the lengths alone. An epoch assigns its permutation of the
    documents to those places.
    """

    def __init__(self, order: Order, seq_len: int, *, prompt_loss: bool = False, left_out: Int64Array | tuple[()] = ()) -> None:
        self.order = order
        self.seq_len = seq_len
        self.prompt_loss = prompt_loss
        lengths = order.shards.lengths
        counts = np.maximum(1, -(-(lengths - 1) // seq_len))
        counts[np.asarray(left_out, np.int64)] = 0
        first = np.cumsum(counts) - counts
        self._document = np.repeat(np.arange(len(lengths), dtype=np.int64), counts)
        self._start = (np.arange(len(self._document), dtype=np.int64) - np.repeat(first, counts)) * seq_len
        self._length = np.minimum(seq_len + 1, lengths[self._document] - self._start)
        row_of_place = best_fit(np.sort(self._length)[::-1], seq_len + 1)
        self.rows_per_epoch: int = int(row_of_place.max()) + 1
        self._row_of_place = row_of_place
        self._tokens_of_row = np.bincount(row_of_place, np.sort(self._length)[::-1]).astype(np.int64)
        self.tokens_of_epoch = by_source(order, order.shards.source_of_document[self._document], self._length)
        self._places = np.argsort(row_of_place, kind="stable")  # the places of row 0, of row 1, ...
        self._row_ends = np.cumsum(np.bincount(row_of_place, minlength=self.rows_per_epoch))
        self._plan = functools.lru_cache(CACHED_EPOCHS)(self._plan_epoch)

    def row(self, index: int) -> PackedRow:
        """Return the row at `index % rows_per_epoch` of its epoch."""
        epoch, position = divmod(index, self.rows_per_epoch)
        pieces_by_place, rank, rows = self._plan(epoch)
        planned = int(rows[position])
        begin, end = (int(self._row_ends[planned - 1]) if planned else 0), int(self._row_ends[planned])
        pieces = pieces_by_place[self._places[begin:end]]
        builder = _RowBuilder(self.seq_len + 1, self.order.shards.eos_id)
        for piece in sorted(pieces.tolist(), key=lambda piece: int(rank[self._document[piece]])):
            start = int(self._start[piece])
            stop = start + int(self._length[piece])
            builder.add(*self.order.shards.document(int(self._document[piece]), start, stop))
        return builder.finish(across_documents=False, prompt_loss=self.prompt_loss)

    def epochs(self, rows: int) -> float:
        """Return how many epochs the first `rows` rows are."""
        return rows / self.rows_per_epoch

    def padding(self, first: int, stop: int) -> float:
        """Return the share of the places in rows `first:stop` that is padding."""
        epochs, positions = np.divmod(np.arange(first, stop), self.rows_per_epoch)
        used = sum(int(self._tokens_of_row[self._plan(e)[2][positions[epochs == e]]].sum()) for e in np.unique(epochs).tolist())
        return 1 - used / ((stop - first) * (self.seq_len + 1))

    def tokens_by_source(self, rows: int) -> Int64Array:
        """Return the tokens of each source in the first `rows` rows; visits every document of an epoch."""
        epoch, position = divmod(rows, self.rows_per_epoch)
        pieces_by_place, _, order_of_rows = self._plan(epoch)
        is_consumed = np.zeros(self.rows_per_epoch, bool)
        is_consumed[order_of_rows[:position]] = True
        pieces = pieces_by_place[is_consumed[self._row_of_place]]
        sources = self.order.shards.source_of_document[self._document[pieces]]
        return epoch * self.tokens_of_epoch + by_source(self.order, sources, self._length[pieces])

    def _plan_epoch(self, epoch: int) -> tuple[Int64Array, Int64Array, Int64Array]:
        """Return the piece at each place (longest first), each document's rank in the epoch, and the order of the rows."""
        permutation = self.order.permutation(epoch)
        rank = np.empty_like(permutation)
        rank[permutation] = np.arange(len(permutation))
        pieces_by_place = np.lexsort((self._start, rank[self._document], -self._length))
        return pieces_by_place, rank, self.order.shuffled(self.rows_per_epoch, epoch, "rows")


Packing = StreamPacking | WholePacking


def torn_examples(shards: ShardSet, seq_len: int) -> Int64Array:
    """Return the examples that are longer than a row; cutting them would separate their answers from their questions.

    An example is a document of which a part is learned. A document that is learned as a whole may be cut anywhere.
    """
    masks = ((index, shards.document(index)[1]) for index in np.flatnonzero(shards.lengths > seq_len + 1).tolist())
    return np.array([index for index, mask in masks if mask is not None and not mask.all()], np.int64)


def by_source(order: Order, sources: Int64Array, tokens: Int64Array) -> Int64Array:
    """Return the sum of the tokens of each source."""
    count = len(order.shards.sources)
    return np.bincount(sources, tokens, minlength=count).astype(np.int64)  # sums in fp64, which is exact up to 2**53


def best_fit(lengths: Int64Array, capacity: int) -> Int64Array:
    """Return which row each length goes to: the fullest row that it fits in, else a new one; `lengths` come longest first.

    A bitmask says which amounts of room there are in rows, so the best fit is its lowest bit from `length` on, and 100,000
    documents take a fraction of a second.
    """
    rows = np.empty(len(lengths), dtype=np.int64)
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # row numbers by how much is left
    mask = num_rows = 0
    for place, length in enumerate(lengths.tolist()):
        fitting = mask >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            row = with_room[left].pop()
            if not with_room[left]:
                mask ^= 1 << left
        else:
            left, row = capacity, num_rows
            num_rows += 1
        rows[place] = row
        if left > length:
            with_room[left - length].append(row)
            mask |= 1 << (left - length)
    return rows


class _RowBuilder:
    """Fills a row of `size` = seq_len + 1 tokens from the left."""

    def __init__(self, size: int, eos_id: int) -> None:
        self.room = size
        self._ids = np.full(size, eos_id, dtype=np.int64)
        self._learn = np.zeros(size, dtype=bool)
        self._document_ids = np.zeros(size, dtype=np.int64)
        self._used = 0
        self._documents = 0

    def add(self, ids: TokenArray, mask: MaskArray | None) -> None:
        """Append tokens of one document, with their loss mask (None: all are learned)."""
        place = slice(self._used, self._used + len(ids))
        self._ids[place] = ids
        self._learn[place] = True if mask is None else mask
        self._document_ids[place] = self._documents
        self._used += len(ids)
        self.room -= len(ids)
        self._documents += 1

    def finish(self, *, across_documents: bool, prompt_loss: bool) -> PackedRow:
        """Return the row; with `across_documents` the first token of a document is learned from the end of the one before."""
        learn = self._learn
        if prompt_loss:
            learn[: self._used] = True
        document_ids = self._document_ids
        document_ids[self._used :] = self._documents
        learned = learn[1:] if across_documents else learn[1:] & (document_ids[1:] == document_ids[:-1])
        return PackedRow(self._ids[:-1], np.where(learned, self._ids[1:], IGNORED), document_ids[:-1])
