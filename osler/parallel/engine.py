"""The interface of a parallel strategy: loss, accumulation without communication, update, and whole tensors for checkpoints.

Each rank divides its summed loss by the *mean* number of learned tokens of a rank. Every strategy averages gradients over the
ranks, so the result is the gradient of the mean loss per learned token of the global batch, however the ranks share those tokens.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from osler.checkpoint.optimizer_state import flatten_optimizer, restore_optimizer
from osler.model.transformer import Transformer
from osler.optim.bf16 import Bf16AdamW, Fp32GradientSums
from osler.runtime.device import give_back_freed_memory
from osler.runtime.sharded import gather_whole, load_whole, whole
from osler.runtime.world import World

ToHost = Callable[[str, str, Tensor], Tensor]
Tensors = Mapping[str, Tensor]
LossFunction = Callable[..., Any]  # a ModelLoss, wrapped or not
Accumulating = Callable[[], AbstractContextManager[None]]
Exchange = Callable[[], None]


@contextmanager
def switched_off(switch: Callable[[bool], Any]) -> Iterator[None]:
    """Switch something off for the context, such as the exchange of gradients."""
    switch(False)
    try:
        yield
    finally:
        switch(True)


class ParallelEngine:
    """Training on one process, or by a strategy that leaves averaged gradients in ``parameter.grad``."""

    leaves_gradients = True  # whether ``parameter.grad`` has the gradient from the backward pass to the update

    def __init__(
        self,
        loss: LossFunction,
        world: World | None = None,
        accumulating: Accumulating = nullcontext,
        exchange: Exchange | None = None,
    ) -> None:
        """``loss`` sums over this rank's rows. Within ``accumulating()`` a backward pass leaves its gradient on the rank.

        ``exchange`` averages the gradients that passes have left; None where ranks talk to each other in every pass.
        """
        self.loss, self.world, self.accumulating, self.exchange = loss, world or World(), accumulating, exchange
        self.sums: Fp32GradientSums | None = None  # of bf16 weights

    def bind(self, optimizer: torch.optim.Optimizer, clip_norm: float) -> None:
        """Bind the optimizer of the parameters; called once, before a checkpoint is restored or a step is made."""
        self.clip_norm = clip_norm
        if isinstance(optimizer, Bf16AdamW):
            self.sums = Fp32GradientSums(parameter for group in optimizer.param_groups for parameter in group["params"])
            self.accumulating = partial(self.sums.accumulating, self.accumulating)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch."""
        loss.backward()

    def discard(self, optimizer: torch.optim.Optimizer) -> None:
        """Forget the gradients of passes that were given up, and give their memory back."""
        optimizer.zero_grad(set_to_none=True)
        if self.sums is not None:
            self.sums.sums.clear()
        give_back_freed_memory()

    def update(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], apart: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor]:
        """Clip the gradients and make the optimizer's step, which its kernel skips when a gradient is not finite.

        The gradients of ``apart`` are clipped by a norm of their own. Return the norm of the other gradients before clipping, and
        1 for a skipped step, else 0; both stay on the device.
        """
        norms = [
            whole(torch.nn.utils.clip_grad_norm_(part, self.clip_norm, foreach=True)) for part in (parameters, apart) if part
        ]
        grad_norm = norms[0]
        skipped = (~torch.isfinite(torch.stack(norms)).all()).float()
        optimizer.found_inf = skipped  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return grad_norm, skipped

    def parts(
        self, model: Transformer, optimizer: torch.optim.Optimizer, to_host: ToHost | None = None
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Return the parts of a checkpoint: whole tensors of model and optimizer, on rank 0 only, and the optimizer's JSON.

        ``to_host(part, name, tensor)`` copies a gathered tensor off the device; see ``gather_whole``.
        """
        weights, moments, state = self._tensors(model, optimizer)
        parts = {
            part: gather_whole(tensors, keep=self.world.is_first, to_host=partial(to_host, part) if to_host else None)
            for part, tensors in {"model": weights, "optimizer": moments}.items()
        }
        return parts, state

    def _tensors(self, model: Transformer, optimizer: torch.optim.Optimizer) -> tuple[Tensors, Tensors, dict[str, Any]]:
        return model.state_dict(), *flatten_optimizer(optimizer, model.named_parameters())

    def restore(
        self, model: Transformer, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensors], state: Mapping[str, Any]
    ) -> None:
        """Load what ``parts`` of any engine returned."""
        load_whole(model, tensors["model"])
        restore_optimizer(optimizer, model.named_parameters(), tensors["optimizer"], state)

    def plain_model(self, model: Transformer, dtype: torch.dtype | None = None) -> Transformer:
        """Return the model that evaluation and sampling use, neither sharded nor compiled; every rank must call this.

        The plain model computes in ``dtype`` and shares the weights. Sharded weights are gathered for it, so drop it after use.
        """
        return model.eager_copy(self.whole_weights(model), dtype)

    def whole_weights(self, model: Transformer) -> dict[str, Tensor]:
        """Return the state dict with whole tensors, on every rank."""
        return {name: whole(tensor) for name, tensor in model.state_dict().items()}
