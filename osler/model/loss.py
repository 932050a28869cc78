"""The loss of training as one module, which a parallel engine wraps and a compiler compiles.

Shape legend: B batch, T tokens, D hidden.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from osler.model.transformer import Transformer
from osler.ops.cross_entropy import linear_cross_entropy
from osler.runtime.faults import poisoned


class ModelLoss(nn.Module):
    """A loss and its model in one module, whose forward pass goes from tokens to a number."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model


class SummedLoss(ModelLoss):
    """Map (ids, labels, document ids or None) to the summed cross-entropy in nats; fit for ``torch.compile``."""

    def forward(self, ids_BT: Tensor, labels_BT: Tensor, document_BT: Tensor | None) -> Tensor:
        return self.of_hidden(self.model(ids_BT, document_BT=document_BT), labels_BT)

    def of_hidden(self, hidden_BTD: Tensor, labels_BT: Tensor) -> Tensor:
        """Compute the part after the last block, which can be compiled by itself."""
        features, weight = self.model.head(hidden_BTD)
        return linear_cross_entropy(features, weight, labels_BT.flatten(), vocab_size=self.model.config.vocab_size)


def nan_gradient_unless_finite(loss: Tensor) -> Tensor:
    """Return the same loss; one that is not finite gets gradients of NaN.

    Some of its gradients could be finite, and then one rank would skip the step and another would not.
    """
    scale = math.nan if poisoned("train-loss") else 0.0
    return loss * (1.0 + scale * loss.detach())  # 1, or NaN
