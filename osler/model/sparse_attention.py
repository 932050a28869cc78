"""Attention to the keys that a small index chooses (DeepSeek Sparse Attention), for training and decoding.

It is ``attention.py`` with an indexer beside it. A token attends to ``top_k`` keys; the formulas and the two ways to compute them
are in ``ops/sparse_attention.py``. Rows of at most ``top_k`` tokens are attended to densely, because all keys are chosen.

The indexer reads the detached input of the layer. It learns from the KL between its own distribution and the layer's attention
over the same keys, which is detached too. So the language-model loss leaves the indexer alone and the KL leaves the model alone.
In the warm-up (``warms_up``) the layer attends densely and the KL is over all keys. A copy of the model for evaluation or
sampling has no warm-up: its attention is sparse. Without gradients nothing is measured. Decoding caches the index's keys beside
keys and values, scores all of them in each step, and reads only the keys and values that are chosen.

Shapes as in ``attention.py`` and ``ops/sparse_attention.py``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osler.model.attention import Attention, DecodeAttention
from osler.model.config import ModelConfig, SparseAttentionConfig
from osler.model.kv_cache import CacheStep, KVCache
from osler.model.layers import DecodeLinear, Layout, Linear, RMSNorm, joint_linear
from osler.model.rope import apply_rope, thinned_tables
from osler.ops.attention import attention
from osler.ops.precision import wide
from osler.ops.sparse_attention import (
    Choice,
    Index,
    best_keys,
    choose,
    gather_attention,
    index_measured,
    index_scores,
    is_seen,
    recall,
)

# What is measured of each layer and token, in this order; the first has a gradient.
MEASURED = ("index/kl", "index/entropy", "index/distance", "index/recall")


def sparse_config(config: ModelConfig) -> SparseAttentionConfig:
    assert isinstance(config.attention, SparseAttentionConfig)
    return config.attention


class Indexer(nn.Module):
    """Projects the input of a layer to its index. The keys have a LayerNorm without a scale, because ``q_proj`` can learn it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = sparse_config(config)
        self.choices = config.num_kv_heads if self.config.selection == "per_kv_group" else 1
        self.q_proj = Linear(config.hidden_size, self.config.index_heads * self.config.index_head_dim)
        self.k_proj = Linear(config.hidden_size, self.config.index_head_dim)
        self.weights_proj = Linear(config.hidden_size, self.config.index_heads)

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> Index:
        q_BTE, k_BTI = joint_linear(x_BTD, self.q_proj, self.k_proj)
        return self.index(q_BTE, k_BTI, F.linear(wide(x_BTD), wide(self.weights_proj.weight)), rope)

    def index(self, q_BTE: Tensor, k_BTI: Tensor, weight_BTE: Tensor, rope: tuple[Tensor, Tensor]) -> Index:
        """Return the index of projected tokens; ``rope`` holds the tables of the model's heads, plain or rolled."""
        size = self.config.index_head_dim
        k_BTI = F.layer_norm(wide(k_BTI), (size,)).to(k_BTI.dtype)
        qk_BTMI = torch.cat([q_BTE, k_BTI], dim=-1).unflatten(-1, (-1, size))  # M: all heads of the queries, and the key
        turned, still = qk_BTMI.split(size // 2, dim=-1)
        qk_BTMI = torch.cat([apply_rope(turned, *thinned_tables(*rope, size // 4)), still], dim=-1)
        q_BRTJI = qk_BTMI[..., :-1, :].unflatten(2, (self.choices, -1)).transpose(1, 2)
        weight_BRTJ = weight_BTE.unflatten(-1, (self.choices, -1)).transpose(1, 2)
        return Index(q_BRTJI, qk_BTMI[..., -1, :], weight_BRTJ * (weight_BRTJ.shape[-1] * size) ** -0.5)


class SparseCache(KVCache):
    """Keys and values of past tokens, and the keys of the index, all in one dtype."""

    def __init__(self, config: ModelConfig, rows: int, slots: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(config, rows, slots, dtype, device)
        shape = (config.num_layers, rows, 1, slots, sparse_config(config).index_head_dim)
        self.index = torch.zeros(shape, dtype=dtype, device=device)
        self.stored.append(self.index)

    def open_step(self) -> CacheStep:
        step = super().open_step()
        return step._replace(index_BSI=self.index[:, :, 0].unbind(0))


class SparseAttention(Attention):
    """Attention to the keys that an indexer chooses."""

    cache_class = SparseCache

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.indexer = Indexer(config)
        self.choice = Choice(self.indexer.config.top_k, self.indexer.config.local_window)
        self.warms_up = False

    @staticmethod
    def mask_of(document_BT: Tensor) -> Tensor:
        """Return the place in its row where the document of each token begins, int64 [B, T]; a document's ids are adjacent."""
        begins_BT = F.pad(document_BT[:, 1:] != document_BT[:, :-1], (1, 0), value=True)
        return (begins_BT * torch.arange(document_BT.shape[1], device=document_BT.device)).cummax(1).values

    def forward(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], ids_BT: Tensor, *, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to the chosen keys, from the first token of a document on (``mask``, see ``mask_of``).

        The second result is what is measured (``MEASURED``), fp32 [B, T, 4]; None without gradients.
        """
        q_BNTH, k_BKTH, v_BKTH = (heads.transpose(1, 2) for heads in self.project(x_BTD, rope, ids_BT))
        length, measures = x_BTD.shape[1], torch.is_grad_enabled()
        first_BT = x_BTD.new_zeros(x_BTD.shape[:2], dtype=torch.int64) if mask is None else mask
        index = self.indexer(x_BTD.detach(), rope)
        if self.warms_up or length <= self.choice.top_k:
            place_T1 = torch.arange(length, device=x_BTD.device)[:, None]
            seen = None if mask is None else is_seen(place_T1, first_BT[:, None, :, None], length)
            out_BNTH = attention(q_BNTH, k_BKTH, v_BKTH, mask=seen)
            measured_BTM = index_measured(q_BNTH, k_BKTH, index, first_BT) if measures else None
        else:
            chosen_BRTX = choose(index, first_BT, self.choice)
            out_BNTH, measured_BTM = gather_attention(q_BNTH, k_BKTH, v_BKTH, index, chosen_BRTX)
        if not measures or measured_BTM is None:
            return self.output(out_BNTH), None
        recall_BT = recall(q_BNTH, k_BKTH, index, first_BT, self.choice)
        return self.output(out_BNTH), torch.cat([measured_BTM, recall_BT[..., None]], dim=-1)

    def for_decoding(self, layer: int, norm: RMSNorm, layout: Layout) -> DecodeSparseAttention:
        return DecodeSparseAttention(self, layer, norm, layout)


class DecodeSparseAttention(DecodeAttention):
    """The same attention, its indexer and the norm before both for few tokens at a time."""

    def __init__(self, trained: SparseAttention, layer: int, norm: RMSNorm, layout: Layout) -> None:
        super().__init__(trained, layer, norm, layout)
        self._indexer, self._choice = trained.indexer, trained.choice
        indexer = trained.indexer
        self._sizes = [len(indexer.q_proj.weight), len(indexer.k_proj.weight)]
        self._index_qk = DecodeLinear(layout, indexer.q_proj.weight, indexer.k_proj.weight, norm=norm)
        self._index_weights = DecodeLinear(layout._replace(dtype=torch.float32), indexer.weights_proj.weight, norm=norm)

    def _index(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> Index:
        q_BTE, k_BTI = self._index_qk(x_BTD).split(self._sizes, dim=-1)
        return self._indexer.index(q_BTE, k_BTI, self._index_weights(x_BTD.float()), rope)

    def prefill(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], ids_BT: Tensor, mask: Tensor | None, cache: KVCache
    ) -> Tensor:
        assert isinstance(cache, SparseCache)
        index = self._index(x_BTD, rope)
        cache.index[self.layer, :, 0, -x_BTD.shape[1] :] = index.k_BSI
        if cache.slots <= self._choice.top_k:
            return super().prefill(x_BTD, rope, ids_BT, mask, cache)
        index = index._replace(k_BSI=cache.index[self.layer, :, 0])
        chosen_BRTX = choose(index, torch.zeros(x_BTD.shape[:2], dtype=torch.int64, device=x_BTD.device), self._choice)
        out_BNTH, _ = gather_attention(*self._fill(x_BTD, rope, ids_BT, cache), index, chosen_BRTX)
        return self._o_proj(out_BNTH.transpose(1, 2).flatten(2))

    def step(self, x_BD: Tensor, rope: tuple[Tensor, Tensor], token_B: Tensor, cached: CacheStep) -> Tensor:
        new = self._index(x_BD[:, None], (rope[0][:, None], rope[1][:, None]))
        stored_BSI = cached.index_BSI[self.layer]
        row_B = torch.arange(len(x_BD), device=x_BD.device)
        stored_BSI.index_put_((row_B, cached.place_B), new.k_BSI[:, 0].to(stored_BSI.dtype))
        keys_BSI = stored_BSI[:, : cached.k_CHS[self.layer].shape[-1]]  # the filled part of the cache
        if keys_BSI.shape[1] <= self._choice.top_k:
            return super().step(x_BD, rope, token_B, cached)
        q_BNH, k_BKH, v_BKH = self._project(x_BD, rope, token_B)
        cached.write(self.layer, k_BKH, v_BKH)
        scores_BR1S = index_scores(new._replace(q_BRTJI=new.q_BRTJI.to(keys_BSI.dtype), k_BSI=keys_BSI))
        place = cached.place_B[:, None, None, None]
        chosen_BRX = best_keys(scores_BR1S, place, torch.zeros_like(place), self._choice)[:, :, 0]
        row_BKX = (cached.slot_BK - cached.place_B[:, None])[..., None] + chosen_BRX.clamp_min(0)
        k_CXH, v_CXH = (
            stored[self.layer].index_select(0, row_BKX.flatten()).view(-1, row_BKX.shape[2], self.head_dim)
            for stored in cached.stored
        )
        bias_BKX = torch.zeros_like(row_BKX, dtype=k_CXH.dtype).masked_fill_(chosen_BRX < 0, -torch.inf)
        return self._attend(q_BNH, k_CXH.transpose(1, 2), v_CXH, bias_BKX.flatten(0, 1)[:, None])
