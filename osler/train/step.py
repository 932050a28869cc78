"""One optimizer step: forward and backward over micro-batches, clip, update. Nothing here waits for the device.

A step whose loss or gradient is not finite is skipped inside the optimizer (``found_inf``), so parameters and moments stay
untouched and the host need not look. Gradients travel between ranks in the backward pass of the last micro-batch only.
Stateless beyond the model and the optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from osler.data.curriculum import rows_per_micro_batch
from osler.data.loader import Batch
from osler.model.loss import nan_gradient_unless_finite
from osler.monitor.model_stats import ProbeRows
from osler.runs.process import Learner


class StepResult(NamedTuple):
    """What a step leaves on the device: mean loss in nats per learned token, gradient norm before clipping, 1 if skipped.

    The loss is a rank's part: its mean over the ranks is that of the global batch. It is NaN on all ranks when none has a token
    to learn; the gradient is zero then.
    """

    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor


class TrainStep:
    """Callable that makes one optimizer step from this rank's rows of one global batch."""

    def __init__(
        self,
        learner: Learner,
        *,
        micro_batch_tokens: int | None = None,
        document_mask: bool = False,
        mark: Callable[[str], None] = lambda part: None,
        around_update: Callable[[Callable[[], ProbeRows]], AbstractContextManager[None]] = lambda rows: nullcontext(),
    ) -> None:
        """``mark`` is called at the end of each part of a step: forward, backward, optimizer. ``around_update`` is a context
        around the update, while the gradients are there; it gets a function that returns the rows of the batch.
        """
        self.parameters = [parameter for parameter in learner.model.parameters() if parameter.requires_grad]
        self.optimizer, self.engine, self.device = learner.optimizer, learner.engine, learner.device
        self.micro_batch_tokens = micro_batch_tokens
        self.document_mask = document_mask
        self.mark, self.around_update = mark, around_update

    def __call__(self, batch: Batch) -> StepResult:
        """Update the parameters from ``batch``, which lies on the CPU, with the optimizer's settings as they are."""
        # Counted on the CPU copy, over the whole batch: micro-batches then weigh by their learned tokens.
        world = self.engine.world
        found_tokens = world.all_reduce_mean(torch.full((), float(batch.num_loss_tokens), device=self.device))
        learned_tokens = found_tokens.clamp_min(1 / world.size)
        total = torch.zeros((), device=self.device)
        num_rows, seq_len = batch.ids.shape
        micro = rows_per_micro_batch(num_rows, seq_len, self.micro_batch_tokens)
        for start in range(0, num_rows, micro):
            rows = slice(start, start + micro)
            ids, labels = (part[rows].to(self.device, non_blocking=True) for part in (batch.ids, batch.labels))
            documents = batch.document_ids[rows].to(self.device, non_blocking=True) if self.document_mask else None
            with nullcontext() if start + micro >= num_rows else self.engine.accumulating():
                loss = nan_gradient_unless_finite(self.engine.loss(ids, labels, documents) / learned_tokens)
                self.mark("forward")
                self.engine.backward(loss)
            total += loss.detach()
            self.mark("backward")
        with self.around_update(lambda: ProbeRows(batch.ids, batch.labels, batch.document_ids if self.document_mask else None)):
            norm_and_skipped = self.engine.update(self.optimizer, self.parameters)
        self.mark("optimizer")
        return StepResult(torch.where(found_tokens > 0, total, math.nan), *norm_and_skipped)
