"""Static key/value cache: one allocation for a whole rollout, written in place, read only as far as filled.

The cache knows nothing of prompts or stopping: the caller says which slots a call writes (the same for every row) and how many
slots attention reads (``read_len``), and masks what a row must not see.
"""

from __future__ import annotations

import torch
from torch import Tensor

from osler.model.config import ModelConfig


class KVCache:
    """Keys and values of every layer, [num_layers, B, num_kv_heads, max_len, head_dim]."""

    def __init__(
        self, config: ModelConfig, batch: int, max_len: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        shape = (config.num_layers, batch, config.num_kv_heads, max_len, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.read_len = max_len

    def update(self, layer: int, k_BKTH: Tensor, v_BKTH: Tensor, slots_T: Tensor) -> tuple[Tensor, Tensor]:
        """Write this call's keys and values at ``slots_T`` and return those of slots [0, read_len)."""
        k, v = self.k[layer], self.v[layer]
        k.index_copy_(2, slots_T, k_BKTH.to(k.dtype))
        v.index_copy_(2, slots_T, v_BKTH.to(v.dtype))
        return k[:, :, : self.read_len], v[:, :, : self.read_len]
