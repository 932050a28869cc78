"""Grouped-query attention of a row of tokens to itself: the fast forms, and the plain formula that they are tested against.

Shape legend: B batch, T tokens or queries, S keys, N query heads, K key/value heads, G = N / K, M = G * T, H head size.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from osler.ops.pieces import causal_pieces
from osler.ops.precision import wide


def is_within(window: int, queries: int, keys: int, device: torch.device) -> Tensor:
    """Return which keys are among the ``window`` latest ones of each query, itself included, bool [T, S].

    The queries are the last T of S tokens. Later keys are within the window, too.
    """
    place_S = torch.arange(keys, dtype=torch.int32, device=device)
    return place_S > place_S[keys - queries :, None] - window


def attention_reference(
    q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, *, mask: Tensor | None = None, window: int | None = None
) -> Tensor:
    """Return softmax(q kᵀ / sqrt(H)) v, computed in fp32; causal, or where ``mask`` (bool, [B, 1, T, T]) is True.

    With ``window`` a query sees that many keys at most: the latest ones, its own included (arXiv 2004.05150).
    """
    groups = q_BNTH.shape[1] // k_BKTH.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1).float() for x in (k_BKTH, v_BKTH))
    scores = q_BNTH.float() @ k.transpose(-1, -2) / math.sqrt(q_BNTH.shape[-1])
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if window is not None:
        mask = mask & is_within(window, scores.shape[-2], scores.shape[-1], scores.device)
    return (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v).to(q_BNTH.dtype)


def attention(
    q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, *, mask: Tensor | None = None, window: int | None = None
) -> Tensor:
    """Compute :func:`attention_reference` in the form that is fastest on the device; each query must see a key."""
    keys = k_BKTH.shape[2]
    if window is not None and keys > window:
        if mask is None:
            return _windowed_attention(q_BNTH, k_BKTH, v_BKTH, window)
        mask = mask & is_within(window, q_BNTH.shape[2], keys, mask.device)
    if q_BNTH.is_cuda:
        groups = q_BNTH.shape[1] // k_BKTH.shape[1]
        if mask is not None and groups > 1:  # the kernel that takes a mask and saves memory has no grouped form
            k_BKTH, v_BKTH = (x.repeat_interleave(groups, dim=1) for x in (k_BKTH, v_BKTH))
        return F.scaled_dot_product_attention(
            q_BNTH, k_BKTH, v_BKTH, attn_mask=mask, is_causal=mask is None, enable_gqa=mask is None and groups > 1
        )
    pieces = causal_pieces(q_BNTH.shape[2])
    if mask is not None or len(pieces) == 1:
        return _grouped_attention(q_BNTH, k_BKTH, v_BKTH, mask)
    # No query of a piece sees a key after the last query, so the scores of those keys are not computed.
    out = [_grouped_attention(q_BNTH[:, :, p], k_BKTH[:, :, : p.stop], v_BKTH[:, :, : p.stop], None) for p in pieces]
    return torch.cat(out, dim=2)


def _windowed_attention(q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, window: int) -> Tensor:
    """Attend from blocks of ``window`` queries to their own block and the one before it, so that long rows cost no more.

    Blocks become rows, so one call computes them all. In what follows there are b blocks in a row, and T tokens in a block.
    """
    batch, _, length, _ = q_BNTH.shape

    def blocks_of(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, -length % window)).unflatten(2, (-1, window))

    def with_those_before(x: Tensor) -> Tensor:
        blocks_BKbTH = blocks_of(x)
        return torch.cat([F.pad(blocks_BKbTH, (0, 0, 0, 0, 1, -1)), blocks_BKbTH], dim=3)

    q_BNbTH, k_BKbSH, v_BKbSH = blocks_of(q_BNTH), with_those_before(k_BKTH), with_those_before(v_BKTH)
    number = q_BNbTH.shape[2]
    place_S = torch.arange(2 * window, dtype=torch.int32, device=q_BNTH.device)
    is_seen_TS = (place_S <= place_S[window:, None]) & is_within(window, window, 2 * window, q_BNTH.device)
    before_first_b11 = torch.arange(number, device=q_BNTH.device)[:, None, None] == 0  # no block is there
    mask_bTS = is_seen_TS & ((place_S >= window) | ~before_first_b11)
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (q_BNbTH, k_BKbSH, v_BKbSH)]
    out = attention(*rows, mask=mask_bTS.expand(batch, -1, -1, -1).flatten(0, 1)[:, None])
    return out.unflatten(0, (batch, number)).transpose(1, 2).flatten(2, 3)[:, :, :length]


def _grouped_attention(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: Tensor | None) -> Tensor:
    """Attend with two batched matmuls per key/value head, without copying keys and values for their query heads.

    A compiled step on CPU took 146 ms with them and 230 ms with torch's fused kernel, which has no grouped form there and a slow
    backward pass (4 layers x 128, 64 rows of 128 tokens, bf16).
    """
    batch, heads, queries, size = q_BNTH.shape
    kv_heads = k_BKSH.shape[1]
    stacked_BKMH = q_BNTH.reshape(batch, kv_heads, heads // kv_heads * queries, size)
    mask_B11TS = None if mask is None else mask[:, :, None]
    out_BKMH: Tensor = _GroupedAttention.apply(stacked_BKMH, k_BKSH, v_BKSH, queries, mask_B11TS)
    return out_BKMH.view(batch, heads, queries, size)


class _GroupedAttention(torch.autograd.Function):
    """Attention of queries whose heads and tokens share one dimension, M = G * T, in a group of query heads.

    Weights are divided by their sum after the product with the values. So they are written once, in the compute dtype, and the
    backward pass needs neither the exponential nor the mask.
    """

    @staticmethod
    def forward(ctx: Any, q_BKMH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, queries: int, mask: Tensor | None) -> Tensor:
        keys, scale = k_BKSH.shape[2], q_BKMH.shape[-1] ** -0.5
        scores = (q_BKMH @ k_BKSH.transpose(-1, -2)).unflatten(2, (-1, queries))
        scores = wide(scores) * scale
        if mask is None:
            row_T, column_S = (torch.arange(n, dtype=torch.int32, device=scores.device) for n in (queries, keys))
            mask = column_S <= row_T[:, None] + (keys - queries)
        scores = scores.masked_fill(~mask, float("-inf"))
        weights_BKMS = (scores - scores.amax(-1, keepdim=True)).exp().to(v_BKSH.dtype).flatten(2, 3)
        sum_BKM1 = wide(weights_BKMS).sum(-1, keepdim=True)
        out_BKMH = (wide(weights_BKMS @ v_BKSH) / sum_BKM1).to(v_BKSH.dtype)
        ctx.save_for_backward(q_BKMH, k_BKSH, v_BKSH, weights_BKMS, sum_BKM1, out_BKMH)
        return out_BKMH

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q_BKMH, k_BKSH, v_BKSH, weights_BKMS, sum_BKM1, out_BKMH = ctx.saved_tensors
        dtype = q_BKMH.dtype
        grad_wide = wide(grad_out) / sum_BKM1
        shift_BKM1 = (grad_wide * wide(out_BKMH)).sum(-1, keepdim=True)
        grad_out = grad_wide.to(dtype)
        grad_weights = wide(grad_out @ v_BKSH.transpose(-1, -2))
        grad_scores = (wide(weights_BKMS) * (grad_weights - shift_BKM1) * q_BKMH.shape[-1] ** -0.5).to(dtype)
        grad_q, grad_k = grad_scores @ k_BKSH, grad_scores.transpose(-1, -2) @ q_BKMH
        return grad_q, grad_k, weights_BKMS.transpose(-1, -2) @ grad_out, None, None
