"""Drawing the next token: one uniform number per row in, one token and its log-probability out.

A row's token is the one under which its uniform number falls in the cumulative distribution. Two levels of sums (blocks of 64
tokens, then one block) make that a single pass over the vocabulary, in float64 so that rare tokens keep their probability. The
numbers are a counter-based hash of (seed, row, position) (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3"), so
what a row draws depends neither on the rows that share its batch nor on earlier draws.

Shapes: B rows, V vocabulary, N blocks, b tokens of a block, K largest logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from osler.ops.sampling_params import SamplingParams

Word = TypeVar("Word", Tensor, int)
_BLOCK = 64
_LOW_32 = 0xFFFFFFFF
# Multipliers of a 32-bit hash found by search (Wellons, "Hash function prospector": shifts 16, 15, 15). The second is
# written minus 2**32, which keeps its low 32 bits, so that no product of it with a 32-bit word leaves int64.
_MULTIPLY_1 = 0x21F0AAAD
_MULTIPLY_2 = 0xD35A2D97 - (1 << 32)


def mix(word: Word) -> Word:
    """Permute 32-bit words (int64, which every backend can multiply, or an int on the host) so that each bit depends on all."""
    word = word ^ (word >> 16)
    word = (word * _MULTIPLY_1) & _LOW_32
    word = word ^ (word >> 15)
    word = (word * _MULTIPLY_2) & _LOW_32
    return word ^ (word >> 15)


def row_uniform(seed: int, row_B: Tensor, position_B: Tensor) -> Tensor:
    """Return the uniform number of every (seed, row, position), float64 in [0, 1) with 53 random bits.

    ``row_B`` and ``position_B`` are int64 (below 2**32) and broadcast. The number depends on nothing but the triple.
    """
    low = mix((seed & _LOW_32) ^ 0x9E3779B9)
    key = mix(low ^ ((seed >> 32) & _LOW_32) ^ 0x85EBCA6B)
    word = mix((row_B & _LOW_32) ^ key)
    word = mix((word + (position_B & _LOW_32) * 0x3C6EF372 + low) & _LOW_32)
    other = mix((word + 0x1B873593) & _LOW_32 ^ mix((position_B + key) & _LOW_32))
    return ((word >> 5) * (1 << 26) + (other >> 6)).double() * 2.0**-53


class RowSampling(NamedTuple):
    """The sampling parameters of rows, as tensors [B, 1], or [1, 1] where all rows share them.

    The fields that are no tensors tell the host what no row needs, so that it is not computed.
    """

    temperature_B1: Tensor  # 1 for a greedy row
    greedy_B1: Tensor  # bool
    top_k_B1: Tensor
    top_p_B1: Tensor
    min_p_B1: Tensor
    penalty_B1: Tensor
    all_greedy: bool
    some_greedy: bool
    scales: bool  # whether a row has a temperature other than 0 and 1
    truncates: bool  # whether a row has top_k, top_p or min_p
    most_top_k: int  # the largest top_k; V where some row has none
    penalises: bool  # whether a row has a repetition penalty
    top_logprobs: int  # the most alternatives that a row asks for
    bias_BV: Tensor | None  # added to the logits; None where no row has a bias
    presence_B1: Tensor
    frequency_B1: Tensor
    counts: bool  # whether a row has a presence or frequency penalty

    @classmethod
    def of(cls, rows: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> RowSampling:
        """Collect the parameters of rows."""
        rows = rows[:1] if len(set(rows)) == 1 else rows

        def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        greedy = [row.temperature == 0 for row in rows]
        rows = [replace(row, top_k=None, top_p=1.0, min_p=0.0) if row.temperature == 0 else row for row in rows]
        top_k = [min(row.top_k or vocab_size, vocab_size) for row in rows]
        bias_BV = torch.zeros(len(rows), vocab_size) if any(row.logit_bias for row in rows) else None
        for number, row in enumerate(rows):
            if bias_BV is not None and row.logit_bias:
                token_N, value_N = zip(*row.logit_bias, strict=True)
                bias_BV[number, list(token_N)] = torch.tensor(value_N)
        return cls(
            column([row.temperature or 1.0 for row in rows]),
            column(greedy, torch.bool),
            column(top_k, torch.int64),
            column([row.top_p for row in rows], torch.float64),
            column([row.min_p for row in rows], torch.float64),
            column([row.repetition_penalty for row in rows]),
            all_greedy=all(greedy),
            some_greedy=any(greedy),
            scales=any(row.temperature not in (0, 1) for row in rows),
            truncates=any(row.truncates(vocab_size) for row in rows),
            most_top_k=max(top_k),
            penalises=any(row.repetition_penalty != 1 for row in rows),
            top_logprobs=max(min(row.top_logprobs, vocab_size) for row in rows),
            bias_BV=None if bias_BV is None else bias_BV.to(device),
            presence_B1=column([row.presence_penalty for row in rows]),
            frequency_B1=column([row.frequency_penalty for row in rows]),
            counts=any(row.presence_penalty or row.frequency_penalty for row in rows),
        )


class Drawn(NamedTuple):
    """One token for every row; ``scaled_BV`` are the logits it was drawn from, -inf outside of the mask."""

    token_B: Tensor  # int64
    logp_B: Tensor  # fp32
    mask_BV: Tensor | None  # bool; None where all tokens could be drawn
    scaled_BV: Tensor


def sample(
    logits_BV: Tensor,
    u_B: Tensor,
    sampling: RowSampling,
    seen_BV: Tensor | None = None,
    count_BV: Tensor | None = None,
) -> Drawn:
    """Draw one token per row.

    ``logits_BV`` is fp32, -inf where a token must never be drawn; ``u_B`` is in [0, 1); ``seen_BV`` (bool) says which tokens the
    repetition penalty is for, ``count_BV`` how often each was drawn before. The log-probability that is returned is at the
    temperature and over the mask. Temperature 0 takes the likeliest token, ignores truncation, and returns the log-probability
    at temperature 1.
    """
    if sampling.bias_BV is not None:
        logits_BV = logits_BV + sampling.bias_BV
    if sampling.penalises and seen_BV is not None:
        # Keskar et al., 2019 (CTRL), with the correction for logits below zero that everybody uses.
        penalised_BV = torch.where(logits_BV > 0, logits_BV / sampling.penalty_B1, logits_BV * sampling.penalty_B1)
        logits_BV = torch.where(seen_BV, penalised_BV, logits_BV)
    if sampling.counts and count_BV is not None:
        logits_BV = logits_BV - sampling.presence_B1 * (count_BV > 0) - sampling.frequency_B1 * count_BV
    if sampling.all_greedy:
        return _likeliest(logits_BV)
    scaled_BV = logits_BV / sampling.temperature_B1 if sampling.scales else logits_BV
    mask_BV = sampling_mask(scaled_BV, sampling)
    if mask_BV is not None:
        scaled_BV = scaled_BV.masked_fill(~mask_BV, -torch.inf)
    token_B, logp_B = _invert(scaled_BV, u_B)
    if sampling.some_greedy:
        greedy_B, best = sampling.greedy_B1.squeeze(1), _likeliest(logits_BV)
        token_B, logp_B = torch.where(greedy_B, best.token_B, token_B), torch.where(greedy_B, best.logp_B, logp_B)
    return Drawn(token_B, logp_B, mask_BV, scaled_BV)


def _likeliest(logits_BV: Tensor) -> Drawn:
    token_B = logits_BV.argmax(-1)
    chosen_B = logits_BV.gather(-1, token_B[:, None]).squeeze(-1)
    return Drawn(token_B, chosen_B - logits_BV.logsumexp(-1), None, logits_BV)


def _invert(scaled_BV: Tensor, u_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the token under which ``u_B`` falls in the softmax's cumulative sum, and its log-probability."""
    vocab = scaled_BV.size(-1)
    if vocab % _BLOCK:
        scaled_BV = F.pad(scaled_BV, (0, _BLOCK - vocab % _BLOCK), value=-torch.inf)
    top_B1 = scaled_BV.amax(-1, keepdim=True)
    weight_BNb = (scaled_BV - top_B1).exp_().view(scaled_BV.size(0), -1, _BLOCK)
    block_end_BN = weight_BNb.sum(-1).double().cumsum(-1)
    total_B1 = block_end_BN[:, -1:]
    target_B1 = u_B.double()[:, None] * total_B1
    block_B1 = _first_above(block_end_BN, target_B1)
    before_B1 = torch.where(block_B1 > 0, block_end_BN.gather(-1, (block_B1 - 1).clamp_min(0)), 0.0)
    inside_Bb = weight_BNb.gather(1, block_B1[:, :, None].expand(-1, 1, _BLOCK)).squeeze(1)
    inner_B1 = _first_above(inside_Bb.double().cumsum(-1), target_B1 - before_B1)
    token_B1 = block_B1 * _BLOCK + inner_B1
    logp_B1 = scaled_BV.gather(-1, token_B1) - top_B1 - total_B1.log().float()
    return token_B1.squeeze(-1), logp_B1.squeeze(-1)


