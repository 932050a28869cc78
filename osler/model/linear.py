"""A bias-free linear layer whose master weight may be wider than the compute dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """y = x Wᵀ with W cast to the dtype of x: fp32 master weights, bf16 compute, no autocast state to carry around."""

    def __init__(self, in_size: int, out_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_size, in_size))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def joint_linear(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """The outputs of several layers on the same input, from one matmul where all of them are plain :class:`Linear`.

    Compiled, the weights are put together while they are cast, which costs nothing, and one wide matmul is faster than several
    narrow ones.
    """
    plain = [layer for layer in layers if type(layer) is Linear]
    if len(plain) < len(layers):
        return tuple(layer(x) for layer in layers)
    weight = torch.cat([layer.weight.to(x.dtype) for layer in plain])
    return F.linear(x, weight).split([layer.weight.shape[0] for layer in plain], dim=-1)
