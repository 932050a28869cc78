"""Schedules of learning rate, weight decay and momentum: pure functions of tokens seen. Torch-free; nothing to resume."""

from __future__ import annotations

import math

from osler.optim.config import (
    ConstantConfig,
    ConstantWeightDecay,
    CosineConfig,
    LinearConfig,
    LinearWeightDecay,
    LrWeightDecay,
    MuonConfig,
    WarmupStableDecayConfig,
)

Schedule = ConstantConfig | CosineConfig | LinearConfig | WarmupStableDecayConfig
WeightDecaySchedule = ConstantWeightDecay | LinearWeightDecay | LrWeightDecay


def lr_scale(schedule: Schedule, tokens: int, total_tokens: int) -> float:
    """Return the factor in [0, 1] on every learning rate after ``tokens``; trainers ask for the middle of a step."""
    if tokens < schedule.warmup_tokens:
        return tokens / schedule.warmup_tokens
    if isinstance(schedule, ConstantConfig):
        return 1.0
    if isinstance(schedule, WarmupStableDecayConfig):
        decay_start = total_tokens * (1 - schedule.decay_fraction)
        done = _progress(tokens, max(decay_start, schedule.warmup_tokens), total_tokens)
    else:
        done = _progress(tokens, schedule.warmup_tokens, total_tokens)
    shape = 0.5 * (1 + math.cos(math.pi * done)) if isinstance(schedule, CosineConfig) else 1 - done
    return schedule.final_fraction + (1 - schedule.final_fraction) * shape


def weight_decay_scale(schedule: WeightDecaySchedule, lr_scale: float, tokens: int, total_tokens: int) -> float:
    """Return the factor in [0, 1] on the weight decay after ``tokens``, where the factor on the learning rate is ``lr_scale``."""
    if isinstance(schedule, ConstantWeightDecay):
        return 1.0
    return lr_scale if isinstance(schedule, LrWeightDecay) else 1 - _progress(tokens, 0, total_tokens)


def momentum_at(config: MuonConfig, tokens: int) -> float:
    """Return Muon's momentum after ``tokens``."""
    warmup = config.momentum_warmup
    if tokens >= warmup.tokens:
        return config.momentum
    return warmup.start + (config.momentum - warmup.start) * tokens / warmup.tokens


def _progress(tokens: int, start: float, end: int) -> float:
    return min(1.0, max(0.0, (tokens - start) / max(1.0, end - start)))
