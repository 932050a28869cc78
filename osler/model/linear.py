"""Bias-free linear layers: those that train, and what decoding makes of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osler.model.norm import RMSNorm, WeightlessNorm


class Linear(nn.Module):
    """y = x Wᵀ with W cast to the dtype of x: fp32 master weights, bf16 compute, no autocast state to carry around."""

    def __init__(self, in_size: int, out_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_size, in_size))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def joint_linear(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """Return the outputs of several layers on the same input, from one matmul where all of them are plain :class:`Linear`.

    Compiled, the weights are joined while they are cast, which costs nothing, and one wide matmul is faster than several
    narrow ones.
    """
    plain = [layer for layer in layers if type(layer) is Linear]
    if len(plain) < len(layers):
        return tuple(layer(x) for layer in layers)
    weight = torch.cat([layer.weight.to(x.dtype) for layer in plain])
    return F.linear(x, weight).split([layer.weight.shape[0] for layer in plain], dim=-1)


class Layout(NamedTuple):
    """How weights are laid out for decoding: for about ``rows`` rows at a time, in ``dtype``.

    ``pack`` lets oneDNN pack them where it can, which on x86 CPUs is 1.3 to 2.4 times as fast as the plain fp32 matmul at the
    sizes of decoding. ``torch.compile`` sees through plain matmuls only.
    """

    dtype: torch.dtype
    rows: int
    pack: bool = True


class DecodeLinear:
    """Linear layers on the same input as one matmul in the layout of decoding, together with the norm before them.

    The norm's weight is multiplied into the columns of the matrix, which saves an operator. The weights are copies.
    """

    def __init__(self, layout: Layout, *weights: Tensor, norm: RMSNorm | None = None) -> None:
        weight = torch.cat(weights)
        self._norm = None if norm is None else WeightlessNorm(norm.eps)
        self._packed_linear = None
        if norm is not None and norm.weight is not None:
            weight = weight * norm.weight
        self._weight = weight.to(layout.dtype)
        if layout.pack and packs_weights(weight.device):
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight, layout.rows)
            self._packed_linear = torch.ops.mkldnn._linear_pointwise.default  # every access to torch.ops costs microseconds

    def __call__(self, x: Tensor) -> Tensor:
        if self._norm is not None:
            x = self._norm(x)
        if self._packed_linear is None:
            return F.linear(x, self._weight)
        out: Tensor = self._packed_linear(x, self._weight, None, "none", [], "")
        return out


def packs_weights(device: torch.device) -> bool:
    """Return whether torch has oneDNN's packed linear for this device (the operators that torch's own CPU compiler emits)."""
    return (
        device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )
