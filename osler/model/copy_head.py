"""The copy head: beside the head over the vocabulary, each token scores earlier tokens of its row as predictions.

The state of a token is compared with the states of the tokens before it; where they are alike, what followed there is likely to
follow here. The scores go into the softmax as ``ops/copies.py`` says. It is a cache model (arXiv 1612.04426) whose comparison is
learned. Shapes: B rows, T tokens, D hidden, P width of the copy head, S = T places.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from osler.model.config import ModelConfig
from osler.model.kv_cache import KVCache
from osler.model.layers import DecodeLinear, Layout, Linear, RMSNorm, joint_linear
from osler.ops.copies import add_copies_, can_copy, copy_scores, log_masses


class CopyHead(nn.Module):
    """Scores the earlier tokens of a row."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.copy_head_dim is not None
        self.size = config.copy_head_dim
        self.q_proj = Linear(config.hidden_size, self.size)
        self.k_proj = Linear(config.hidden_size, self.size)

    def forward(self, hidden_BTD: Tensor, ids_BT: Tensor, document_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the token that each place predicts, [B, S], and for each token the scores of all places, [B, T, S] in fp32."""
        q_BTP, k_BSP = joint_linear(hidden_BTD, self.q_proj, self.k_proj)
        places_BTS = can_copy(slice(0, ids_BT.shape[1]), document_BT, ids_BT.device)
        return next_ids(ids_BT), copy_scores(q_BTP, k_BSP, places_BTS)

    def log_masses(
        self, hidden_BTD: Tensor, ids_BT: Tensor, labels_BT: Tensor, document_BT: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return what a loss needs to know of these scores; see ``ops/copies.py``."""
        q_BTP, k_BSP = joint_linear(hidden_BTD, self.q_proj, self.k_proj)
        return log_masses(q_BTP, k_BSP, next_ids(ids_BT), labels_BT, document_BT)


def next_ids(ids_BT: Tensor) -> Tensor:
    """Return the token after each place, which the place predicts; for the last place any, because no token can copy it."""
    return ids_BT.roll(-1, 1)


class DecodeCopyHead:
    """The same with the final norm before it, on keys and next tokens in the cache."""

    def __init__(self, trained: CopyHead, norm: RMSNorm, layout: Layout) -> None:
        self._q = DecodeLinear(layout, trained.q_proj.weight, norm=norm)
        self._k = DecodeLinear(layout, trained.k_proj.weight, norm=norm)

    def read(self, x_PTD: Tensor, ids_PT: Tensor, cache: KVCache) -> None:
        """Write the last T tokens of some prompts to the cache."""
        start = cache.slots - ids_PT.shape[1]
        cache.copy_k[0, :, 0, start:] = self._k(x_PTD).to(cache.copy_k.dtype)
        cache.next_ids[0, :, 0, max(start - 1, 0) : -1, 0] = ids_PT if start else ids_PT[:, 1:]

    def step(self, x_BD: Tensor, token_B: Tensor, cache: KVCache) -> None:
        """Write one more token of every row, whose length does not count it yet, to the cache."""
        row_B = torch.arange(len(x_BD), device=x_BD.device)
        cache.copy_k[0, :, 0].index_put_((row_B, cache.length_B), self._k(x_BD).to(cache.copy_k.dtype))
        cache.next_ids[0, :, 0, :, 0].index_put_((row_B, cache.length_B - 1), token_B)

    def add_(self, logits_BTV: Tensor, x_BTD: Tensor, cache: KVCache, place_BT: Tensor, rows: slice) -> None:
        """Add to the logits what the tokens at these places can copy."""
        filled = cache.filled
        k_BSP, next_ids_BS = cache.copy_k[0, rows, 0, :filled], cache.next_ids[0, rows, 0, :filled, 0]
        earlier_BTS = torch.arange(filled, device=x_BTD.device) < place_BT[..., None]
        score_BTS = copy_scores(self._q(x_BTD).to(k_BSP.dtype), k_BSP, earlier_BTS)
        next_ids_NS = next_ids_BS[:, None].expand(-1, x_BTD.shape[1], -1).flatten(0, 1)
        add_copies_(logits_BTV.view(-1, logits_BTV.shape[-1]), next_ids_NS, score_BTS.flatten(0, 1))
