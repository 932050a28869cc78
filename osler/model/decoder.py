"""The model as sampling runs it: whole prompts once, then one token of every row at a time against a cache.

It is ``transformer.py`` on copies of the weights, laid out for few tokens at a time; its parts are in ``attention.py`` and
``layers.py``. Shapes: P prompts, B rows, T prompt tokens, D hidden, V vocabulary.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from osler.model.copy_head import DecodeCopyHead
from osler.model.kv_cache import KVCache
from osler.model.layers import DecodeFeedForward, DecodeLinear, Layout
from osler.model.rope import rolled_tables
from osler.model.transformer import Block, Transformer


class Decoder:
    """The present weights of a model, ready to decode on its device."""

    @torch.no_grad()
    def __init__(self, model: Transformer, layout: Layout) -> None:
        self.config, self.usable_seq_len, self.dtype = model.config, model.usable_seq_len, layout.dtype
        self.device = model.embed_tokens.weight.device
        self._embed = model.embed_tokens.weight.detach()
        self._embed_proj = None if model.embed_proj is None else DecodeLinear(layout, model.embed_proj.weight)
        blocks = [cast(Block, block) for block in model.layers]
        self._cache_class = blocks[0].self_attn.cache_class
        self._layers = []
        for layer, block in enumerate(blocks):
            attention = block.self_attn.for_decoding(layer, block.input_layernorm, layout)
            self._layers.append((attention, DecodeFeedForward(block.mlp, block.post_attention_layernorm, layout)))
        head = self._embed if model.lm_head is None else model.lm_head.weight
        if model.lm_head is None and model.embed_proj is not None:
            self._head = [DecodeLinear(layout, model.embed_proj.weight.T, norm=model.norm), DecodeLinear(layout, head)]
        else:
            self._head = [DecodeLinear(layout, head, norm=model.norm)]
        self._copy_head = None if model.copy_head is None else DecodeCopyHead(model.copy_head, model.norm, layout)
        self._rope = [table.to(self.dtype) for table in rolled_tables(model.rope_cos, model.rope_sin)]

    def new_cache(self, rows: int, slots: int) -> KVCache:
        """Return an empty cache for ``step``. On a CPU it is in fp32: small batched matmuls are twice as slow in bf16 there."""
        dtype = torch.float32 if self.device.type == "cpu" else self.dtype
        return self._cache_class(self.config, rows, slots, dtype, self.device)

    def prefill(self, prompts: Sequence[Sequence[int]], past: KVCache | None = None) -> tuple[KVCache, Tensor]:
        """Return a cache filled by prompts, for ``KVCache.put``, and the logits after their last tokens, [P, V] fp32."""
        cache, x_PTD = self.read(prompts, past)
        last_P = cache.length_B - (0 if past is None else past.filled) - 1
        x_P1D = x_PTD[torch.arange(len(prompts), device=self.device), last_P][:, None]
        return cache, self.logits(x_P1D, cache, cache.length_B[:, None] - 1)[:, 0]

    def read(self, prompts: Sequence[Sequence[int]], past: KVCache | None = None) -> tuple[KVCache, Tensor]:
        """Return a cache filled by prompts, and the hidden states after each token that follows ``past``, [P, T, D].

        ``past`` is a cache of one row with the first tokens of all prompts; every prompt has more tokens. Shorter prompts are
        padded on the right, where causal attention never looks.
        """
        start, width = 0 if past is None else past.filled, max(len(prompt) for prompt in prompts)
        ids_PT = torch.tensor([[*prompt[start:], *[0] * (width - len(prompt))] for prompt in prompts], device=self.device)
        length_P = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        cache = self._cache_class(self.config, len(prompts), width, self.dtype, self.device)
        mask_11TS = None
        if past is not None:
            cache.put(torch.arange(len(prompts), device=self.device), past, torch.zeros_like(length_P))
            mask_11TS = torch.ones(1, 1, width - start, width, dtype=torch.bool, device=self.device).tril(start)
        rope, x_PTD = self._rope_at(torch.arange(start, width, device=self.device)), self._embedded(ids_PT)
        for attention, feed_forward in self._layers:
            x_PTD = x_PTD + attention.prefill(x_PTD, rope, ids_PT, mask_11TS, cache)
            x_PTD = x_PTD + feed_forward(x_PTD)
        if self._copy_head is not None:
            self._copy_head.read(x_PTD, ids_PT, cache)
        cache.length_B.copy_(length_P)
        cache.filled = width
        return cache, x_PTD

    def step(self, token_B: Tensor, cache: KVCache, running_B: Tensor) -> Tensor:
        """Return the logits after one more token of every row, [B, V] fp32; rows that do not run keep their length.

        A row that runs must have a free slot.
        """
        rope, cached = self._rope_at(cache.length_B), cache.open_step()
        x_BD = self._embedded(token_B)
        for attention, feed_forward in self._layers:
            x_BD = x_BD + attention.step(x_BD, rope, token_B, cached)
            x_BD = x_BD + feed_forward(x_BD)
        if self._copy_head is not None:
            self._copy_head.step(x_BD, token_B, cache)
        logits_BV = self.logits(x_BD[:, None], cache, cache.length_B[:, None])[:, 0]
        cache.length_B += running_B  # a row that has ended writes into the same slot again
        return logits_BV

    def _rope_at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines at positions [...], each [..., 1, H]."""
        cos, sin = (table[positions].unsqueeze(-2) for table in self._rope)
        return cos, sin

    def _embedded(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self._embed).to(self.dtype)
        return x if self._embed_proj is None else self._embed_proj(x)

    def logits(self, x_BTD: Tensor, cache: KVCache, place_BT: Tensor, rows: slice = slice(None)) -> Tensor:
        """Return the logits of hidden states at places of some rows of the cache, [B, T, V] fp32."""
        logits = x_BTD
        for layer in self._head:
            logits = layer(logits)
        logits = logits.float()
        if self._copy_head is not None:
            self._copy_head.add_(logits, x_BTD, cache, place_BT, rows)
        return logits[..., : self.config.vocab_size]
