"""Log-probabilities of labelled tokens, and how many bits a model needs for a byte of held-out text.

Bits per byte is the one score of a language model that does not depend on its tokenizer: ``nats / ln 2 / bytes``. The nats are
summed over every token of the text, each predicted exactly once, and the bytes are those of the text in UTF-8. The end-of-text
token after a document is predicted like any other, because a code must say where a document ends; it has no bytes.

``windows`` cuts documents that are longer than a row. Without overlap every window starts without context, which costs some
bits; with ``overlap`` it reads that many tokens of the window before once more, and does not score them again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, takewhile
from math import exp, log

import torch
from torch import Tensor

from osler.model.transformer import Transformer
from osler.ops.cross_entropy import linear_logprobs
from osler.ops.labels import IGNORED
from osler.runtime.errors import UserError
from osler.runtime.stop import AskedToStop, asked
from osler.runtime.world import World

BATCH_TOKENS = 16_384  # of a forward pass, padding included
LabelledRow = tuple[list[int], list[int]]  # ids, and behind each the id that follows it, or -100 where none is scored


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Run the model in evaluation mode and without gradients, then put its mode back."""
    training = model.training
    model.eval()
    with torch.no_grad():
        yield
    model.train(training)


def label_logprobs(
    model: Transformer, ids_BT: Tensor, labels_BT: Tensor, document_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return which labels are scored, bool [B, T], and the log-probability of each of them in that order, [N] in nats.

    Attention stays inside a document where ``document_BT`` is given.
    """
    device = model.embed_tokens.weight.device
    ids_BT, labels_BT = ids_BT.to(device), labels_BT.to(device)
    scored_BT = labels_BT != IGNORED
    hidden_BTD = model(ids_BT, document_BT=None if document_BT is None else document_BT.to(device))
    features, weight = model.head(hidden_BTD[scored_BT])
    logprobs_N, _ = linear_logprobs(features, weight, labels_BT[scored_BT], vocab_size=model.config.vocab_size)
    return scored_BT, logprobs_N


def padded_batches(rows: Sequence[LabelledRow], batch_tokens: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield the numbers of some rows of similar length, their ids and their labels, padded on the right with label -100.

    A batch has at most ``batch_tokens``, padding included, but at least one row. Causal attention never looks at the padding.
    """
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row][0]))
    while order:
        width = len(rows[order[0]][0])
        count = max(1, batch_tokens // width)
        chosen, order = order[:count], order[count:]
        ids_BT = torch.zeros(len(chosen), width, dtype=torch.int64)
        labels_BT = torch.full((len(chosen), width), IGNORED, dtype=torch.int64)
        for b, row in enumerate(chosen):
            ids, labels = rows[row]
            ids_BT[b, : len(ids)] = torch.tensor(ids)
            labels_BT[b, : len(labels)] = torch.tensor(labels)
        yield chosen, ids_BT, labels_BT


_SORTED_WINDOWS = 4096  # windows sorted by length at a time: less padding, and the sum does not depend on the order


@dataclass(frozen=True)
class TextScore:
    """What a text costs a model."""

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


def measure(
    model: Transformer, batches: Iterable[tuple[Tensor, ...]], total_bytes: int, world: World | None = None
) -> TextScore:
    """Return what ``batches`` of (ids_BT, labels_BT) or (ids_BT, labels_BT, document_BT) cost the model.

    ``labels_BT[b, t]`` is the token after ``ids_BT[b, t]``, or -100 where nothing is predicted; attention stays inside a
    document. ``total_bytes`` is the size of the text that the labels spell. All ranks of ``world`` are given the same batches
    and share them. Raises UserError when there is no text, and AskedToStop when training is to end.
    """
    world = world or World()
    nats, tokens = 0.0, 0
    with evaluating(model):
        for batch in takewhile(lambda _: not asked(), islice(batches, world.rank, None, world.size)):
            if (batch[1] != IGNORED).any():
                _, logprobs_N = label_logprobs(model, *batch)
                nats -= logprobs_N.double().sum().item()
                tokens += logprobs_N.numel()
    nats, scored_tokens, left = world.all_reduce_sum(nats, tokens, asked())
    if left:
        raise AskedToStop
    if scored_tokens == 0 or total_bytes <= 0:
        raise UserError("The held-out set has no text: there is nothing to measure. Hold out a larger part of the data.")
    return TextScore(nats=nats, tokens=int(scored_tokens), bytes=total_bytes)


def windows(documents: Iterable[Sequence[int]], *, seq_len: int, start_id: int, overlap: int = 0) -> Iterator[LabelledRow]:
    """Cut documents into rows of at most ``seq_len`` tokens in which every token is a label exactly once.

    ``start_id`` (the end-of-text token) stands before a document's first token. A window repeats ``overlap`` tokens of the one
    before, at least 0 and below ``seq_len``; their labels are -100.
    """
    if not 0 <= overlap < seq_len:
        raise ValueError(f"overlap {overlap} must be at least 0 and less than seq_len {seq_len}")
    for document in documents:
        ids = [start_id, *map(int, document)]
        scored = 1  # the first token that is not yet a label
        while scored < len(ids):
            first = max(0, scored - 1 - overlap)
            last = min(len(ids) - 1, first + seq_len)
            labels = [ids[t] if t >= scored else IGNORED for t in range(first + 1, last + 1)]
            yield ids[first:last], labels
            scored = last + 1


def batches(rows: Iterable[LabelledRow], *, batch_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Put windows of similar length together, at most ``batch_tokens`` with padding but at least one window."""
    remaining = iter(rows)
    while pending := list(islice(remaining, _SORTED_WINDOWS)):
        for _, ids_BT, labels_BT in padded_batches(pending, batch_tokens):
            yield ids_BT, labels_BT
