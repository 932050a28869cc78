"""Earlier tokens of a row as further entries of the softmax over the vocabulary (CopyNet, arXiv 1603.06393).

A word can be predicted by its logit, and by every place of the row where it has already stood, whose score says how well the
context there fits. One softmax runs over both, so the word's logit becomes

    log(exp(logit) + sum of exp(score) over the places of the word)

A rare word that stood in the row a moment ago is then as easy to predict as a frequent one, however small its logit is.

Shape legend: B rows, T tokens of a row, S places that can be copied, N tokens of all rows, C tokens of one chunk, V vocabulary,
P width of the vectors that are compared.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from osler.ops.pieces import causal_pieces
from osler.ops.precision import wide

NEVER = -1e4  # score of a place that cannot be copied: its exponential is 0, and unlike -inf it makes no gradient NaN


class Copies(NamedTuple):
    """The places that chosen tokens of some rows can copy, and their scores in fp32."""

    ids_BS: Tensor  # the tokens at the places of every row
    row_N: Tensor  # the row of each token that predicts
    score_NS: Tensor  # NEVER where a place comes later, or belongs to another document

    def of(self, which: slice | Tensor) -> Copies:
        """Return the copies of some of the tokens."""
        return Copies(self.ids_BS, self.row_N[which], self.score_NS[which])

    def part(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Return the tokens at the places, and the scores, of ``count`` tokens, each [C, S]."""
        return self.ids_BS[self.row_N[start : start + count]], self.score_NS[start : start + count]


def copy_scores(q_BTP: Tensor, k_BSP: Tensor, document_BT: Tensor | None = None, *, start: int = 0) -> Tensor:
    """Return the scores of the first S places of some rows for the T tokens from ``start`` on, [B, T, S] in fp32.

    Place s predicts the token after it, so token t can copy from the places before t, of its own document alone.
    """
    tokens, places = slice(start, start + q_BTP.shape[1]), k_BSP.shape[1]
    place_S = torch.arange(max(tokens.stop, places), dtype=torch.int32, device=q_BTP.device)
    can_copy = place_S[tokens, None] > place_S[:places]
    if document_BT is not None:
        can_copy = can_copy & (document_BT[:, tokens, None] == document_BT[:, None, :places])
    score_BTS = wide(q_BTP @ k_BSP.transpose(1, 2)) * q_BTP.shape[-1] ** -0.5
    return score_BTS.masked_fill(~can_copy, NEVER)


def log_masses_reference(ids_BS: Tensor, score_BTS: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp of the scores of all places, and of the places where the label stands, each [B * T].

    They are all that a loss needs to know of copies; both have gradients.
    """
    elsewhere_BTS = labels_BT[:, :, None] != ids_BS[:, None, :]
    of_label_BT = score_BTS.masked_fill(elsewhere_BTS, NEVER).logsumexp(-1)
    return score_BTS.logsumexp(-1).flatten(), of_label_BT.flatten()


def log_masses(
    q_BTP: Tensor, k_BTP: Tensor, ids_BT: Tensor, labels_BT: Tensor, document_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute :func:`log_masses_reference` of the scores of whole rows in less time and memory."""
    ids_BT, labels_BT = ids_BT.int(), labels_BT.int()  # compared in the forward and in the backward pass
    length, parts = q_BTP.shape[1], []
    for tokens in causal_pieces(length) if q_BTP.device.type == "cpu" else [slice(0, length)]:
        places = slice(tokens.stop)  # no token of a piece copies from a place after the last of them
        ids_BS, own_labels_BT = ids_BT[:, places], labels_BT[:, tokens]
        parts.append(_LogMasses.apply(q_BTP[:, tokens], k_BTP[:, places], ids_BS, own_labels_BT, document_BT, tokens.start))
    of_all_BT, of_label_BT = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return of_all_BT.flatten(), of_label_BT.flatten()


class _LogMasses(torch.autograd.Function):
    """The log-masses of some tokens of each row.

    Exponentials are written once, in the compute dtype, and the backward pass needs neither scores nor mask.
    """

    @staticmethod
    def forward(
        ctx: Any, q_BTP: Tensor, k_BSP: Tensor, ids_BS: Tensor, labels_BT: Tensor, document_BT: Tensor | None, start: int
    ) -> tuple[Tensor, Tensor]:
        score_BTS = copy_scores(q_BTP, k_BSP, document_BT, start=start)
        most_BT = score_BTS.amax(-1)
        exp_BTS = (score_BTS - most_BT[..., None]).exp().to(q_BTP.dtype)
        all_BT = wide(exp_BTS).sum(-1)
        label_BT = (wide(exp_BTS) * (labels_BT[:, :, None] == ids_BS[:, None])).sum(-1)
        divisor_BT = label_BT.clamp_min(torch.finfo(label_BT.dtype).tiny)  # where the label stands nowhere its gradient is 0
        ctx.save_for_backward(q_BTP, k_BSP, ids_BS, labels_BT, exp_BTS, all_BT, divisor_BT)
        return all_BT.log() + most_BT, torch.where(label_BT > 0, label_BT.log() + most_BT, NEVER)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_BTP, k_BSP, ids_BS, labels_BT, exp_BTS, all_BT, label_BT = ctx.saved_tensors
        of_all_BT1, of_label_BT1 = ((grad / mass)[..., None] for grad, mass in zip(grads, (all_BT, label_BT), strict=True))
        is_label_BTS = labels_BT[:, :, None] == ids_BS[:, None]
        grad_BTS = wide(exp_BTS) * (of_all_BT1 + torch.where(is_label_BTS, of_label_BT1, 0)) * q_BTP.shape[-1] ** -0.5
        grad_BTS = grad_BTS.to(q_BTP.dtype)
        return grad_BTS @ k_BSP, grad_BTS.transpose(1, 2) @ q_BTP, None, None, None, None


def copied_logits_reference(logits_CV: Tensor, ids_CS: Tensor, score_CS: Tensor) -> Tensor:
    """Return the logits with copies, by the definition."""
    most_C1 = torch.maximum(logits_CV.amax(-1, keepdim=True), score_CS.amax(-1, keepdim=True))
    exp_CV = (logits_CV - most_C1).exp().scatter_add(1, ids_CS, (score_CS - most_C1).exp())
    return exp_CV.log() + most_C1


def add_copies_(logits_CV: Tensor, ids_CS: Tensor, score_CS: Tensor) -> tuple[Tensor, Tensor]:
    """Add copies to logits in place. Return the logits of the words at all places before and after, each [C, S].

    Only the words that stand in a row are touched, which are few of the vocabulary. Nothing has a gradient.
    """
    before_CS = logits_CV.gather(1, ids_CS)
    most_C1 = score_CS.amax(-1, keepdim=True)
    mass_CV = torch.zeros_like(logits_CV).scatter_add_(1, ids_CS, (score_CS - most_C1).exp())
    after_CS = torch.logaddexp(before_CS, mass_CV.gather(1, ids_CS).log() + most_C1)
    logits_CV.scatter_(1, ids_CS, after_CS)  # all places of a word write the same
    return before_CS, after_CS
