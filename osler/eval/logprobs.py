"""Log-probabilities of labelled tokens, over rows of any length: exams by likelihood and bits per byte both add them up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from osler.model.transformer import Transformer
from osler.ops.cross_entropy import linear_logprobs
from osler.ops.labels import IGNORED

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
