"""What a training step asks of whatever joins the ranks: a loss, a way to hold back communication, an update.

The idea: each rank divides its summed loss by the *mean* number of learned tokens of a rank. Averaging gradients over the ranks,
which is what every engine does, then gives the gradient of the mean loss per learned token of the global batch, however unevenly
the ranks share those tokens. Stateless beyond the model and the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from osler.checkpoint.sharded import whole
from osler.runtime.world import World

LossFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Engine:
    """One process, or an engine that leaves averaged gradients in ``parameter.grad`` as a plain backward pass would."""

    def __init__(
        self,
        loss: LossFunction,
        world: World | None = None,
        accumulating: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """``loss`` sums over this rank's rows; inside ``accumulating()`` a backward pass leaves its gradient on the rank."""
        self.loss = loss
        self.world = world or World()
        self.accumulating = accumulating

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch."""
        loss.backward()

    def update(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], clip_norm: float
    ) -> tuple[Tensor, Tensor]:
        """Clip and make the optimizer's step, or skip it inside its kernel when the gradient is not finite.

        Returns the gradient norm before clipping, and 1 if skipped; both stay on the device.
        """
        grad_norm = whole(torch.nn.utils.clip_grad_norm_(parameters, clip_norm, foreach=True))
        skipped = (~torch.isfinite(grad_norm)).float()
        optimizer.found_inf = skipped  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return grad_norm, skipped
