"""Grouped-query self-attention with QK-norm before RoPE.

Shape legend: B batch, T tokens, D hidden, H head size, N query heads, K key/value heads, S cached tokens.
"""

from __future__ import annotations

from torch import Tensor, nn

from osler.model.config import ModelConfig
from osler.model.kv_cache import KVCache
from osler.model.linear import Linear, joint_linear
from osler.model.norm import RMSNorm
from osler.model.rope import rotate
from osler.ops.attention import attention


class Attention(nn.Module):
    """q/k/v projections, per-head RMSNorm, RoPE, attention, output projection."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.q_proj = Linear(config.hidden_size, config.query_size)
        self.k_proj = Linear(config.hidden_size, config.kv_size)
        self.v_proj = Linear(config.hidden_size, config.kv_size)
        self.o_proj = Linear(config.query_size, config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps, weight=config.qk_norm_weight)
        self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps, weight=config.qk_norm_weight)

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        *,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        slots_T: Tensor | None = None,
    ) -> Tensor:
        batch, length, _ = x_BTD.shape
        q_BTE, k_BTE, v_BTE = joint_linear(x_BTD, self.q_proj, self.k_proj, self.v_proj)
        q_BTNH = q_BTE.view(batch, length, self.num_heads, self.head_dim)
        k_BTKH = k_BTE.view(batch, length, self.num_kv_heads, self.head_dim)
        v_BTKH = v_BTE.view(batch, length, self.num_kv_heads, self.head_dim)
        q_BNTH = rotate(self.q_norm(q_BTNH), *rope).transpose(1, 2)
        k_BKSH = rotate(self.k_norm(k_BTKH), *rope).transpose(1, 2)
        v_BKSH = v_BTKH.transpose(1, 2)
        if cache is not None:
            assert slots_T is not None, "a cached call says which slots it writes"
            k_BKSH, v_BKSH = cache.update(self.layer, k_BKSH, v_BKSH, slots_T)
        out_BNTH = attention(q_BNTH, k_BKSH, v_BKSH, mask=mask)
        return self.o_proj(out_BNTH.transpose(1, 2).reshape(batch, length, -1))
