"""The model, one plain single-device transformer for training, evaluation and export, and the loss that it is trained with.

The model ends at the hidden states: training and RL never compute all logits at once (``ops/cross_entropy.py``), and sampling
uses ``decoder.py``. Shapes: B batch, T tokens, D hidden, R features of the head, V vocabulary (padded), N = B * T.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from osler.model.attention import Attention
from osler.model.config import DenseAttentionConfig, ModelConfig, SparseAttentionConfig
from osler.model.copy_head import CopyHead
from osler.model.init import init_weights, is_of_indexer
from osler.model.layers import FeedForward, Linear, RMSNorm
from osler.model.rope import rope_tables
from osler.model.sparse_attention import SparseAttention
from osler.ops.copies import Copies, copied_logits_reference
from osler.ops.cross_entropy import linear_cross_entropy
from osler.ops.labels import IGNORED
from osler.ops.precision import wide
from osler.runtime.faults import poisoned

ATTENTIONS = {DenseAttentionConfig: Attention, SparseAttentionConfig: SparseAttention}


class Block(nn.Module):
    """Pre-norm attention, then pre-norm feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps, weight=config.norm_weight)
        self.self_attn = ATTENTIONS[type(config.attention)](config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps, weight=config.norm_weight)
        self.mlp = FeedForward(config)

    def forward(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], ids_BT: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the residual stream after the block, and what is measured of an index, if the attention has one."""
        out_BTD, measured_BTM = self.self_attn(self.input_layernorm(x_BTD), rope, ids_BT, mask=mask)
        x_BTD = x_BTD + out_BTD
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), measured_BTM


class Transformer(nn.Module):
    """Decoder-only transformer with Hugging Face's parameter names; weights in fp32, activations in ``compute_dtype``.

    Freshly built weights are uninitialised: call :meth:`init_weights` or load a state dict.
    """

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: ModelConfig, *, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.trained_seq_len = config.max_seq_len  # tokens of the longest rows that the weights were trained on, where known
        self.compute_dtype = compute_dtype
        self.embed_tokens = nn.Embedding(config.padded_vocab_size, config.embed_rank or config.hidden_size)
        self.embed_proj = None if config.embed_rank is None else Linear(config.embed_rank, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps, weight=config.norm_weight)
        self.lm_head = None if config.tie_embeddings else Linear(config.hidden_size, config.padded_vocab_size)
        self.copy_head = None if config.copy_head_dim is None else CopyHead(config)
        self.make_tables(torch.get_default_device())

    @property
    def usable_seq_len(self) -> int:
        """The longest rows that the model reads as well as those it was trained on; see ``ModelConfig.usable_seq_len``."""
        return self.config.usable_seq_len(self.trained_seq_len)

    def make_tables(self, device: torch.device) -> None:
        """Compute RoPE's tables on a device. The tables are not weights, so a model that began on ``meta`` needs this too."""
        shape = self.config
        cos, sin = rope_tables(shape.max_seq_len, shape.head_dim, shape.rope_theta, shape.rope_scaling)
        self.register_buffer("rope_cos", cos.to(device), persistent=False)
        self.register_buffer("rope_sin", sin.to(device), persistent=False)

    def init_weights(self, seed: int) -> None:
        """Draw every weight by the table in ``init.py``; a seed gives the same weights on every device."""
        init_weights(self, self.config, seed)

    def eager_copy(self, weights: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Transformer:
        """Return a plain model that shares ``weights``, the state dict of this model, and computes in ``dtype`` if given."""
        with torch.device("meta"):
            copy = Transformer(self.config, compute_dtype=dtype or self.compute_dtype)
        copy.load_state_dict(weights, assign=True)
        copy.rope_cos, copy.rope_sin, copy.trained_seq_len = self.rope_cos, self.rope_sin, self.trained_seq_len
        return copy

    def forward(self, ids_BT: Tensor, *, document_BT: Tensor | None = None) -> Tensor:
        """Return the hidden states after the final norm, [B, T, D] in ``compute_dtype``.

        Attention is causal; with ``document_BT`` it stays inside equal document ids.
        """
        return self.with_index(ids_BT, document_BT)[0]

    def with_index(self, ids_BT: Tensor, document_BT: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the hidden states, and for a sparse model what is measured of its index, averaged over the layers, [B, T, M].

        Only the first measurement, the KL in nats, has a gradient (``sparse_attention.py``). There are none without gradients.
        """
        length = ids_BT.shape[1]
        mask = None if document_BT is None else ATTENTIONS[type(self.config.attention)].mask_of(document_BT)
        x_BTD = self.embed_tokens(ids_BT).to(self.compute_dtype)
        if self.embed_proj is not None:
            x_BTD = self.embed_proj(x_BTD)
        rope = (self.rope_cos[:length, None].to(x_BTD.dtype), self.rope_sin[:length, None].to(x_BTD.dtype))
        measured = []
        for block in self.layers:
            x_BTD, of_block = block(x_BTD, rope, ids_BT, mask)
            measured += [] if of_block is None else [of_block]
        return self.norm(x_BTD), torch.stack(measured).mean(0) if measured else None

    def warm_up_indexers(self) -> None:
        """Train the indexers alone, on dense attention: freeze everything else. Evaluation and sampling stay sparse."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_of_indexer(name))
        for block in self.layers:
            assert isinstance(block, Block) and isinstance(block.self_attn, SparseAttention)
            block.self_attn.warms_up = True

    def head(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return features [N, R] and weight [V, R] with logits = features @ weight.T; rows past the vocabulary are padding."""
        features = hidden.flatten(0, -2)
        if self.lm_head is not None:
            return features, self.lm_head.weight
        if self.embed_proj is not None:
            # The tied factorized head is the input path transposed: hidden -> rank -> vocabulary.
            features = features @ self.embed_proj.weight.to(features.dtype)
        return features, self.embed_tokens.weight

    def copies(self, hidden_BTD: Tensor, ids_BT: Tensor, document_BT: Tensor | None = None) -> Copies | None:
        """Return what each of the B * T tokens can copy from its row; None for a model without a copy head."""
        if self.copy_head is None:
            return None
        next_ids_BS, score_BTS = self.copy_head(hidden_BTD, ids_BT, document_BT)
        row_N = torch.arange(len(ids_BT), device=ids_BT.device).repeat_interleave(ids_BT.shape[1])
        return Copies(next_ids_BS, row_N, score_BTS.flatten(0, 1))

    def logits(self, hidden: Tensor, copies: Copies | None = None) -> Tensor:
        """Return logits over the true vocabulary in fp32, [..., vocab_size]; training never computes all of them at once.

        ``copies`` are those of the same tokens. Raises ValueError if a model with a copy head gets none.
        """
        if self.copy_head is not None and copies is None:
            raise ValueError("a model with a copy head needs copies: model.logits(hidden, model.copies(hidden, ids))")
        features, weight = self.head(hidden)
        logits = wide(features @ weight.to(features.dtype).T)[:, : self.config.vocab_size]
        if copies is not None:
            logits = copied_logits_reference(logits, *copies.part(0, len(logits)))
        return logits.view(*hidden.shape[:-1], -1)


class ModelLoss(nn.Module):
    """A loss and its model in one module, whose forward pass goes from tokens to a number."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model


class SummedLoss(ModelLoss):
    """Map (ids, labels, document ids or None) to the summed cross-entropy in nats; fit for ``torch.compile``.

    With a sparse model these are several sums over the learned tokens: the cross-entropy, what is measured of the index, and last
    what is minimised: the cross-entropy and the KL of every layer's index.
    """

    def forward(self, ids_BT: Tensor, labels_BT: Tensor, document_BT: Tensor | None, *teacher: Tensor) -> Tensor:
        hidden_BTD, measured_BTM = self.model.with_index(ids_BT, document_BT)
        losses = self.of_hidden(hidden_BTD, ids_BT, labels_BT, document_BT, *teacher)
        return losses if measured_BTM is None else self.with_measured(losses, measured_BTM, labels_BT)

    def of_hidden(self, hidden_BTD: Tensor, ids_BT: Tensor, labels_BT: Tensor, document_BT: Tensor | None) -> Tensor:
        """Compute the part after the last block, which can be compiled by itself."""
        model, masses = self.model, None
        if model.copy_head is not None:
            masses = model.copy_head.log_masses(hidden_BTD, ids_BT, labels_BT, document_BT)
        features, weight = model.head(hidden_BTD)
        vocab_size = model.config.vocab_size
        return linear_cross_entropy(features, weight, labels_BT.flatten(), vocab_size=vocab_size, log_masses=masses)

    def with_measured(self, losses: Tensor, measured_BTM: Tensor, labels_BT: Tensor) -> Tensor:
        """Put the sums of the measurements before the last loss, and add the KL of all layers to it."""
        sums_M = (measured_BTM * (labels_BT != IGNORED)[..., None]).sum((0, 1))
        parts = losses.view(-1)
        minimised = parts[-1:] + sums_M[:1] * self.model.config.num_layers
        return torch.cat([parts[: max(len(parts) - 1, 1)], sums_M.detach(), minimised])


def nan_gradient_unless_finite(loss: Tensor) -> Tensor:
    """Return the same loss; a loss that is not finite gets gradients of NaN.

    Otherwise some of its gradients could be finite, and then one rank would skip the step and another would not.
    """
    scale = math.nan if poisoned("train-loss") else 0.0
    return loss * (1.0 + scale * loss.detach())  # 1, or NaN
