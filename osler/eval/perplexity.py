"""How many bits a model needs for a byte of held-out text: the one score of a language model that does not depend on its
tokenizer.

``bits_per_byte = nats / ln 2 / bytes``. The nats are summed over every token of the text, each predicted exactly once, and the
bytes are those of the text in UTF-8. The end-of-text token after a document is predicted like any other, because a code must
say where a document ends; it has no bytes.

``windows`` cuts documents that are longer than a row. Without overlap every window starts without context, which costs some
bits; with ``overlap`` it reads that many tokens of the window before once more, and does not score them again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from math import exp, log

from torch import Tensor

from osler.eval.logprobs import LabelledRow, evaluating, label_logprobs, padded_batches
from osler.model.transformer import Transformer
from osler.ops.labels import IGNORED
from osler.runtime.errors import UserError
from osler.runtime.stop import AskedToStop, asked
from osler.runtime.world import World

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
