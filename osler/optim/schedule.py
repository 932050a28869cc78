"""Schedules of learning rate, weight decay and momentum: their settings, and what they are at a token. Torch-free."""

import math
from typing import Annotated, Literal

from osler.config.schema import TAGGED, Fraction, Ge, Gt, Le, Lt, NonNegativeInt, config

Momentum = Annotated[float, Ge(0), Lt(1)]


@config
class ConstantConfig:
    """Warm-up, then a constant learning rate."""

    type: Literal["constant"] = "constant"
    warmup_tokens: NonNegativeInt | None = 0  # tokens over which the learning rate rises from 0; null: a 25th of all


@config
class CosineConfig:
    """Warm-up, then half a cosine down to ``final_fraction`` of the learning rate."""

    type: Literal["cosine"] = "cosine"
    warmup_tokens: NonNegativeInt | None = 0  # tokens over which the learning rate rises from 0; null: a 25th of all
    final_fraction: Fraction = 0.1  # share of the peak learning rate at the end


@config
class LinearConfig:
    """Warm-up, then a straight line down to ``final_fraction`` of the learning rate."""

    type: Literal["linear"] = "linear"
    warmup_tokens: NonNegativeInt | None = 0  # tokens over which the learning rate rises from 0; null: a 25th of all
    final_fraction: Fraction = 0.0  # share of the peak learning rate at the end


@config
class WarmupStableDecayConfig:
    """Warm-up, a plateau, then a straight line down over the last ``decay_fraction`` of the tokens (arXiv 2404.06395)."""

    type: Literal["warmup_stable_decay"] = "warmup_stable_decay"
    warmup_tokens: NonNegativeInt | None = 0  # tokens over which the learning rate rises from 0; null: a 25th of all
    decay_fraction: Annotated[float, Gt(0), Le(1)] = 0.3  # share of all tokens over which the rate falls
    final_fraction: Fraction = 0.0  # share of the peak learning rate at the end


ScheduleConfig = Annotated[ConstantConfig | CosineConfig | LinearConfig | WarmupStableDecayConfig, TAGGED]


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
    """Decay in proportion to the learning rate, by which a step multiplies the decay once more."""

    type: Literal["follow_lr"] = "follow_lr"


@config
class RepeatsWeightDecay:
    """No decay in the first epoch of the run, and the full decay later, which keeps a model from learning text by heart.

    Where only some sources of data are in a later epoch, the decay is multiplied by their share of the tokens. Text that the run
    of ``init_from`` has read counts as new.
    """

    type: Literal["repeats"] = "repeats"


WeightDecayConfig = Annotated[ConstantWeightDecay | LinearWeightDecay | LrWeightDecay | RepeatsWeightDecay, TAGGED]


@config
class MomentumWarmup:
    """Momentum on a straight line from ``start`` to its full value over the first ``tokens``; 0: full from the start."""

    start: Momentum = 0.85  # momentum at the first token
    tokens: NonNegativeInt = 0  # tokens over which it rises


def warmup_of(schedule: ScheduleConfig, total_tokens: int) -> int:
    """Return the tokens over which the learning rate rises in a run of ``total_tokens``."""
    return total_tokens // 25 if schedule.warmup_tokens is None else schedule.warmup_tokens


def lr_scale(schedule: ScheduleConfig, tokens: int, total_tokens: int) -> float:
    """Return the factor in [0, 1] on every learning rate after ``tokens``; trainers ask for the middle of a step."""
    warmup_tokens = warmup_of(schedule, total_tokens)
    if tokens < warmup_tokens:
        return tokens / warmup_tokens
    if isinstance(schedule, ConstantConfig):
        return 1.0
    if isinstance(schedule, WarmupStableDecayConfig):
        decay_start = total_tokens * (1 - schedule.decay_fraction)
        done = _progress(tokens, max(decay_start, warmup_tokens), total_tokens)
    else:
        done = _progress(tokens, warmup_tokens, total_tokens)
    shape = 0.5 * (1 + math.cos(math.pi * done)) if isinstance(schedule, CosineConfig) else 1 - done
    return schedule.final_fraction + (1 - schedule.final_fraction) * shape


def weight_decay_scale(
    schedule: WeightDecayConfig, lr_scale: float, tokens: int, total_tokens: int, repeated_share: float
) -> float:
    """Return the factor in [0, 1] on the weight decay after ``tokens``.

    ``lr_scale`` is the factor on the learning rate, and ``repeated_share`` what ``Loader.repeated_share`` says of the step.
    """
    if isinstance(schedule, ConstantWeightDecay):
        return 1.0
    if isinstance(schedule, RepeatsWeightDecay):
        return repeated_share
    return lr_scale if isinstance(schedule, LrWeightDecay) else 1 - _progress(tokens, 0, total_tokens)


def momentum_at(warmup: MomentumWarmup, momentum: float, tokens: int) -> float:
    """Return Muon's momentum after ``tokens``, where its full value is ``momentum``."""
    if tokens >= warmup.tokens:
        return momentum
    return warmup.start + (momentum - warmup.start) * tokens / warmup.tokens


def _progress(tokens: int, start: float, end: int) -> float:
    return min(1.0, max(0.0, (tokens - start) / max(1.0, end - start)))
