"""One optimizer step: forward and backward over micro-batches, clip, update. Nothing here waits for the device.

A step whose gradient is not finite is skipped inside the optimizer (``found_inf``), so parameters and moments stay
untouched and the host need not look. Stateless beyond the model and the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from osler.data.curriculum import rows_per_micro_batch
from osler.data.loader import Batch
from osler.model.transformer import Transformer
from osler.ops.cross_entropy import linear_cross_entropy
from osler.optim.build import set_lr

LossFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class StepResult(NamedTuple):
    """What a step leaves on the device: mean loss in nats per learned token, gradient norm before clipping, 1 if skipped."""

    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor


def summed_loss(model: Transformer) -> LossFunction:
    """A function of (ids, labels, document ids or None) to the summed cross-entropy in nats; fit for ``torch.compile``."""

    def loss(ids_BT: Tensor, labels_BT: Tensor, document_BT: Tensor | None) -> Tensor:
        features, weight = model.head(model(ids_BT, document_BT=document_BT))
        return linear_cross_entropy(features, weight, labels_BT.flatten(), vocab_size=model.config.vocab_size)

    return loss


class TrainStep:
    """Callable that makes one optimizer step from one global batch."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: LossFunction,
        *,
        micro_batch_tokens: int | None,
        clip_norm: float,
        document_mask: bool,
        device: torch.device,
        mark: Callable[[str], None] = lambda part: None,
    ) -> None:
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = optimizer
        self.loss = loss
        self.micro_batch_tokens = micro_batch_tokens
        self.clip_norm = clip_norm
        self.document_mask = document_mask
        self.device = device
        self.mark = mark  # called at the end of each part of a step: forward, backward, optimizer

    def __call__(self, batch: Batch, lr_scale: float) -> StepResult:
        """Update the parameters from ``batch`` (on the CPU) with every learning rate scaled by ``lr_scale``."""
        # Counted on the CPU copy, over the whole batch: micro-batches then weigh by their learned tokens.
        learned_tokens = max(1, batch.num_loss_tokens)
        total = torch.zeros((), device=self.device)
        num_rows, seq_len = batch.ids.shape
        micro = rows_per_micro_batch(num_rows, seq_len, self.micro_batch_tokens)
        for start in range(0, num_rows, micro):
            rows = slice(start, start + micro)
            ids, labels = (part[rows].to(self.device, non_blocking=True) for part in (batch.ids, batch.labels))
            documents = batch.document_ids[rows].to(self.device, non_blocking=True) if self.document_mask else None
            loss = self.loss(ids, labels, documents) / learned_tokens
            self.mark("forward")
            loss.backward()
            total += loss.detach()
            self.mark("backward")
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm, foreach=True)
        skipped = (~torch.isfinite(grad_norm)).float()
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        set_lr(self.optimizer, lr_scale)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.mark("optimizer")
        return StepResult(total, grad_norm, skipped)
