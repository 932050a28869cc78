"""Weight-only quantisation: matrices kept as whole numbers of 8 or 4 bits, with a scale for each group of columns of each row.

    weight ~ code * scale        codes from -128 to 127, or from -8 to 7 and two to a byte; scales in fp16

The model itself does not know of it: loading a checkpoint restores whole weights, so everything that reads a checkpoint takes a
quantised one and computes as fast as before. Only the file becomes smaller. In each group the weight that is farthest from zero
gets the lowest code, which decides the scale and its sign. A slightly smaller scale, which cuts that weight, is taken where it
makes the group's squared error less. Vectors (norms) and the index of sparse attention stay as they are.
Shapes: O rows, I columns, G groups of a row, S columns of a group.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from osler.model.init import is_of_indexer

SHARES = (1.0, 0.95, 0.9, 0.85, 0.8)  # the scales to try, as shares of the widest one
SCALE = ".scale"  # ends the name of a matrix's scales; ".int8" and ".int4" end those of its codes


def quantize(weight_OI: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Return the codes of a matrix (int8 [O, I], or for 4 bits uint8 [O, I / 2 rounded up]) and its scales, fp16 [O, G]."""
    lowest = -(2 ** (bits - 1))
    weight_OGS = _in_groups(weight_OI.float(), group_size)
    farthest_OG1 = weight_OGS.gather(-1, weight_OGS.abs().argmax(-1, keepdim=True))
    codes_OGS, scale_OG1 = torch.zeros_like(weight_OGS), torch.zeros_like(farthest_OG1)
    least_OG1 = torch.full_like(farthest_OG1, torch.inf)
    for share in SHARES:
        tried_OG1 = (farthest_OG1 * share / lowest).half().float()
        code_OGS = (weight_OGS / torch.where(tried_OG1 == 0, 1.0, tried_OG1)).round().clamp(lowest, -lowest - 1)
        error_OG1 = (code_OGS * tried_OG1 - weight_OGS).square().sum(-1, keepdim=True)
        is_less_OG1 = error_OG1 < least_OG1
        codes_OGS = torch.where(is_less_OG1, code_OGS, codes_OGS)
        scale_OG1 = torch.where(is_less_OG1, tried_OG1, scale_OG1)
        least_OG1 = torch.minimum(error_OG1, least_OG1)
    codes_OI = codes_OGS.flatten(1)[:, : weight_OI.shape[1]]
    return codes_OI.to(torch.int8) if bits == 8 else _packed(codes_OI), scale_OG1.squeeze(-1).half()


def dequantize(codes: Tensor, scale_OG: Tensor, in_size: int, group_size: int) -> Tensor:
    """Return the matrix that codes and scales stand for, fp32 [O, I] with I = ``in_size``."""
    codes_OI = codes if codes.dtype == torch.int8 else _unpacked(codes)[:, :in_size]
    return (_in_groups(codes_OI.float(), group_size) * scale_OG[..., None].float()).flatten(1)[:, :in_size]


def quantize_weights(weights: Mapping[str, Tensor], bits: int, group_size: int) -> dict[str, Tensor]:
    """Return a model's state dict with codes and scales in place of every matrix."""
    stored = {}
    for name, weight in weights.items():
        if weight.ndim == 2 and not is_of_indexer(name):
            stored[f"{name}.int{bits}"], stored[f"{name}{SCALE}"] = quantize(weight, bits, group_size)
        else:
            stored[name] = weight
    return stored


def dequantize_weights(stored: Mapping[str, Tensor], like: Mapping[str, Tensor], group_size: int) -> dict[str, Tensor]:
    """Return the state dict that ``quantize_weights`` was given, up to rounding; ``like`` has its names and shapes."""
    codes = {name.rpartition(".")[0]: codes for name, codes in stored.items() if name.endswith((".int8", ".int4"))}
    return {
        name: dequantize(codes[name], stored[f"{name}{SCALE}"], weight.shape[1], group_size) if name in codes else stored[name]
        for name, weight in like.items()
    }


def _in_groups(matrix_OI: Tensor, group_size: int) -> Tensor:
    """Return a matrix as [O, G, S]; zeros fill the last group."""
    return F.pad(matrix_OI, (0, -matrix_OI.shape[1] % group_size)).unflatten(1, (-1, group_size))


def _packed(codes_OI: Tensor) -> Tensor:
    """Return codes from -8 to 7 as bytes: an even column in the low half, the odd one after it in the high half."""
    halves = F.pad(codes_OI + 8, (0, codes_OI.shape[1] % 2)).to(torch.uint8)
    return halves[:, ::2] | halves[:, 1::2] << 4


def _unpacked(bytes_OI: Tensor) -> Tensor:
    return torch.stack([bytes_OI & 15, bytes_OI >> 4], dim=-1).flatten(1).to(torch.int8) - 8
