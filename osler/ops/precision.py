"""The precision of sums: fp32 at least."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """Return ``x`` in fp32 at least: bf16 is widened, fp64 (numerical tests) stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
