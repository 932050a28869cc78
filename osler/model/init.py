"""Initialisation of every weight.

| parameter                     | start                                                                                       |
|-------------------------------|---------------------------------------------------------------------------------------------|
| embed_tokens                  | normal, std 1 / sqrt(width it feeds) when tied (it is also the head), else 1                |
| embed_proj                    | normal, std 1 / sqrt(rank)                                                                  |
| q, k, v, gate, up             | uniform, std 1 / sqrt(hidden_size)                                                          |
| value_embed                   | zero                                                                                        |
| o_proj, down_proj             | zero (each block starts as the identity), or normal scaled by 1 / sqrt(2 * num_layers)      |
| lm_head                       | zero (first loss is exactly ln(vocab_size)), or normal, std 1 / sqrt(hidden_size)           |
| copy_head                     | k_proj uniform, std 1 / sqrt(hidden_size); q_proj equals k_proj: alike states match          |
| indexer                       | uniform, std 1 / sqrt(hidden_size); drawn after all others, which start as in a dense model  |
| norm weights                  | one; those of QK-norm ``qk_norm_init``                                                      |

``attention_init="mirrored"`` then overwrites q_proj with k_proj of its group and o_proj with half of v_projᵀ: at the start each
token attends to tokens like itself and copies them (arXiv 2305.09828). ``"induction"`` also wires an induction head by hand
(arXiv 2209.11895), because a small model that must copy from its context trains for long before one forms by chance.

Draws come from a CPU generator in parameter order, so a seed means the same model everywhere. Where weights are cut over ranks,
every rank draws all of them, one parameter at a time, and keeps its parts.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from osler.model.attention import Attention
from osler.model.config import ModelConfig
from osler.model.copy_head import CopyHead
from osler.model.rope import apply_rope, rope_tables
from osler.runtime.sharded import put_whole, whole

NEIGHBOUR_PAIRS = 4  # fastest RoPE pairs in use: enough to tell the position before from other positions
INDEXER_SEED = 1_000_003  # added to the seed, so that indexers repeat no number of the other weights
MATCH_DISTANCE = 50  # tokens over which RoPE must not turn a pair of the matching head by more than a radian


def init_weights(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill the parameters of ``model`` in place by the table above."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not is_of_indexer(name):
                put_whole(parameter, _draw(name.split(".")[-2], parameter.shape, config, generator))
        layers = [module for module in model.modules() if isinstance(module, Attention)]
        if config.attention_init != "independent":
            for layer in layers:
                _mirror(layer, config)
        for module in model.modules():
            if isinstance(module, CopyHead):
                put_whole(module.q_proj.weight, whole(module.k_proj.weight))
        if config.attention_init == "induction":
            _wire_induction(model.get_parameter("embed_tokens.weight"), layers[0], layers[1], config, generator)
    init_indexers(model, config, seed)


def is_of_indexer(name: str) -> bool:
    """Return whether a parameter, by its name, belongs to the indexer of a sparse attention."""
    return "indexer" in name.split(".")


@torch.no_grad()
def init_indexers(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill the parameters of the indexers in place, and no others; they do not depend on the rest of the model."""
    generator = torch.Generator().manual_seed(seed + INDEXER_SEED)
    for name, parameter in model.named_parameters():
        if is_of_indexer(name):
            put_whole(parameter, _draw(name.split(".")[-2], parameter.shape, config, generator))


