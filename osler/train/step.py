"""One optimizer step: forward and backward over micro-batches, clip, update. Nothing here waits for the device.

A step whose gradient is not finite is skipped inside the fused optimizer kernel (``found_inf``), so parameters and moments stay
untouched and the host need not look. Ranks talk once per step, in the backward pass of the last micro-batch. Stateless beyond
the model and the optimizer.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from osler.data.loader import Batch
from osler.model.transformer import Transformer
from osler.optim.build import set_lr
from osler.parallel.engine import Engine


class StepResult(NamedTuple):
    """What a step leaves on the device: mean loss in nats per learned token, gradient norm before clipping, 1 if skipped.

    The loss is a rank's part: its mean over the ranks is that of the global batch.
    """

    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor


class TrainStep:
    """Callable that makes one optimizer step from this rank's rows of one global batch."""

    def __init__(
        self,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        engine: Engine,
        *,
        rows_per_micro_batch: int,
        clip_norm: float,
        document_mask: bool,
        device: torch.device,
    ) -> None:
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = optimizer
        self.engine = engine
        self.rows_per_micro_batch = rows_per_micro_batch
        engine.bind(optimizer, clip_norm)
        self.document_mask = document_mask
        self.device = device

    def __call__(self, batch: Batch, lr_scale: float) -> StepResult:
        """Update the parameters from ``batch`` (on the CPU) with every learning rate scaled by ``lr_scale``."""
        # Counted on the CPU copy, over the whole batch: micro-batches then weigh by their learned tokens.
        world = self.engine.world
        learned_tokens = world.mean(torch.full((), float(batch.num_loss_tokens), device=self.device)).clamp_min_(1 / world.size)
        total = torch.zeros((), device=self.device)
        last = batch.ids.shape[0] - self.rows_per_micro_batch
        for start in range(0, batch.ids.shape[0], self.rows_per_micro_batch):
            rows = slice(start, start + self.rows_per_micro_batch)
            ids, labels = (part[rows].to(self.device, non_blocking=True) for part in (batch.ids, batch.labels))
            documents = batch.document_ids[rows].to(self.device, non_blocking=True) if self.document_mask else None
            with nullcontext() if start >= last else self.engine.accumulating():
                loss = self.engine.loss(ids, labels, documents) / learned_tokens
                self.engine.backward(loss)
            total += loss.detach()
        set_lr(self.optimizer, lr_scale)
        return StepResult(total, *self.engine.update(self.optimizer, self.parameters))
