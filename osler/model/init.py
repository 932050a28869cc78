"""How every weight starts, in one table.

| parameter                     | start                                                                                       |
|-------------------------------|---------------------------------------------------------------------------------------------|
| embed_tokens                  | normal, std 1 / sqrt(width it feeds) when tied (it is also the head), else 1                |
| embed_proj                    | normal, std 1 / sqrt(rank)                                                                  |
| q, k, v, gate, up             | uniform, std 1 / sqrt(hidden_size)                                                          |
| o_proj, down_proj             | zero (each block starts as the identity), or normal scaled by 1 / sqrt(2 * num_layers)      |
| lm_head                       | zero (first loss is exactly ln(vocab_size)), or normal, std 1 / sqrt(hidden_size)           |
| norm weights                  | one                                                                                         |

``attention_init="mirrored"`` then overwrites q_proj with k_proj of its group and o_proj with half of v_projᵀ: heads start as
"look at tokens like me, copy what they are", which brings forward the moment a small model learns to copy (mimetic
initialisation, arXiv 2305.09828). Draws come from a CPU generator in parameter order, so a seed means one model everywhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from osler.model.attention import Attention
from osler.model.config import ModelConfig


def init_weights(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill ``model``'s parameters in place by the table above."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_draw(name, parameter, config, generator))
        if config.attention_init == "mirrored":
            for module in model.modules():
                if isinstance(module, Attention):
                    _mirror(module, config)


def _draw(name: str, parameter: Tensor, config: ModelConfig, generator: torch.Generator) -> Tensor:
    def normal(std: float) -> Tensor:
        return torch.randn(parameter.shape, generator=generator) * std

    width = 1 / math.sqrt(config.hidden_size)
    kind = name.split(".")[-2] if "." in name else name
    if kind.endswith("norm"):
        return torch.ones(parameter.shape)
    if kind == "embed_tokens":
        return normal(1 / math.sqrt(config.embed_rank or config.hidden_size) if config.tie_embeddings else 1.0)
    if kind == "embed_proj":
        return normal(1 / math.sqrt(parameter.shape[1]))
    if kind == "lm_head":
        return torch.zeros(parameter.shape) if config.head_init == "zero" else normal(width)
    if kind in ("o_proj", "down_proj"):
        if config.residual_init == "zero":
            return torch.zeros(parameter.shape)
        return normal(1 / math.sqrt(parameter.shape[1] * 2 * config.num_layers))
    # Uniform has no outliers; sqrt(3) makes its standard deviation the one of the table.
    bound = math.sqrt(3) * width
    return torch.rand(parameter.shape, generator=generator) * (2 * bound) - bound


def _mirror(layer: Attention, config: ModelConfig) -> None:
    groups = config.num_heads // config.num_kv_heads
    per_head = (config.num_kv_heads, config.head_dim, config.hidden_size)
    layer.q_proj.weight.copy_(layer.k_proj.weight.view(per_head).repeat_interleave(groups, 0).flatten(0, 1))
    layer.o_proj.weight.copy_(
        0.5 / groups * layer.v_proj.weight.view(per_head).repeat_interleave(groups, 0).flatten(0, 1).T
    )
