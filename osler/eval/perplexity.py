"""How many bits a model needs for a byte of held-out text: the one language-model score that does not depend on the
tokenizer.

``bits_per_byte = nats / ln 2 / bytes``, where the nats are summed over every token of the held-out set, each predicted
exactly once, and the bytes are those of its UTF-8 text. The end-of-text token after a document is predicted like any
other (a code must say where a document ends) and has no bytes.

``windows`` cuts documents that are longer than a row. Without overlap every window starts blind, which costs some bits;
with ``overlap`` a window repeats that many tokens of the one before as context, which are read and not scored again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from math import exp, log
from typing import Any

import torch
from torch import Tensor

from osler.errors import UserError
from osler.model.transformer import Transformer
from osler.ops.cross_entropy import linear_logprobs
from osler.ops.labels import IGNORED
from osler.runtime.stop import AskedToStop, asked
from osler.runtime.world import World

_SORT_WINDOWS = 4096  # windows sorted by length at a time: less padding, and the sum does not depend on order


@dataclass(frozen=True)
class HeldOut:
    """What a model paid for a held-out set."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per token; comparable only between models of one tokenizer."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / log(2) / self.bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**vars(self), "loss": self.loss, "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}


def measure(
    model: Transformer, batches: Iterable[tuple[Tensor, ...]], total_bytes: int, world: World | None = None
) -> HeldOut:
    """The cost of ``batches`` of (ids_BT, labels_BT) or (ids_BT, labels_BT, document_BT).

    ``labels_BT[b, t]`` is the token after ``ids_BT[b, t]``, or -100 where nothing is predicted; attention stays inside
    a document. ``total_bytes`` is the size of the text that the labels spell. The ranks of ``world`` give the same
    batches and share them. Stops with UserError when there is no text, and with AskedToStop when training is to end.
    """
    world = world or World()
    device = next(model.parameters()).device
    nats, tokens = 0.0, 0
    training = model.training
    model.eval()
    with torch.no_grad():
        for batch in takewhile(lambda _: not asked(), islice(batches, world.rank, None, world.size)):
            ids, labels = batch[0].to(device), batch[1].to(device)
            document = batch[2].to(device) if len(batch) > 2 else None
            scored = labels != IGNORED
            if not scored.any():
                continue
            features, weight = model.head(model(ids, document_BT=document)[scored])
            logp, _ = linear_logprobs(features, weight, labels[scored], vocab_size=model.config.vocab_size)
            nats -= logp.double().sum().item()
            tokens += int(scored.sum())
    model.train(training)
    nats, scored_tokens, left = world.all_reduce_sum(nats, tokens, asked())
    if left:
        raise AskedToStop
    if scored_tokens == 0 or total_bytes <= 0:
        raise UserError(
            "The held-out set has no text: there is nothing to measure. Hold out a larger part of the data."
        )
    return HeldOut(nats=nats, tokens=int(scored_tokens), bytes=total_bytes)


def windows(
    documents: Iterable[Sequence[int]], *, seq_len: int, start_id: int, overlap: int = 0
) -> Iterator[tuple[list[int], list[int]]]:
    """(inputs, labels) of at most ``seq_len`` tokens in which every token of every document is a label exactly
    once.

    ``start_id`` (the end-of-text token) stands before a document's first token. ``overlap`` in [0, seq_len) is the
    number of tokens a window repeats from the one before; their labels are -100.
    """
    if not 0 <= overlap < seq_len:
        raise ValueError(f"overlap {overlap} must be at least 0 and less than seq_len {seq_len}")
    for document in documents:
        ids = [start_id, *map(int, document)]
        scored = 1  # the first token not yet a label
        while scored < len(ids):
            first = max(0, scored - 1 - overlap)
            last = min(len(ids) - 1, first + seq_len)
            labels = [ids[t] if t >= scored else IGNORED for t in range(first + 1, last + 1)]
            yield ids[first:last], labels
            scored = last + 1


def batches(rows: Iterable[tuple[list[int], list[int]]], *, batch_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows of similar length together, right-padded (label -100), at most ``batch_tokens`` with padding but at
    least one row.
    """
    pending: list[tuple[list[int], list[int]]] = []
    for row in rows:
        pending.append(row)
        if len(pending) == _SORT_WINDOWS:
            yield from _padded(pending, batch_tokens)
            pending = []
    yield from _padded(pending, batch_tokens)


def _padded(rows: list[tuple[list[int], list[int]]], batch_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    rows.sort(key=lambda row: -len(row[0]))
    start = 0
    while start < len(rows):
        width = len(rows[start][0])
        part = rows[start : start + max(1, batch_tokens // width)]
        start += len(part)
        ids_BT = torch.zeros(len(part), width, dtype=torch.int64)
        labels_BT = torch.full((len(part), width), IGNORED, dtype=torch.int64)
        for b, (ids, labels) in enumerate(part):
            ids_BT[b, : len(ids)] = torch.tensor(ids)
            labels_BT[b, : len(labels)] = torch.tensor(labels)
        yield ids_BT, labels_BT
