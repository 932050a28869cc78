"""What an optimizer and the schedules of its learning rate, weight decay and momentum are made of. Torch-free."""

from __future__ import annotations

from typing import Annotated, Literal

from osler.config.schema import (
    TAGGED,
    Fraction,
    Ge,
    Gt,
    Le,
    Lt,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    config,
)

Momentum = Annotated[float, Ge(0), Lt(1)]


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
    lr: PositiveFloat = 2.5e-3  # peak learning rate of matrices and vectors
    embedding_lr: PositiveFloat | None = None  # of embeddings and head; null: lr
    beta1: Momentum = 0.9  # decay of the mean of gradients, per step
    beta2: Momentum = 0.95  # decay of the mean of their squares, per step
    eps: PositiveFloat = 1e-8  # added to the root of the mean square
    weight_decay: NonNegativeFloat = 0.1  # of matrices only; times the learning rate, per step
    weight_decay_schedule: WeightDecayConfig = ConstantWeightDecay()  # how it changes over the run


@config
class MomentumWarmup:
    """Momentum on a straight line from ``start`` to its full value over the first ``tokens``; 0: full from the start."""

    start: Momentum = 0.85  # momentum at the first token
    tokens: NonNegativeInt = 0  # tokens over which it rises


@config
class MuonConfig:
    """Muon (see ``optim/muon.py``) for matrices; embeddings, head and vectors have AdamW, undecayed.

    A step changes a matrix by about ``lr`` in spectral norm. The learning rates of both follow the run's schedule.
    """

    type: Literal["muon"] = "muon"
    lr: PositiveFloat = 0.02  # peak learning rate of matrices
    momentum: Momentum = 0.95  # decay of the mean of gradients, per step
    momentum_warmup: MomentumWarmup = MomentumWarmup()
    newton_schulz_steps: PositiveInt = 5  # of the iteration that makes singular values equal
    weight_decay: NonNegativeFloat = 0.01  # of matrices only; times the learning rate, per step
    weight_decay_schedule: WeightDecayConfig = ConstantWeightDecay()  # how it changes over the run
    adamw_lr: PositiveFloat = 2.5e-3  # peak learning rate of embeddings, head and vectors
    beta1: Momentum = 0.9  # AdamW's decay of the mean of gradients, per step
    beta2: Momentum = 0.95  # AdamW's decay of the mean of their squares, per step
    eps: PositiveFloat = 1e-8  # added to the root of the mean square in AdamW


OptimConfig = Annotated[AdamWConfig | MuonConfig, TAGGED]


@config
class ConstantConfig:
    """Warm-up, then a constant learning rate."""

    type: Literal["constant"] = "constant"
    warmup_tokens: NonNegativeInt = 0  # tokens over which the learning rate rises from 0


@config
class CosineConfig:
    """Warm-up, then half a cosine down to ``final_fraction`` of the learning rate."""

    type: Literal["cosine"] = "cosine"
    warmup_tokens: NonNegativeInt = 0  # tokens over which the learning rate rises from 0
    final_fraction: Fraction = 0.1  # of the peak learning rate, reached at the end


@config
class LinearConfig:
    """Warm-up, then a straight line down to ``final_fraction`` of the learning rate."""

    type: Literal["linear"] = "linear"
    warmup_tokens: NonNegativeInt = 0  # tokens over which the learning rate rises from 0
    final_fraction: Fraction = 0.0  # of the peak learning rate, reached at the end


@config
class WarmupStableDecayConfig:
    """Warm-up, a plateau, then a straight line down over the last ``decay_fraction`` of the tokens (arXiv 2404.06395)."""

    type: Literal["warmup_stable_decay"] = "warmup_stable_decay"
    warmup_tokens: NonNegativeInt = 0  # tokens over which the learning rate rises from 0
    decay_fraction: Annotated[float, Gt(0), Le(1)] = 0.3  # share of all tokens over which the rate falls
    final_fraction: Fraction = 0.0  # of the peak learning rate, reached at the end


ScheduleConfig = Annotated[ConstantConfig | CosineConfig | LinearConfig | WarmupStableDecayConfig, TAGGED]
