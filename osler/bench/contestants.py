"""The models that are timed: Osler's, and its peers' at the same shape with their own losses. Only this file imports the peers.

A contestant is a model and a function of (ids, labels, document ids or None) to the summed cross-entropy in nats, as
``train.step.TrainStep`` takes it. "The same shape" means the same layers, width, heads, key/value heads, vocabulary, rows and row
length, and nearly the same matrix parameters: nanochat's feed-forward has two matrices of four times the width and SwiGLU
three, so three times ``intermediate_size`` should be about eight times ``hidden_size``.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from osler.model.config import ModelConfig
from osler.model.transformer import SummedLoss, Transformer
from osler.parallel.engine import LossFunction
from osler.runtime.errors import UserError
from osler.train.config import TrainConfig

Contestant = tuple[nn.Module, LossFunction]


def build_osler(config: TrainConfig, dtype: torch.dtype) -> Contestant:
    """Build Osler's transformer and its chunked loss, as training runs them."""
    model = Transformer(config.model, compute_dtype=dtype)
    model.init_weights(config.seed)
    return model, SummedLoss(model)


def build_nanochat(config: TrainConfig, dtype: torch.dtype, checkout: Path) -> Contestant:
    """Build nanochat's ``GPT`` from a checkout, with full attention in every layer; it casts fp32 weights itself."""
    shape = config.model
    require_whole_embeddings(shape)
    if shape.tie_embeddings:
        raise UserError("nanochat's embedding and head are two matrices: compare with model.tie_embeddings=false.")
    if shape.head_dim * shape.num_heads != shape.hidden_size:
        raise UserError(
            f"nanochat's heads make up the width: head_dim {shape.head_dim} x num_heads {shape.num_heads} is not "
            f"hidden_size {shape.hidden_size}."
        )
    os.environ["NANOCHAT_DTYPE"] = str(dtype).removeprefix("torch.")
    sys.path.insert(0, str(checkout))
    gpt = importlib.import_module("nanochat.gpt")
    model = gpt.GPT(
        gpt.GPTConfig(
            sequence_len=config.seq_len,
            vocab_size=shape.vocab_size,
            n_layer=shape.num_layers,
            n_head=shape.num_heads,
            n_kv_head=shape.num_kv_heads,
            n_embd=shape.hidden_size,
            window_pattern="L",
        )
    )
    model.init_weights()
    return model, lambda ids, labels, _: model(ids, labels) * labels.numel()


def require_whole_embeddings(shape: ModelConfig) -> None:
    """Raise UserError for a factorized embedding: a peer with a whole one would be a larger model."""
    if shape.embed_rank is not None:
        raise UserError(
            f"No peer has a factorized embedding (model.embed_rank={shape.embed_rank}): leave --peer out, or compare with "
            "model.embed_rank=null."
        )


def build_hf(config: TrainConfig, dtype: torch.dtype) -> Contestant:
    """Build Hugging Face's Qwen3 with its own loss: fp32 weights under autocast, as its Trainer runs bf16."""
    transformers = importlib.import_module("transformers")
    shape = config.model
    model = transformers.Qwen3ForCausalLM(qwen3_config(transformers, shape))
    loss_function: Callable[..., Tensor] = model.loss_function

    def loss(ids: Tensor, labels: Tensor, _: Tensor | None) -> Tensor:
        with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
            logits = model(input_ids=ids, use_cache=False).logits
        # Its loss shifts labels by itself unless they come shifted.
        return loss_function(logits, None, shape.vocab_size, shift_labels=labels) * labels.numel()

    return model, loss


def qwen3_config(transformers, shape: ModelConfig):  # type: ignore[no-untyped-def]  # an optional library's classes
    """Return Qwen3's configuration of the same shape. Raises UserError where it has no such shape."""
    require_whole_embeddings(shape)
    return transformers.Qwen3Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_seq_len,
        rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=shape.tie_embeddings,
    )
