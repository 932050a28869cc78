"""Builds the optimizer that a config describes, and sets what changes from step to step."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from osler.optim.bf16 import Bf16AdamW
from osler.optim.config import AdamWConfig, MuonConfig
from osler.optim.muon import Muon
from osler.optim.schedule import momentum_at, weight_decay_scale

# Norms come first, because their names may match the other patterns too; everything that is left is a matrix.
GROUPS = (
    ("vectors", re.compile(r"norm\.weight$")),
    ("tables", re.compile(r"embed_tokens|value_embed")),  # read by token id: a row has a gradient only where its token occurs
    ("embeddings", re.compile(r"embed_proj|lm_head")),
    ("matrices", re.compile(r"")),
)


def group_of(parameter_name: str) -> str:
    """Return the group of a parameter: the first of ``GROUPS`` whose pattern matches its name.

    Where tables have no settings of their own, they are among the embeddings.
    """
    return next(group for group, pattern in GROUPS if pattern.search(parameter_name))


def grouped(model: nn.Module, settings: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the groups that have trained parameters, with their settings.

    ``base_lr`` and ``base_weight_decay`` are what the schedules multiply.
    """
    parameters: dict[str, list[nn.Parameter]] = {name: [] for name in settings}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = group_of(name)
            parameters[group if group in settings else "embeddings"].append(parameter)
    return [
        {"params": each, "name": name, "base_lr": of["lr"], "base_weight_decay": of["weight_decay"], **of}
        for (name, of), each in zip(settings.items(), parameters.values(), strict=True)
        if each
    ]


def embedding_settings(lr: float, config: AdamWConfig | MuonConfig) -> dict[str, float]:
    """Return a learning rate for embeddings, and the weight decay with which they shrink as much as matrices if they decay."""
    return {"lr": lr, "weight_decay": config.weight_decay * config.lr / lr if config.decay_embeddings else 0.0}


def build_adamw(model: nn.Module, config: AdamWConfig, seed: int, _: dist.ProcessGroup | None) -> torch.optim.Optimizer:
    """Build fused AdamW, or the AdamW that rounds stochastically if weights are in bf16. Ranks share no work of either."""
    embedding_lr = config.lr if config.embedding_lr is None else config.embedding_lr
    settings = {
        "matrices": {"lr": config.lr, "weight_decay": config.weight_decay},
        "embeddings": embedding_settings(embedding_lr, config),
        "vectors": {"lr": config.lr, "weight_decay": 0.0},
    }
    groups = grouped(model, settings)
    betas = (config.beta1, config.beta2)
    if any(parameter.dtype == torch.bfloat16 for parameter in model.parameters()):
        return Bf16AdamW(groups, betas=betas, eps=config.eps, seed=seed)
    return torch.optim.AdamW(groups, betas=betas, eps=config.eps, fused=True)


def build_muon(model: nn.Module, config: MuonConfig, _: int, process_group: dist.ProcessGroup | None) -> Muon:
    """Build Muon for the matrices with AdamW for the rest; Newton-Schulz runs in the model's compute dtype."""
    adamw = {"lr": config.adamw_lr, "weight_decay": 0.0, "betas": (config.beta1, config.beta2), "eps": config.eps}
    settings = {
        "matrices": {name: getattr(config, name) for name in ("lr", "weight_decay", "momentum", "newton_schulz_steps")},
        "embeddings": adamw | embedding_settings(config.adamw_lr, config),
        "vectors": adamw,
    }
    if config.input_embedding_lr is not None:
        settings["tables"] = adamw | embedding_settings(config.input_embedding_lr, config)
    return Muon(grouped(model, settings), dtype=getattr(model, "compute_dtype", torch.float32), process_group=process_group)


OPTIMIZERS: dict[type, Callable[..., torch.optim.Optimizer]] = {AdamWConfig: build_adamw, MuonConfig: build_muon}


def build_optimizer(
    model: nn.Module, config: AdamWConfig | MuonConfig, *, seed: int = 0, process_group: dist.ProcessGroup | None = None
) -> torch.optim.Optimizer:
    """Build the optimizer of ``config`` over all trained parameters of ``model``; ``seed`` is for stochastic rounding.

    The ranks of ``process_group`` hold the same model and gradients, whole or sharded, and may share an update's work.
    """
    return OPTIMIZERS[type(config)](model, config, seed, process_group)


def set_hyperparameters(
    optimizer: torch.optim.Optimizer,
    config: AdamWConfig | MuonConfig,
    lr_scale: float,
    tokens: int,
    total_tokens: int,
    repeated_share: float,
) -> None:
    """Set what changes from step to step: learning rates, weight decay, and Muon's momentum.

    ``repeated_share`` is the share of the step's tokens that come from sources in a later epoch than their first.
    """
    decay_scale = weight_decay_scale(config.weight_decay_schedule, lr_scale, tokens, total_tokens, repeated_share)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * lr_scale
        group["weight_decay"] = group["base_weight_decay"] * decay_scale
        if isinstance(config, MuonConfig) and group["name"] == "matrices":
            group["momentum"] = momentum_at(config.momentum_warmup, config.momentum, tokens)