def _draw(kind: str, shape: torch.Size, config: ModelConfig, generator: torch.Generator) -> Tensor:
    if kind.endswith("norm"):
        return torch.full(shape, config.qk_norm_init if kind in ("q_norm", "k_norm") else 1.0)
    hidden_std, fan_in = 1 / math.sqrt(config.hidden_size), shape[-1]
    residual_std = 0.0 if config.residual_init == "zero" else 1 / math.sqrt(fan_in * 2 * config.num_layers)
    normal_stds = {
        "embed_tokens": 1 / math.sqrt(config.embed_rank or config.hidden_size) if config.tie_embeddings else 1.0,
        "embed_proj": 1 / math.sqrt(fan_in),
        "value_embed": 0.0,
        "lm_head": 0.0 if config.head_init == "zero" else hidden_std,
        "o_proj": residual_std,
        "down_proj": residual_std,
    }
    if kind in normal_stds:
        std = normal_stds[kind]
        return torch.randn(shape, generator=generator) * std if std else torch.zeros(shape)
    # Uniform has no outliers; sqrt(3) gives it the standard deviation of the table.
    bound = math.sqrt(3) * hidden_std
    return torch.rand(shape, generator=generator) * (2 * bound) - bound


def _mirror(layer: Attention, config: ModelConfig) -> None:
    groups = config.num_heads // config.num_kv_heads

    def of_every_query_head(weight: Tensor) -> Tensor:
        per_head = whole(weight).view(config.num_kv_heads, config.head_dim, config.hidden_size)
        return per_head.repeat_interleave(groups, 0).flatten(0, 1)

    put_whole(layer.q_proj.weight, of_every_query_head(layer.k_proj.weight))
    put_whole(layer.o_proj.weight, 0.5 / groups * of_every_query_head(layer.v_proj.weight).T)


def _wire_induction(
    embedding: Tensor, first: Attention, second: Attention, config: ModelConfig, generator: torch.Generator
) -> None:
    """Make the first key/value head of two layers find where the present token stood before, and copy the token after it.

    The hidden vector gets three parts: a constant, ``head_dim`` places for "the token before me", and the token itself. The first
    layer's head looks one position back by the constant alone: its keys are a fixed vector in the fastest RoPE pairs, its queries
    the same vector turned by one position. It writes a projection of the token there into the reserved places. In the second
    layer the queries are that projection of the present token, in the slow RoPE pairs, and the keys are the reserved places. The
    token that is found is added to the token part.
    """
    size, hidden = config.head_dim, config.hidden_size
    groups = config.num_heads // config.num_kv_heads  # query heads that share the key/value head share the work
    everything, before, token = slice(None), slice(1, 1 + size), slice(1 + size, hidden)

    constant = (torch.arange(hidden) == 0).float()
    # The embedding comes first: nothing else is in memory while this largest tensor is whole.
    _overwrite(embedding, (everything, slice(1 + size)), constant[: 1 + size])

    def token_projection() -> Tensor:
        projection = torch.zeros(size, hidden)
        projection[:, token] = torch.randn(size, hidden - 1 - size, generator=generator) / math.sqrt(hidden - 1 - size)
        return projection

    fixed = (torch.arange(size) < NEIGHBOUR_PAIRS).float()
    cos, sin = rope_tables(2, size, config.rope_theta)
    one_back = apply_rope(fixed, cos[1], -sin[1])
    identity, copied = token_projection(), token_projection()
    angles = config.rope_theta ** -(torch.arange(size // 2) / (size // 2))
    slow = (angles * MATCH_DISTANCE < 1).float().repeat(2)[:, None]
    reserved = torch.zeros(size, hidden)
    reserved[:, before] = torch.eye(size)

    for layer, key, value, query, output in (
        (first, torch.outer(fixed, constant), identity, torch.outer(one_back, constant), reserved.T / groups),
        (second, reserved * slow, copied, identity * slow, copied.T / groups),
    ):
        _overwrite(layer.k_proj.weight, slice(size), key)
        _overwrite(layer.v_proj.weight, slice(size), value)
        _overwrite(layer.q_proj.weight, slice(groups * size), query.repeat(groups, 1))
        _overwrite(layer.o_proj.weight, (everything, slice(groups * size)), output.repeat(1, groups))


def _overwrite(parameter: Tensor, part: Any, values: Tensor) -> None:
    full = whole(parameter)
    full[part] = values
    put_whole(parameter, full)
