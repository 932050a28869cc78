"""Rotary position embedding (arXiv 2104.09864), half-split layout as in the standard classes, tables in fp32."""

import math

import torch
from torch import Tensor

from osler.model.config import YarnConfig


def rope_tables(
    max_seq_len: int, head_dim: int, theta: float, scaling: YarnConfig | None = None, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, each [max_seq_len, head_dim] fp32; the second half of a row repeats the first.

    With ``scaling`` both are multiplied by YaRN's temperature, so that scores are sharper by its square.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    temperature = 1.0
    if scaling is not None:
        frequencies = yarn_frequencies(frequencies, theta, scaling)
        temperature += 0.1 * math.log(scaling.factor)
    angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float32, device=device), frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos() * temperature, angles.sin() * temperature


def yarn_frequencies(frequencies: Tensor, theta: float, scaling: YarnConfig) -> Tensor:
    """Return what YaRN makes of RoPE's frequencies, [head_dim / 2]: the fast ones stay, the slow ones are divided by the factor.

    Between the two they are mixed, linearly in the number of the pair. As in ``transformers``, the ramp begins and ends at
    whole numbers.
    """
    pairs = len(frequencies)

    def pair_with(rotations: float) -> float:
        """Return the (fractional) number of the pair that rotates ``rotations`` times in the original row."""
        return pairs * math.log(scaling.original_max_seq_len / (2 * math.pi * rotations)) / math.log(theta)

    first = max(math.floor(pair_with(scaling.beta_fast)), 0)
    last = max(min(math.ceil(pair_with(scaling.beta_slow)), 2 * pairs - 1), first)
    number = torch.arange(pairs, dtype=torch.float32, device=frequencies.device)
    slowed = ((number - first) / (last - first or 0.001)).clamp(0, 1)
    return frequencies * (1 - slowed) + frequencies / scaling.factor * slowed


def apply_rope(x_BTNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each (i, i + H/2) pair of the last dimension; ``cos`` and ``sin`` broadcast against ``x`` and have its dtype.

    Each half of ``x`` is computed by itself, because compilers make slow code of a rotation that swaps the halves first.
    """
    left, right = x_BTNH.chunk(2, dim=-1)
    cos, sin = (table[..., : left.shape[-1]] for table in (cos, sin))
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def thinned_tables(cos: Tensor, sin: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """Return tables [..., pairs] for a narrower head, from plain or rolled ones, with evenly spaced ones of their frequencies.

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
