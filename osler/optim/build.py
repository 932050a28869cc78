"""Builds the optimizer that a config describes, and sets what changes from step to step."""

import re
from collections.abc import Callable, Mapping, Sequence
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
    ("embeddings", re.compile(r"embed_tokens|embed_proj|value_embed|lm_head")),
    ("matrices", re.compile(r"")),
)
TABLES = re.compile(r"embed_tokens|value_embed")  # read by token id, so a row has a gradient only where its token occurs


def group_of(parameter_name: str) -> str:
    """Return the group of a parameter: the first of ``GROUPS`` whose pattern matches its name."""
    return next(group for group, pattern in GROUPS if pattern.search(parameter_name))


def grouped(
    model: nn.Module, matrices: Mapping[str, Any], embeddings: Mapping[str, Any], vectors: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the groups that have trained parameters, each with its settings and its peak learning rate as ``base_lr``."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = []
    for name, settings in {"matrices": matrices, "embeddings": embeddings, "vectors": vectors}.items():
        parameters = [parameter for parameter_name, parameter in trained if group_of(parameter_name) == name]
        if parameters:
            groups.append({"params": parameters, "name": name, "base_lr": settings["lr"], **settings})
    return groups


def with_own_rate(groups: list[dict[str, Any]], parameters: Sequence[Any], lr: float) -> list[dict[str, Any]]:
    """Return the groups with some parameters of a group taken out, as a group of their own with another peak learning rate."""
    taken = {id(parameter) for parameter in parameters}
    others = [group | {"params": [each for each in group["params"] if id(each) not in taken]} for group in groups]
    (of_them,) = [group for group in groups if any(id(each) in taken for each in group["params"])]
    own = of_them | {"name": "input embedding", "params": list(parameters), "lr": lr, "base_lr": lr}
    return [*(group for group in others if group["params"]), own]


def build_adamw(model: nn.Module, config: AdamWConfig, seed: int, _: dist.ProcessGroup | None) -> torch.optim.Optimizer:
    """Build fused AdamW, or the AdamW that rounds stochastically if weights are in bf16. Ranks share no work of either."""
    embedding_lr = config.lr if config.embedding_lr is None else config.embedding_lr
    matrices = {"lr": config.lr, "weight_decay": config.weight_decay}
    embeddings, vectors = {"lr": embedding_lr, "weight_decay": 0.0}, {"lr": config.lr, "weight_decay": 0.0}
    groups = grouped(model, matrices, embeddings, vectors)
    betas = (config.beta1, config.beta2)
    if any(parameter.dtype == torch.bfloat16 for parameter in model.parameters()):
        return Bf16AdamW(groups, betas=betas, eps=config.eps, seed=seed)
    return torch.optim.AdamW(groups, betas=betas, eps=config.eps, fused=True)


def build_muon(model: nn.Module, config: MuonConfig, _: int, process_group: dist.ProcessGroup | None) -> Muon:
    """Build Muon for the matrices with AdamW for the rest; Newton-Schulz runs in the model's compute dtype."""
    adamw = {"lr": config.adamw_lr, "weight_decay": 0.0, "betas": (config.beta1, config.beta2), "eps": config.eps}
    matrices = {name: getattr(config, name) for name in ("lr", "weight_decay", "momentum", "newton_schulz_steps")}
    groups = grouped(model, matrices, adamw, adamw)
    tables = [parameter for name, parameter in model.named_parameters() if TABLES.search(name) and parameter.requires_grad]
    if config.input_embedding_lr is not None and tables:
        groups = with_own_rate(groups, tables, config.input_embedding_lr)
    return Muon(groups, dtype=getattr(model, "compute_dtype", torch.float32), process_group=process_group)


OPTIMIZERS: dict[type, Callable[..., torch.optim.Optimizer]] = {AdamWConfig: build_adamw, MuonConfig: build_muon}


def build_optimizer(
    model: nn.Module, config: AdamWConfig | MuonConfig, *, seed: int = 0, process_group: dist.ProcessGroup | None = None
) -> torch.optim.Optimizer:
    """Build the optimizer of ``config`` over all trained parameters of ``model``; ``seed`` is for stochastic rounding.

    The ranks of ``process_group`` hold the same model and gradients, whole or sharded, and may share an update's work.
    """
    return OPTIMIZERS[type(config)](model, config, seed, process_group)


def set_hyperparameters(
    optimizer: torch.optim.Optimizer, config: AdamWConfig | MuonConfig, lr_scale: float, tokens: int, total_tokens: int
) -> None:
    """Set what changes from step to step: learning rates, the weight decay of matrices, and Muon's momentum."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * lr_scale
        if group["name"] == "matrices":
            decay_scale = weight_decay_scale(config.weight_decay_schedule, lr_scale, tokens, total_tokens)
            group["weight_decay"] = config.weight_decay * decay_scale
            if isinstance(config, MuonConfig):
                group["momentum"] = momentum_at(config.momentum_warmup, config.momentum, tokens)
