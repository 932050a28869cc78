"""Rotary position embedding (arXiv 2104.09864), half-split layout as in the standard classes, tables in fp32."""

import torch
from torch import Tensor


def rope_tables(max_seq_len: int, head_dim: int, theta: float, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, each [max_seq_len, head_dim] fp32; the second half of a row repeats the first."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float32, device=device), frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(x_BTNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each (i, i + H/2) pair of the last dimension; ``cos`` and ``sin`` broadcast against ``x`` and have its dtype.

    Each half of ``x`` is computed by itself, because a compiler makes slow code of halves that change places first.
    """
    left, right = x_BTNH.chunk(2, dim=-1)
    cos, sin = (table[..., : left.shape[-1]] for table in (cos, sin))
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def thinned_tables(cos: Tensor, sin: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """Return tables [..., pairs] for a narrower head, from plain or rolled ones: every few of the frequencies.

    Where the widths divide, these are the frequencies that ``rope_tables`` gives the narrower head.
    """
    half = cos.shape[-1] // 2
    taken = half + torch.arange(pairs, device=cos.device) * half // pairs  # the right half of rolled tables is the plain one
    return cos[..., taken], sin[..., taken]


def rolled_tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tables for ``apply_rolled_rope``: the sines of the left half are negative."""
    left, right = sin.chunk(2, dim=-1)
    return cos, torch.cat([-left, right], dim=-1)


def apply_rolled_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Do the same as ``apply_rope`` in three operators, which is faster when operators are small, as in decoding."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
