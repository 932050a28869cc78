"""From a model and a config to an optimizer: parameter groups by ordered pattern, first match wins."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from osler.errors import UserError
from osler.optim.bf16 import Bf16AdamW
from osler.optim.config import AdamWConfig

# Order matters: norms are vectors whatever they sit in; what is left over is a matrix.
GROUPS = (
    ("vectors", re.compile(r"norm\.weight$")),
    ("embeddings", re.compile(r"embed_tokens|embed_proj|lm_head")),
    ("matrices", re.compile(r"")),
)


def group_of(parameter_name: str) -> str:
    """The group a parameter belongs to: the first pattern of ``GROUPS`` that its name matches."""
    return next(group for group, pattern in GROUPS if pattern.search(parameter_name))


def adamw_groups(model: nn.Module, config: AdamWConfig) -> list[dict[str, Any]]:
    """The three groups of AdamW; every group remembers its full learning rate as ``base_lr``."""
    embedding_lr = config.lr if config.embedding_lr is None else config.embedding_lr
    settings = {
        "matrices": {"lr": config.lr, "weight_decay": config.weight_decay},
        "embeddings": {"lr": embedding_lr, "weight_decay": 0.0},
        "vectors": {"lr": config.lr, "weight_decay": 0.0},
    }
    named = list(model.named_parameters())
    groups = []
    for group, options in settings.items():
        parameters = [parameter for name, parameter in named if group_of(name) == group]
        if parameters:
            groups.append({"params": parameters, "name": group, "base_lr": options["lr"], **options})
    return groups


def build_adamw(model: nn.Module, config: AdamWConfig) -> torch.optim.AdamW:
    """Fused AdamW over the three groups."""
    return torch.optim.AdamW(
        adamw_groups(model, config), betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


OPTIMIZERS = {AdamWConfig: build_adamw}


def build_optimizer(model: nn.Module, config: AdamWConfig, *, seed: int = 0) -> torch.optim.Optimizer:
    """The optimizer that ``config`` describes, over all of ``model``'s parameters.

    Weights that are kept in bf16 get the AdamW that rounds stochastically, by ``seed``.
    """
    if any(parameter.dtype == torch.bfloat16 for parameter in model.parameters()):
        if not isinstance(config, AdamWConfig):
            raise UserError(
                f"precision=pure-bf16 rounds inside its own AdamW; with optim.type={config.type} use precision=bf16."
            )
        return Bf16AdamW(adamw_groups(model, config), betas=(config.beta1, config.beta2), eps=config.eps, seed=seed)
    return OPTIMIZERS[type(config)](model, config)


def set_lr(optimizer: torch.optim.Optimizer, scale: float) -> None:
    """Set each group's learning rate to ``scale`` times its full one."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * scale
