"""What an optimizer and the schedules of its learning rate, weight decay and momentum are made of. Torch-free."""

from __future__ import annotations

from typing import Annotated, Literal

from osler.config import TAGGED, config


@config
class ConstantWeightDecay:
    """The same decay from first to last."""

    type: Literal["constant"] = "constant"


@config
class LinearWeightDecay:
    """A straight line from the full decay to none at the last token."""

    type: Literal["linear"] = "linear"


@config
class LrWeightDecay:
    """Decay in proportion to the learning rate, by which a step multiplies it once more."""

    type: Literal["follow_lr"] = "follow_lr"


WeightDecayConfig = Annotated[ConstantWeightDecay | LinearWeightDecay | LrWeightDecay, TAGGED]


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
    weight_decay_schedule: WeightDecayConfig = ConstantWeightDecay()  # how it changes over the run

    def __post_init__(self) -> None:
        if not all(lr > 0 for lr in (self.lr, self.embedding_lr) if lr is not None):
            raise ValueError(f"learning rates must be above 0, not lr={self.lr}, embedding_lr={self.embedding_lr}")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"beta1 {self.beta1} and beta2 {self.beta2} must lie in [0, 1)")
        check_decay_and_eps(self.weight_decay, self.eps)


@config
class MomentumWarmup:
    """Momentum on a straight line from ``start`` to its full value over the first ``tokens``; 0: full from the start."""

    start: float = 0.85  # momentum at the first token
    tokens: int = 0  # tokens over which it rises

    def __post_init__(self) -> None:
        if not 0 <= self.start < 1 or self.tokens < 0:
            raise ValueError(f"momentum_warmup: start {self.start} must lie in [0, 1) and tokens {self.tokens} be 0 or more")


@config
class MuonConfig:
    """Muon (see ``optim/muon.py``) for matrices; embeddings, head and vectors have AdamW, undecayed.

    A step changes a matrix by about ``lr`` in spectral norm. The learning rates of both follow the run's schedule.
    """

    type: Literal["muon"] = "muon"
    lr: float = 0.02  # peak learning rate of matrices
    momentum: float = 0.95  # decay of the mean of gradients, per step
    momentum_warmup: MomentumWarmup = MomentumWarmup()
    newton_schulz_steps: int = 5  # of the iteration that makes singular values equal
    weight_decay: float = 0.01  # of matrices only; times the learning rate, per step
    weight_decay_schedule: WeightDecayConfig = ConstantWeightDecay()  # how it changes over the run
    adamw_lr: float = 2.5e-3  # peak learning rate of embeddings, head and vectors
    beta1: float = 0.9  # AdamW's decay of the mean of gradients, per step
    beta2: float = 0.95  # AdamW's decay of the mean of their squares, per step
    eps: float = 1e-8  # added to the root of the mean square in AdamW

    def __post_init__(self) -> None:
        if not (self.lr > 0 and self.adamw_lr > 0):
            raise ValueError(f"learning rates must be above 0, not lr={self.lr}, adamw_lr={self.adamw_lr}")
        if not all(0 <= value < 1 for value in (self.momentum, self.beta1, self.beta2)):
            raise ValueError(f"momentum {self.momentum}, beta1 {self.beta1} and beta2 {self.beta2} must lie in [0, 1)")
        if self.newton_schulz_steps < 1:
            raise ValueError(f"newton_schulz_steps is {self.newton_schulz_steps}; it must be at least 1")
        check_decay_and_eps(self.weight_decay, self.eps)


def check_decay_and_eps(weight_decay: float, eps: float) -> None:
    """Raise ValueError for a decay that would make weights grow, and for what cannot be divided by."""
    if not (weight_decay >= 0 and eps > 0):
        raise ValueError(f"weight_decay {weight_decay} must be 0 or more and eps {eps} above 0")


OptimConfig = Annotated[AdamWConfig | MuonConfig, TAGGED]


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

    def __post_init__(self) -> None:
        check_fraction(self.final_fraction)


@config
class LinearConfig:
    """Warm-up, then a straight line down to ``final_fraction`` of the learning rate."""

    type: Literal["linear"] = "linear"
    warmup_tokens: int = 0  # tokens over which the learning rate rises from 0
    final_fraction: float = 0.0  # of the peak learning rate, reached at the end

    def __post_init__(self) -> None:
        check_fraction(self.final_fraction)


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
        check_fraction(self.final_fraction)


def check_fraction(final_fraction: float) -> None:
    """Raise ValueError unless a schedule ends between nothing and the peak."""
    if not 0 <= final_fraction <= 1:
        raise ValueError(f"final_fraction {final_fraction} must lie in [0, 1]")


ScheduleConfig = Annotated[ConstantConfig | CosineConfig | LinearConfig | WarmupStableDecayConfig, TAGGED]
