"""What an optimizer and a learning-rate schedule are made of. Torch-free."""

from __future__ import annotations

from typing import Annotated, Literal

from osler.config import TAGGED, config


@config
class AdamWConfig:
    """AdamW (arXiv 1711.05101) in three groups: matrices decayed, embeddings and head, vectors undecayed."""

    type: Literal["adamw"] = "adamw"
    lr: float = 2.5e-3  # peak learning rate of matrices and vectors
    embedding_lr: float | None = None  # of embeddings and head; null: lr
    beta1: float = 0.9  # decay of the mean of gradients, per step
    beta2: float = 0.95  # decay of the mean of their squares, per step
    eps: float = 1e-8  # added to the root of the mean square
    weight_decay: float = 0.1  # of matrices only; times the learning rate, per step

    def __post_init__(self) -> None:
        if self.lr <= 0 or (self.embedding_lr is not None and self.embedding_lr <= 0):
            raise ValueError(f"learning rates must be above 0, not lr={self.lr}, embedding_lr={self.embedding_lr}")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"beta1 {self.beta1} and beta2 {self.beta2} must lie in [0, 1)")


@config
class ConstantConfig:
    """Warm-up, then a constant learning rate."""

    type: Literal["constant"] = "constant"
    warmup_tokens: int = 0  # tokens over which the learning rate rises from 0


@config
class CosineConfig:
    """Warm-up, then half a cosine down to ``final_fraction`` of the learning rate."""

    type: Literal["cosine"] = "cosine"
    warmup_tokens: int = 0  # tokens over which the learning rate rises from 0
    final_fraction: float = 0.1  # of the peak learning rate, reached at the end


@config
class LinearConfig:
    """Warm-up, then a straight line down to ``final_fraction`` of the learning rate."""

    type: Literal["linear"] = "linear"
    warmup_tokens: int = 0  # tokens over which the learning rate rises from 0
    final_fraction: float = 0.0  # of the peak learning rate, reached at the end


@config
class WarmupStableDecayConfig:
    """Warm-up, a plateau, then a straight line down over the last ``decay_fraction`` of the tokens (arXiv 2404.06395)."""

    type: Literal["warmup_stable_decay"] = "warmup_stable_decay"
    warmup_tokens: int = 0  # tokens over which the learning rate rises from 0
    decay_fraction: float = 0.3  # share of all tokens over which the rate falls
    final_fraction: float = 0.0  # of the peak learning rate, reached at the end

    def __post_init__(self) -> None:
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction {self.decay_fraction} must lie in (0, 1]")


ScheduleConfig = Annotated[ConstantConfig | CosineConfig | LinearConfig | WarmupStableDecayConfig, TAGGED]
