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

# The score of a place that cannot be copied, far below all others; unlike -inf it makes no gradient NaN.
NEVER = -1e4
GPU_PIECE = 2048  # tokens of a row whose scores are computed at a time on a GPU, which bounds their memory in longer rows


class Copies(NamedTuple):
    """The places that chosen tokens of some rows can copy, and their scores in fp32."""

    next_ids_BS: Tensor  # the token that followed each place of every row
    row_N: Tensor  # the row of each token that predicts
    score_NS: Tensor  # NEVER where a place comes later, or belongs to another document

    def of(self, which: slice | Tensor) -> Copies:
        """Return the copies of some of the tokens."""
        return Copies(self.next_ids_BS, self.row_N[which], self.score_NS[which])

    def part(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Return what followed the places, and the scores, for ``count`` tokens, each [C, S]."""
        return self.next_ids_BS[self.row_N[start : start + count]], self.score_NS[start : start + count]


def copy_scores(q_BTP: Tensor, k_BSP: Tensor, can_copy_BTS: Tensor) -> Tensor:
    """Return the scores of S places of some rows for T of their tokens, [B, T, S] in fp32."""
    score_BTS = wide(q_BTP @ k_BSP.transpose(1, 2)).mul_(q_BTP.shape[-1] ** -0.5)
    return score_BTS.masked_fill_(~can_copy_BTS, NEVER)


def can_copy(tokens: slice, document_BT: Tensor | None, device: torch.device) -> Tensor:
    """Return which places a part of the tokens of each row can copy from, bool [B or 1, T, S], where S is the end of the part.

    Place s predicts the token after it, so token t can copy from the places before t, of its own document alone.
    """
    place_S = torch.arange(tokens.stop, dtype=torch.int32, device=device)
    earlier_1TS = (place_S[tokens, None] > place_S)[None]
    if document_BT is None:
        return earlier_1TS
    return earlier_1TS & (document_BT[:, tokens, None] == document_BT[:, None, : tokens.stop])


def log_masses_reference(next_ids_BS: Tensor, score_BTS: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp of the scores of all places, and of the places where the label stands, each [B * T].

    They are all that a loss needs to know of copies; both have gradients.
    """
    elsewhere_BTS = labels_BT[:, :, None] != next_ids_BS[:, None, :]
    of_label_BT = score_BTS.masked_fill(elsewhere_BTS, NEVER).logsumexp(-1)
    return score_BTS.logsumexp(-1).flatten(), of_label_BT.flatten()


def log_masses(
    q_BTP: Tensor, k_BTP: Tensor, next_ids_BT: Tensor, labels_BT: Tensor, document_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute :func:`log_masses_reference` of the scores of whole rows in less time and memory."""
    next_ids_BT, labels_BT = next_ids_BT.int(), labels_BT.int()  # compared in the forward and in the backward pass
    length, on_cpu, parts = q_BTP.shape[1], q_BTP.device.type == "cpu", []
    for tokens in causal_pieces(length) if on_cpu else causal_pieces(length, fewest=GPU_PIECE, most=GPU_PIECE):
        places = slice(tokens.stop)  # no token of a piece copies from a place after the last of them
        of_piece = q_BTP[:, tokens], k_BTP[:, places], next_ids_BT[:, places], labels_BT[:, tokens]
        parts.append(_LogMasses.apply(*of_piece, can_copy(tokens, document_BT, q_BTP.device)))
    of_all_BT, of_label_BT = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return of_all_BT.flatten(), of_label_BT.flatten()


class _LogMasses(torch.autograd.Function):
    """The log-masses of some tokens of each row.

    Exponentials are written once, in the compute dtype, and the backward pass needs neither scores nor mask.
    """

    @staticmethod
    def forward(
        ctx: Any, q_BTP: Tensor, k_BSP: Tensor, next_ids_BS: Tensor, labels_BT: Tensor, can_copy_BTS: Tensor
    ) -> tuple[Tensor, Tensor]:
        score_BTS = copy_scores(q_BTP, k_BSP, can_copy_BTS)
        most_BT = score_BTS.amax(-1)
        exp_BTS = score_BTS.sub_(most_BT[..., None]).exp_().to(q_BTP.dtype)
        all_BT = wide(exp_BTS).sum(-1)
        label_BT = (wide(exp_BTS) * (labels_BT[:, :, None] == next_ids_BS[:, None])).sum(-1)
        is_copy_BT = label_BT >= torch.finfo(label_BT.dtype).tiny  # smaller sums have lost their digits
        divisor_BT = torch.where(is_copy_BT, label_BT, torch.inf)  # so that the gradient is 0 where the label cannot be copied
        ctx.save_for_backward(q_BTP, k_BSP, next_ids_BS, labels_BT, exp_BTS, all_BT, divisor_BT)
        return all_BT.log() + most_BT, torch.where(is_copy_BT, label_BT.log() + most_BT, NEVER)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_BTP, k_BSP, next_ids_BS, labels_BT, exp_BTS, all_BT, label_BT = ctx.saved_tensors
        of_all_BT1, of_label_BT1 = ((grad / mass)[..., None] for grad, mass in zip(grads, (all_BT, label_BT), strict=True))
        is_label_BTS = labels_BT[:, :, None] == next_ids_BS[:, None]
        grad_BTS = wide(exp_BTS) * (of_all_BT1 + torch.where(is_label_BTS, of_label_BT1, 0)) * q_BTP.shape[-1] ** -0.5
        grad_BTS = grad_BTS.to(q_BTP.dtype)
        return grad_BTS @ k_BSP, grad_BTS.transpose(1, 2) @ q_BTP, None, None, None


def copied_logits_reference(logits_CV: Tensor, ids_CS: Tensor, score_CS: Tensor) -> Tensor:
    """Return the logits with copies, by the definition; ``ids_CS`` are the words that the places predict."""
    most_C1 = score_CS.amax(-1, keepdim=True)
    mass_CV = torch.zeros_like(logits_CV).scatter_add(1, ids_CS, (score_CS - most_C1).exp())
    log_mass_CV = mass_CV.clamp_min(torch.finfo(mass_CV.dtype).tiny).log() + most_C1
    return torch.where(mass_CV > 0, torch.logaddexp(logits_CV, log_mass_CV), logits_CV)


def add_copies_(logits_CV: Tensor, ids_CS: Tensor, score_CS: Tensor) -> tuple[Tensor, Tensor]:
    """Add copies to logits in place. Return the logits of the words at all places before and after, each [C, S].

    Logarithms are taken of the words that stand in a row alone, which are few of the vocabulary. It has no right gradients,
    because all places of a word write the same number.
    """
    assert not (torch.is_grad_enabled() and (logits_CV.requires_grad or score_CS.requires_grad))
    before_CS = logits_CV.gather(1, ids_CS)
    most_C1 = score_CS.amax(-1, keepdim=True)
    mass_CV = torch.zeros_like(logits_CV).scatter_add_(1, ids_CS, (score_CS - most_C1).exp())
    after_CS = torch.logaddexp(before_CS, mass_CV.gather(1, ids_CS).log() + most_C1)
    logits_CV.scatter_(1, ids_CS, after_CS)  # all places of a word write the same
    return before_CS, after_CS
