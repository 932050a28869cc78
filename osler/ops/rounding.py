"""Stochastic rounding to bf16: up or down at random, so that the mean of many roundings is the number.

A weight of 1.0 in bf16 has its neighbours 0.4 and 0.8 % away. Rounding to the nearest loses every update smaller than half of
that; stochastic rounding applies it once in so many steps (Gupta et al., arXiv 1502.02551). A bf16 number is the upper half of an
fp32 word, so adding 16 random bits to the word and cutting off its lower half rounds up with exactly the probability that the cut
half stands for. Numbers that bf16 can represent stay as they are.

The random bits are a hash of (key, position), as in ``ops/sampling.py``: there is no state, so there is nothing to resume.
"""

from __future__ import annotations

import torch
from torch import Tensor

from osler.ops.sampling import mix

_LOW_32 = 0xFFFFFFFF
_LOW_16 = 0xFFFF


def random_bits(key: Tensor, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return three independent draws of 16 bits (int64 [count]) for the positions from ``first`` on, on the device of ``key``.

    ``key`` is an int64 scalar out of ``mix``: keys that differ in few bits would draw the same at neighbouring positions. The
    same key and position give the same bits on every device.
    """
    word = mix(torch.arange(first, first + count, device=key.device) ^ key)
    other = mix((word + 0x1B873593) & _LOW_32)
    return word & _LOW_16, word >> 16, other & _LOW_16


def round_stochastic(x: Tensor, bits: Tensor) -> Tensor:
    """Round fp32 to bf16, up where the part that is cut off plus ``bits`` (integers below 2**16) carries over.

    "Up" is away from zero. Infinity stays; a NaN may become any number.
    """
    word = (x.view(torch.int32) + bits.to(torch.int32)) & ~_LOW_16
    return word.view(torch.float32).to(torch.bfloat16)


def round_stochastic_reference(x: Tensor, bits: Tensor) -> Tensor:
    """Do the same by its definition in float64: the share of the way to the outer neighbour is the probability."""
    nearest = x.to(torch.bfloat16)
    beyond = nearest.abs() > x.abs()
    zero = torch.zeros_like(nearest)
    inside = torch.where(beyond, torch.nextafter(nearest, zero), nearest)
    outside = torch.nextafter(inside, torch.copysign(torch.full_like(inside, torch.inf), x.to(torch.bfloat16)))
    share = (x.double() - inside.double()) / (outside.double() - inside.double())
    return torch.where(share + bits / 2.0**16 >= 1, outside, inside)
