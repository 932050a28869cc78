"""Schedules at their edges with round numbers, and which parameter goes into which group."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osler.model.config import ModelConfig
from osler.model.transformer import Transformer
from osler.optim.build import build_optimizer, group_of, set_lr
from osler.optim.config import AdamWConfig, ConstantConfig, CosineConfig, LinearConfig, WarmupStableDecayConfig
from osler.optim.schedule import Schedule, lr_scale


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        (ConstantConfig(warmup_tokens=100), {0: 0.0, 50: 0.5, 100: 1.0, 1000: 1.0}),
        (LinearConfig(warmup_tokens=100), {50: 0.5, 100: 1.0, 550: 0.5, 1000: 0.0, 2000: 0.0}),
        (LinearConfig(final_fraction=0.2), {0: 1.0, 500: 0.6, 1000: 0.2}),
        (CosineConfig(warmup_tokens=200, final_fraction=0.1), {100: 0.5, 200: 1.0, 600: 0.55, 1000: 0.1}),
        (WarmupStableDecayConfig(warmup_tokens=100, decay_fraction=0.4), {100: 1.0, 600: 1.0, 800: 0.5, 1000: 0.0}),
        (WarmupStableDecayConfig(warmup_tokens=700, decay_fraction=1.0), {350: 0.5, 700: 1.0, 850: 0.5, 1000: 0.0}),
    ],
)
def test_schedules_at_round_numbers(schedule: Schedule, points: dict[int, float]) -> None:
    for tokens, expected in points.items():
        assert lr_scale(schedule, tokens, 1000) == pytest.approx(expected), tokens


@given(
    st.integers(0, 3000),
    st.integers(0, 1500),
    st.sampled_from([ConstantConfig, CosineConfig, LinearConfig, WarmupStableDecayConfig]),
)
def test_scale_is_never_outside_zero_and_one(tokens: int, warmup: int, kind: type) -> None:
    assert 0.0 <= lr_scale(kind(warmup_tokens=warmup), tokens, 1000) <= 1.0


def test_groups_first_match_wins() -> None:
    assert group_of("layers.3.input_layernorm.weight") == "vectors"
    assert group_of("layers.3.self_attn.q_norm.weight") == "vectors"
    assert group_of("norm.weight") == "vectors"
    assert (
        group_of("embed_tokens.weight") == group_of("lm_head.weight") == group_of("embed_proj.weight") == "embeddings"
    )
    assert group_of("layers.3.mlp.down_proj.weight") == "matrices"


def test_every_parameter_is_in_one_group_and_only_matrices_decay() -> None:
    model = Transformer(ModelConfig(norm_weight=True))
    optimizer = build_optimizer(model, AdamWConfig(lr=1e-3, embedding_lr=5e-3, weight_decay=0.1))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    by_name = {group["name"]: group for group in optimizer.param_groups}
    assert {name: group["weight_decay"] for name, group in by_name.items()} == {
        "matrices": 0.1,
        "embeddings": 0.0,
        "vectors": 0.0,
    }
    set_lr(optimizer, 0.5)
    assert {name: group["lr"] for name, group in by_name.items()} == {
        "matrices": 5e-4,
        "embeddings": 2.5e-3,
        "vectors": 5e-4,
    }


@pytest.mark.parametrize("changes", [{"lr": 0.0}, {"embedding_lr": -1.0}, {"beta2": 1.0}])
def test_impossible_numbers_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        AdamWConfig(**changes)
