"""RMSNorm (arXiv 1910.07467), with or without a weight; statistics in fp32, result in the input's dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Scale the last dimension to unit root mean square; ``weight=False`` makes it parameter-free."""

    def __init__(self, size: int, *, eps: float, weight: bool) -> None:
        super().__init__()
        self.size = size
        self.eps = eps
        self.weight: Tensor | None
        if weight:
            self.weight = nn.Parameter(torch.ones(size))
        else:
            self.register_parameter("weight", None)

    def forward(self, x: Tensor) -> Tensor:
        # The product with the weight comes after the cast back, as in the standard classes, so exports agree in bf16 too.
        normed = F.rms_norm(x.float(), (self.size,), eps=self.eps).to(x.dtype)
        return normed if self.weight is None else normed * self.weight.to(x.dtype)
