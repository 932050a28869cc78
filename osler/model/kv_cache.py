"""Keys and values of past tokens in one allocation for many rows, each at its own position.

``bias_BKS``, which attention adds to its scores, hides the slots that a row has not filled, so rows can begin and end at any
step, and those of tokens that have left the window of attention. Attention reads as far as the fullest row. Shapes: L layers, B
rows, K key/value heads, C = B * K, S slots, H head size, R some of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from osler.model.config import ModelConfig


class CacheStep(NamedTuple):
    """The parts of the cache that a decode step needs, prepared for all layers; each inner list has one entry per layer."""

    stored: Sequence[Sequence[Tensor]]  # keys and values to write, [C * S, H]
    k_CHS: Sequence[Tensor]  # keys to read: the filled part of the cache
    v_CSH: Sequence[Tensor]
    slot_BK: Tensor  # where the new token of every row goes: indices into [C * S]
    bias_C1S: Tensor  # added to the scores
    place_B: Tensor  # where the new token of every row is among the tokens of the row
    index_BSI: Sequence[Tensor] = ()  # keys of a sparse index, all slots

    def write(self, layer: int, k_BKH: Tensor, v_BKH: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values of the new tokens, and return all that the layer has."""
        for stored, new_BKH in zip(self.stored, (k_BKH, v_BKH), strict=True):
            stored[layer].index_put_((self.slot_BK,), new_BKH.to(stored[layer].dtype))
        return self.k_CHS[layer], self.v_CSH[layer]


class KVCache:
    """Room for ``rows`` rows. The token at position p of a row is in its slot p; the last slot is for rows that have ended."""

    def __init__(self, config: ModelConfig, rows: int, slots: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.config, self.slots = config, slots
        shape = (config.num_layers, rows, config.num_kv_heads, slots, config.head_dim)
        self.k, self.v = self.stored = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)]  # [L, B, K, S, H]
        if config.copy_head_dim is not None:  # of a copy head: keys, and the token after each place
            self.copy_k = torch.zeros(1, rows, 1, slots, config.copy_head_dim, dtype=dtype, device=device)
            self.next_ids = torch.zeros(1, rows, 1, slots, 1, dtype=torch.int64, device=device)
            self.stored += [self.copy_k, self.next_ids]
        self.bias_BKS = torch.full(shape[1:4], -torch.inf, dtype=dtype, device=device)
        self.length_B = torch.zeros(rows, dtype=torch.int64, device=device)  # tokens of a row, and the position of its next token
        self._first_BK = torch.arange(0, rows * shape[2] * slots, slots, device=device).view(rows, shape[2])
        self.filled = 0  # slots that a step reads; no running row has more tokens

    def put(self, row_R: Tensor, other: KVCache, from_R: Tensor) -> None:
        """Overwrite rows with rows of another cache, which may have another number of slots."""
        width = min(other.slots, self.slots)
        for own, theirs in zip(self.stored, other.stored, strict=True):
            own[:, row_R, :, :width] = theirs[:, from_R, :, :width].to(own.dtype)
        length_R = other.length_B[from_R]
        slot_S, length_R1 = torch.arange(self.slots, device=length_R.device), length_R[:, None]
        hidden_RS = slot_S >= length_R1
        if (window := self.config.window) is not None:  # of the row's next token
            hidden_RS |= slot_S <= length_R1 - window
        self.bias_BKS[row_R] = torch.zeros_like(hidden_RS, dtype=self.k.dtype).masked_fill_(hidden_RS, -torch.inf)[:, None]
        self.length_B[row_R] = length_R
        self.filled = max(self.filled, other.filled)

    def beginning(self, row: int, length: int) -> KVCache:
        """Return a cache of one row that holds the first tokens of ``row``."""
        part = type(self)(self.config, 1, length, self.k.dtype, self.k.device)
        for copy, original in zip(part.stored, self.stored, strict=True):
            copy[:, 0] = original[:, row, :, :length]
        part.length_B.fill_(length)
        part.filled = length
        return part

    def open_step(self) -> CacheStep:
        """Make the new token of every row visible to the row, and prepare the cache for all layers of a decode step."""
        self.filled = min(self.filled + 1, self.slots)
        slot_BK = self._first_BK + self.length_B[:, None]  # indices into [C * S]
        self.bias_BKS.view(-1).index_fill_(0, slot_BK.view(-1), 0.0)
        if (window := self.config.window) is not None:
            leaves_BK = (self.length_B >= window)[:, None].expand_as(slot_BK)  # in other rows slot 0, which stays visible
            hidden_BK = torch.zeros_like(slot_BK, dtype=self.k.dtype).masked_fill_(leaves_BK, -torch.inf)
            left_BK = self._first_BK + (self.length_B - window).clamp_min(0)[:, None]
            self.bias_BKS.view(-1).index_put_((left_BK.view(-1),), hidden_BK.view(-1))
        read_k, read_v = (stored[..., : self.filled, :].flatten(1, 2) for stored in (self.k, self.v))
        return CacheStep(
            stored=[stored.flatten(1, 3).unbind(0) for stored in (self.k, self.v)],
            k_CHS=read_k.transpose(2, 3).unbind(0),
            v_CSH=read_v.unbind(0),
            slot_BK=slot_BK,
            bias_C1S=self.bias_BKS[..., : self.filled].flatten(0, 1)[:, None],
            place_B=self.length_B,
        )
