"""Grouped-query self-attention with QK-norm before RoPE.

An attention has five parts that the rest of the model uses: ``forward`` for training, ``mask_of`` to make its mask from document
ids, ``project`` to show queries and keys, ``cache_class`` for the past tokens that decoding needs, and ``for_decoding``, the same
weights with ``prefill`` (whole prompts) and ``step`` (one more token of every row). Another kind of attention is one more file
with these five parts, such as ``sparse_attention.py``, and an entry in ``ATTENTIONS`` (``transformer.py``).

Half of a decode step goes into calling small operators (two CPU cores, 64 rows, 4 layers x 128). So q, k and v are one matmul, q
and k are normalised and rotated together, and query heads that share a key/value head are one small matmul against the cache:
0.09 ms a layer against 0.24 ms for torch's fused kernel.

Shape legend: B batch, T tokens, D hidden, E any, H head size, N query heads, K key/value heads, M = N + K, C = B * K, G = N / K,
S cached tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osler.model.config import ModelConfig
from osler.model.kv_cache import CacheStep, KVCache
from osler.model.layers import DecodeLinear, Layout, Linear, RMSNorm, WeightlessNorm, joint_linear
from osler.model.rope import apply_rolled_rope, apply_rope
from osler.ops.attention import attention


class Attention(nn.Module):
    """q/k/v projections, per-head RMSNorm, RoPE, attention, output projection; some layers also embed tokens as values."""

    cache_class = KVCache

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.window = config.window
        self.q_proj = Linear(config.hidden_size, config.query_size)
        self.k_proj = Linear(config.hidden_size, config.kv_size)
        self.v_proj = Linear(config.hidden_size, config.kv_size)
        self.o_proj = Linear(config.query_size, config.hidden_size)
        has_values = config.has_value_embedding(layer)
        self.value_embed = nn.Embedding(config.padded_vocab_size, config.kv_size) if has_values else None
        self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps, weight=config.qk_norm_weight)
        self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps, weight=config.qk_norm_weight)

    @staticmethod
    def mask_of(document_BT: Tensor) -> Tensor:
        """Return the ``mask`` that keeps attention inside equal document ids."""
        length = document_BT.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=document_BT.device).tril()
        return ((document_BT[:, :, None] == document_BT[:, None, :]) & causal)[:, None]

    def forward(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], ids_BT: Tensor, *, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Attend causally, or where ``mask`` (bool, [B, 1, T, T]) is True; with a window to the latest of these keys.

        The second result is for attention with an index: what is measured of it and what it learns from, [B, T, measurements].
        """
        q_BNTH, k_BKTH, v_BKTH = (heads.transpose(1, 2) for heads in self.project(x_BTD, rope, ids_BT))
        return self.output(attention(q_BNTH, k_BKTH, v_BKTH, mask=mask, window=self.window)), None

    def output(self, out_BNTH: Tensor) -> Tensor:
        """Return the output projection of all heads, [B, T, D]."""
        return self.o_proj(out_BNTH.transpose(1, 2).reshape(out_BNTH.shape[0], out_BNTH.shape[2], -1))

    def project(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], ids_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries [B, T, N, H], rotated keys [B, T, K, H] and values [B, T, K, H]."""
        flat = joint_linear(x_BTD, self.q_proj, self.k_proj, self.v_proj)
        q_BTNH, k_BTKH, v_BTKH = (heads.unflatten(-1, (-1, self.head_dim)) for heads in flat)
        if self.value_embed is not None:
            v_BTKH = v_BTKH + self.value_embed(ids_BT).to(v_BTKH.dtype).view_as(v_BTKH)
        return apply_rope(self.q_norm(q_BTNH), *rope), apply_rope(self.k_norm(k_BTKH), *rope), v_BTKH

    def for_decoding(self, layer: int, norm: RMSNorm, layout: Layout) -> DecodeAttention:
        """Copy the weights into the layout of decoding, together with the norm before this attention."""
        return DecodeAttention(self, layer, norm, layout)


class DecodeAttention:
    """The same attention and the norm before it for few tokens at a time; the top of this file says how."""

    def __init__(self, trained: Attention, layer: int, norm: RMSNorm, layout: Layout) -> None:
        self.layer = layer
        self.num_heads, self.num_kv_heads, self.head_dim = trained.num_heads, trained.num_kv_heads, trained.head_dim
        self._window = trained.window
        self._qkv = DecodeLinear(layout, trained.q_proj.weight, trained.k_proj.weight, trained.v_proj.weight, norm=norm)
        self._o_proj = DecodeLinear(layout, trained.o_proj.weight)
        self._value_embed = None if trained.value_embed is None else trained.value_embed.weight.detach()
        self._qk_norm = WeightlessNorm(trained.q_norm.eps)
        self._qk_weight_MH: Tensor | None = None
        if (q_H := trained.q_norm.weight) is not None and (k_H := trained.k_norm.weight) is not None:
            self._qk_weight_MH = torch.cat([q_H.expand(self.num_heads, -1), k_H.expand(self.num_kv_heads, -1)]).to(layout.dtype)

    def prefill(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], ids_BT: Tensor, mask: Tensor | None, cache: KVCache
    ) -> Tensor:
        """Attend from the last T tokens of some prompts, and fill the cache with them.

        ``cache`` has exactly as many slots as the prompts have tokens; if those are more than T, ``mask`` (bool, [1, 1, T, S])
        is needed.
        """
        out_BNTH = attention(*self._fill(x_BTD, rope, ids_BT, cache), mask=mask, window=self._window)
        return self._o_proj(out_BNTH.transpose(1, 2).flatten(2))

    def _fill(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], ids_BT: Tensor, cache: KVCache
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Write the last T tokens of some prompts to the cache; return their queries, and all keys and values."""
        q_BTNH, new_BTKH, new_v_BTKH = self._project(x_BTD, rope, ids_BT)
        k_BKSH, v_BKSH = cache.k[self.layer], cache.v[self.layer]
        for stored_BKSH, new in ((k_BKSH, new_BTKH), (v_BKSH, new_v_BTKH)):
            stored_BKSH[:, :, -x_BTD.shape[1] :] = new.transpose(1, 2)
        return q_BTNH.transpose(1, 2), k_BKSH, v_BKSH

    def step(self, x_BD: Tensor, rope: tuple[Tensor, Tensor], token_B: Tensor, cached: CacheStep) -> Tensor:
        """Attend from one more token of every row, and write it to the cache."""
        q_BNH, k_BKH, v_BKH = self._project(x_BD, rope, token_B)
        return self._attend(q_BNH, *cached.write(self.layer, k_BKH, v_BKH), cached.bias_C1S)

    def _attend(self, q_BNH: Tensor, k_CHS: Tensor, v_CSH: Tensor, bias_C1S: Tensor) -> Tensor:
        q_CGH = q_BNH.to(k_CHS.dtype).reshape(k_CHS.shape[0], -1, self.head_dim)
        scores_CGS = torch.baddbmm(bias_C1S, q_CGH, k_CHS, alpha=self.head_dim**-0.5)
        weights_CGS = scores_CGS.softmax(-1, dtype=torch.float32).to(v_CSH.dtype)
        out_BE = torch.bmm(weights_CGS, v_CSH).view(q_BNH.shape[0], -1)
        return self._o_proj(out_BE.to(q_BNH.dtype))

    def _project(self, x: Tensor, rope: tuple[Tensor, Tensor], ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries [..., N, H] and keys [..., K, H], and values [..., K, H], of hidden states [..., D]."""
        qkv = self._qkv(x).unflatten(-1, (-1, self.head_dim))
        qk, v = qkv.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=-2)
        qk = self._qk_norm(qk)
        if self._qk_weight_MH is not None:
            qk = qk * self._qk_weight_MH
        if self._value_embed is not None:
            v = v + F.embedding(ids, self._value_embed).to(v.dtype).view_as(v)
        q, k = apply_rolled_rope(qk, *rope).split([self.num_heads, self.num_kv_heads], dim=-2)
        return q, k, v
