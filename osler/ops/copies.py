"""Earlier tokens of a row as further entries of the softmax over the vocabulary (CopyNet, arXiv 1603.06393).

A word can be predicted by its logit, and by every place of the row where it has already stood, whose score says how well the
context there fits. One softmax runs over both, so the word's logit becomes

    log(exp(logit) + sum of exp(score) over the places of the word)

A rare word that stood in the row a moment ago is then as easy to predict as a frequent one, however small its logit is.

Shape legend: B rows, T tokens of a row, S places that can be copied, N tokens of all rows, C tokens of one chunk, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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


def log_masses(ids_BS: Tensor, score_BTS: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp of the scores of all places, and of the places where the label stands, each [B * T].

    They are all that a loss needs to know of copies; both have gradients.
    """
    elsewhere_BTS = labels_BT[:, :, None] != ids_BS[:, None, :]
    of_label_BT = score_BTS.masked_fill(elsewhere_BTS, NEVER).logsumexp(-1)
    return score_BTS.logsumexp(-1).flatten(), of_label_BT.flatten()


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