def _first_above(end_BN: Tensor, target_B1: Tensor) -> Tensor:
    """Return the index of the first running sum above the target; that entry always has weight.

    Rounding can leave the target at or above the last sum. Then the last entry with weight is returned.
    """
    found_B1 = (end_BN <= target_B1).sum(-1, keepdim=True)
    last_B1 = (end_BN < end_BN[:, -1:]).sum(-1, keepdim=True)
    return torch.minimum(found_B1, last_B1)


def sampling_mask(scaled_BV: Tensor, sampling: RowSampling) -> Tensor | None:
    """Return the tokens that may be drawn (bool), or None for all of them; ``scaled_BV`` are logits divided by the temperature.

    The probabilities of the ``top_k`` likeliest tokens are renormalised. From the likeliest down, tokens stay until they sum to
    ``top_p``, and only while they have ``min_p`` times the highest probability. At least one token stays, and exactly ``top_k``
    when only that is given (which of several equal logits at the border stays is arbitrary).
    """
    if not sampling.truncates:
        return None
    values_BK, index_BK = scaled_BV.topk(sampling.most_top_k, dim=-1)
    rank_K = torch.arange(sampling.most_top_k, device=scaled_BV.device)
    mask_BK = (values_BK > -torch.inf) & (rank_K < sampling.top_k_B1)
    probability_BK = values_BK.double().masked_fill(~mask_BK, -torch.inf).softmax(-1)
    # A row without top_p keeps its tail, whose probabilities are lost in the rounding of the sum.
    in_top_p_BK = (probability_BK.cumsum(-1) - probability_BK < sampling.top_p_B1) | (sampling.top_p_B1 >= 1)
    mask_BK &= in_top_p_BK & (probability_BK >= sampling.min_p_B1 * probability_BK[:, :1])
    mask_BK[:, 0] = True
    return torch.zeros_like(scaled_BV, dtype=torch.bool).scatter_(-1, index_BK, mask_BK)


def pack_mask(mask_BV: Tensor) -> Tensor:
    """Return a bool mask over the vocabulary in bits: uint8 [..., ceil(V / 8)], lowest bit first."""
    vocab = mask_BV.size(-1)
    padded = F.pad(mask_BV, (0, -vocab % 8)).unflatten(-1, (-1, 8)).to(torch.uint8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=padded.device)).sum(-1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, vocab_size: int) -> Tensor:
    """Return the mask that ``pack_mask`` packed: bool [..., vocab_size]."""
    bits = (packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten(-2)[..., :vocab_size].bool()
