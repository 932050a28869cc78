"""AdamW for weights in bf16: it computes the update in fp32 and rounds everything that it keeps to bf16, stochastically.

Weight, gradient and moments take eight bytes per parameter instead of sixteen. Rounding to the nearest would lose updates smaller
than half a step; a step of bf16 is 0.4 to 0.8 % of a number. Rounded at random, a number is right on average (arXiv 1502.02551,
2010.06192, 2502.20566). The random bits are a hash of (seed, number of the parameter, step, position), so resume is exact, and
skipped steps and micro-batches change nothing. Gradients of several micro-batches are summed in fp32 and rounded once.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from osler.ops.sampling import mix

# Elements updated at a time, so that fp32 copies of a large embedding do not take the memory of a second model. A CPU's chunk
# fits its caches, and a GPU's chunk is enough to fill the GPU.
CPU_CHUNK, GPU_CHUNK = 1 << 16, 1 << 23
_LOW_32, _LOW_16 = 0xFFFFFFFF, 0xFFFF


def keep_in_bf16(model: nn.Module) -> None:
    """Convert the parameters of ``model`` to bf16 in place; buffers, such as RoPE's tables, keep their dtype."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


def random_bits(key: Tensor, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return three independent draws of 16 bits (int64 [count]) for the positions from ``first`` on, on the device of ``key``.

    ``key`` is an int64 scalar out of ``mix``, because keys that differ in few bits would draw the same at neighbouring positions.
    """
    word = mix(torch.arange(first, first + count, device=key.device) ^ key)
    other = mix((word + 0x1B873593) & _LOW_32)
    return word & _LOW_16, word >> 16, other & _LOW_16


def round_stochastic(x: Tensor, bits: Tensor) -> Tensor:
    """Round fp32 to bf16, away from zero where the part that is cut off plus ``bits`` (integers below 2**16) carries over.

    Infinity stays; a NaN may become any number.
    """
    word = (x.view(torch.int32) + bits.to(torch.int32)) & ~_LOW_16
    return word.view(torch.float32).to(torch.bfloat16)


class Fp32GradientSums:
    """Adds up in fp32 the gradients that several backward passes give bf16 parameters.

    Hooks do this before an engine sends a gradient to other ranks. Within ``accumulating`` each gradient is added to the sum of
    its parameter and freed. The next pass outside of it adds its own gradient, and the total, rounded once, becomes the gradient.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.is_accumulating = False
        self.sums: dict[Tensor, Tensor] = {}
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._add)

    @contextmanager
    def accumulating(self, outer: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
        """Sum gradients in a backward pass that is not the step's last, inside the engine's own context ``outer``."""
        self.is_accumulating = True
        try:
            with outer():
                yield
        finally:
            self.is_accumulating = False

    def _add(self, parameter: Tensor) -> None:
        grad, total = parameter.grad, self.sums.pop(parameter, None)
        assert grad is not None
        if self.is_accumulating:
            self.sums[parameter] = grad.float() if total is None else total.add_(grad)
            parameter.grad = None
        elif total is not None:
            grad.copy_(total.add_(grad))


def adamw_update(
    weight: Tensor, mean: Tensor, square: Tensor, grad: Tensor, step: Tensor, group: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weight and the moments after a step of AdamW in fp32; ``step`` counts from 1."""
    weight, mean, square, grad = (tensor.float() for tensor in (weight, mean, square, grad))
    beta1, beta2 = group["betas"]
    mean = mean.lerp(grad, 1 - beta1)
    square = square * beta2 + grad * grad * (1 - beta2)
    scale = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
    weight = weight * (1 - group["lr"] * group["weight_decay"]) - group["lr"] / (1 - beta1**step) * mean / scale
    return weight, mean, square


class Bf16AdamW(torch.optim.Optimizer):
    """AdamW over bf16 parameters. Like torch's fused AdamW it changes nothing when its attribute ``found_inf`` is 1."""

    found_inf: Tensor | None = None

    def __init__(self, groups: Iterable[dict[str, Any]], *, betas: tuple[float, float], eps: float, seed: int = 0) -> None:
        # With `capturable` a loaded state keeps the counts of steps on the device.
        defaults = {"lr": 1e-3, "betas": betas, "eps": eps, "weight_decay": 0.0, "capturable": True}
        super().__init__(groups, defaults)
        self.seed = seed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, without waiting for the device."""
        assert closure is None, "gradients are computed before the step"
        places = [(group, parameter) for group in self.param_groups for parameter in group["params"]]
        for number, (group, parameter) in enumerate(places):
            if parameter.grad is not None:
                self._update(parameter, parameter.grad, group, mix(mix(self.seed & _LOW_32) ^ number))

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any], key: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        skip = None if self.found_inf is None else self.found_inf.bool()
        step = state["step"] + 1
        device_key = mix(step.long() ^ key)
        chunk = GPU_CHUNK if parameter.is_cuda else CPU_CHUNK
        kept = [tensor.view(-1).split(chunk) for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"])]
        for index, (weight, mean, square, part) in enumerate(zip(*kept, grad.reshape(-1).split(chunk), strict=True)):
            new = adamw_update(weight, mean, square, part, step, group)
            drawn = random_bits(device_key, index * chunk, part.numel())
            for place, value, bits in zip((weight, mean, square), new, drawn, strict=True):
                rounded = round_stochastic(value, bits)
                place.copy_(rounded if skip is None else torch.where(skip, place, rounded))
        state["step"].copy_(step if skip is None else torch.where(skip, state["step"], step))
