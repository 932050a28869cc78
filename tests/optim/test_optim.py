"""Schedules at round numbers, parameters in groups, and what every optimizer promises about skipped steps and resume."""

from dataclasses import replace

import pytest
import torch

from osler.checkpoint.optimizer_state import flatten_optimizer, restore_optimizer
from osler.config.schema import decode
from osler.model.config import ModelConfig
from osler.model.transformer import Transformer
from osler.optim.bf16 import keep_in_bf16
from osler.optim.build import build_optimizer, group_of, set_hyperparameters
from osler.optim.config import AdamWConfig, MuonConfig
from osler.optim.schedule import (
    ConstantConfig,
    ConstantWeightDecay,
    CosineConfig,
    LinearConfig,
    LinearWeightDecay,
    LrWeightDecay,
    MomentumWarmup,
    RepeatsWeightDecay,
    ScheduleConfig,
    WarmupStableDecayConfig,
    WeightDecayConfig,
    lr_scale,
    momentum_at,
    weight_decay_scale,
)
from osler.rl.config import GrpoConfig
from osler.train.config import TrainConfig
from tests.models import tiny_model


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        (ConstantConfig(warmup_tokens=100), {0: 0.0, 50: 0.5, 100: 1.0, 1000: 1.0}),
        (LinearConfig(warmup_tokens=100), {50: 0.5, 100: 1.0, 550: 0.5, 1000: 0.0, 2000: 0.0}),
        (LinearConfig(final_fraction=0.2), {0: 1.0, 500: 0.6, 1000: 0.2}),
        (LinearConfig(warmup_tokens=None), {10: 0.25, 40: 1.0, 520: 0.5, 1000: 0.0}),
        (CosineConfig(warmup_tokens=200, final_fraction=0.1), {100: 0.5, 200: 1.0, 600: 0.55, 1000: 0.1}),
        (WarmupStableDecayConfig(warmup_tokens=100, decay_fraction=0.4), {100: 1.0, 600: 1.0, 800: 0.5, 1000: 0.0}),
        (WarmupStableDecayConfig(warmup_tokens=700, decay_fraction=1.0), {350: 0.5, 700: 1.0, 850: 0.5, 1000: 0.0}),
    ],
)
def test_schedules_at_round_numbers(schedule: ScheduleConfig, points: dict[int, float]) -> None:
    for tokens, expected in points.items():
        assert lr_scale(schedule, tokens, 1000) == pytest.approx(expected), tokens


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        (ConstantWeightDecay(), {0: 1.0, 500: 1.0, 1000: 1.0, 2000: 1.0}),
        (LinearWeightDecay(), {0: 1.0, 250: 0.75, 999: 0.001, 1000: 0.0, 2000: 0.0}),
        (LrWeightDecay(), {0: 0.3, 1000: 0.3}),
        (RepeatsWeightDecay(), {0: 0.25, 1000: 0.25}),
    ],
)
def test_weight_decay_schedules_at_round_numbers(schedule: WeightDecayConfig, points: dict[int, float]) -> None:
    for tokens, expected in points.items():
        assert weight_decay_scale(schedule, 0.3, tokens, 1000, 0.25) == pytest.approx(expected), tokens


def test_momentum_warmup_at_round_numbers() -> None:
    warmup = MomentumWarmup(start=0.85, tokens=100)
    for tokens, expected in {0: 0.85, 50: 0.90, 99: 0.949, 100: 0.95, 1000: 0.95}.items():
        assert momentum_at(warmup, 0.95, tokens) == pytest.approx(expected), tokens
    assert momentum_at(MomentumWarmup(), 0.9, 0) == 0.9


@pytest.mark.parametrize("kind", [AdamWConfig, MuonConfig])
def test_a_step_has_its_learning_rates_and_the_decay_and_momentum_of_matrices(kind: type[AdamWConfig] | type[MuonConfig]) -> None:
    other_lr = {"embedding_lr" if kind is AdamWConfig else "adamw_lr": 5e-3}
    config = kind(lr=1e-2, **other_lr, weight_decay=0.2, weight_decay_schedule=LinearWeightDecay())  # type: ignore[arg-type]
    model = Transformer(ModelConfig(norm_weight=True))
    optimizer = build_optimizer(model, config)
    groups = {str(group["name"]): group for group in optimizer.param_groups}
    assert sum(len(group["params"]) for group in groups.values()) == len(list(model.parameters()))
    for scale, tokens, decay in ((0.5, 0, 0.2), (1.0, 500, 0.1), (0.1, 1000, 0.0), (0.25, 250, 0.15)):
        set_hyperparameters(optimizer, config, scale, tokens, 1000, 0.0)
        vectors = 1e-2 if kind is AdamWConfig else 5e-3
        found = {name: (group["lr"], group["weight_decay"], group.get("momentum")) for name, group in groups.items()}
        assert found == {
            "matrices": (1e-2 * scale, pytest.approx(decay), 0.95 if kind is MuonConfig else None),
            "embeddings": (5e-3 * scale, 0.0, None),
            "vectors": (vectors * scale, 0.0, None),
        }


@pytest.mark.parametrize(("config", "names"), [
    (AdamWConfig(lr=2e-3, embedding_lr=1e-2, weight_decay=0.5, decay_embeddings=True), {"matrices", "embeddings"}),
    (MuonConfig(weight_decay=0.5, input_embedding_lr=0.1, decay_embeddings=True), {"matrices", "embeddings", "tables"}),
])  # fmt: skip
def test_embeddings_can_shrink_as_matrices_do(config: AdamWConfig | MuonConfig, names: set[str]) -> None:
    """Without gradients, every weight but those of norms is shorter by the same share after a step."""
    model = tiny_model(norm_weight=True, value_embeddings="all")
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    optimizer = build_optimizer(model, config)
    set_hyperparameters(optimizer, replace(config, weight_decay_schedule=LinearWeightDecay()), 1.0, 500, 1000, 0.0)
    optimizer.step()
    left = {
        str(group["name"]): {round(float(value), 6) for each in group["params"] for value in each.detach().unique()}
        for group in optimizer.param_groups
    }
    shorter = {round(1 - 0.5 * 0.5 * config.lr, 6)}
    assert left == {"vectors": {1.0}} | {name: shorter for name in names}


def test_a_recipe_without_a_type_means_adamw_and_a_type_replaces_it() -> None:
    assert decode(TrainConfig, {"optim": {"lr": 0.5}}).optim == AdamWConfig(lr=0.5)
    assert decode(TrainConfig, {"optim": {"type": "muon", "lr": 0.5}}).optim == MuonConfig(lr=0.5)
    grpo = {"init_from": "run"}
    assert decode(GrpoConfig, {**grpo, "optim": {"lr": 0.5}}).optim == AdamWConfig(lr=0.5, weight_decay=0.0)
    assert decode(GrpoConfig, {**grpo, "optim": {"type": "muon", "lr": 0.5}}).optim == MuonConfig(lr=0.5)


@pytest.mark.parametrize(("tied", "groups"), [
    (False, {"matrices": 0.02, "embeddings": 0.0025, "vectors": 0.0025, "tables": 0.05}),
    (True, {"matrices": 0.02, "vectors": 0.0025, "tables": 0.05}),
])  # fmt: skip
def test_the_input_embedding_may_have_a_rate_of_its_own(tied: bool, groups: dict[str, float]) -> None:
    shape = ModelConfig(norm_weight=True, tie_embeddings=tied, head_init="normal", value_embeddings="alternate", copy_head_dim=16)
    model, config = Transformer(shape), MuonConfig(input_embedding_lr=0.05)
    optimizer = build_optimizer(model, config)
    found = {str(group["name"]): group for group in optimizer.param_groups}
    assert {name: group["base_lr"] for name, group in found.items()} == groups
    tables = [layer.self_attn.value_embed for layer in model.layers[1::2]]  # type: ignore[union-attr]
    assert {*map(id, found["tables"]["params"])} == {id(table.weight) for table in (model.embed_tokens, *tables)}  # type: ignore[union-attr]
    assert sum(len(group["params"]) for group in found.values()) == len(list(model.parameters()))
    set_hyperparameters(optimizer, config, 0.5, 0, 1000, 0.0)
    assert found["tables"]["lr"] == 0.025
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.init_weights(0)
    before = model.embed_tokens.weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(model.embed_tokens.weight, before - 0.025)  # AdamW's first step has the size of the rate
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embed" not in name)  # as in the warm-up of a sparse model's index
    assert "tables" not in {group["name"] for group in build_optimizer(model, config).param_groups}


def test_groups_first_match_wins() -> None:
    for name in ("layers.3.input_layernorm", "layers.3.self_attn.q_norm", "norm"):
        assert group_of(f"{name}.weight") == "vectors"
    for name, group in {"embed_tokens": "tables", "layers.3.self_attn.value_embed": "tables", "lm_head": "embeddings"}.items():
        assert group_of(f"{name}.weight") == group
    assert group_of("embed_proj.weight") == "embeddings"
    assert group_of("layers.3.mlp.down_proj.weight") == "matrices"


OPTIMIZERS = {
    "adamw": AdamWConfig(),
    "bf16": AdamWConfig(),
    "muon": MuonConfig(momentum_warmup=MomentumWarmup(tokens=8), weight_decay_schedule=LrWeightDecay()),
}


def make(kind: str) -> tuple[Transformer, torch.optim.Optimizer]:
    model = tiny_model(norm_weight=True)
    if kind == "bf16":
        keep_in_bf16(model)
    return model, build_optimizer(model, OPTIMIZERS[kind], seed=3)


def advance(kind: str, model: Transformer, optimizer: torch.optim.Optimizer, *steps: int, bad: float | None = None) -> None:
    for step in steps:
        set_hyperparameters(optimizer, OPTIMIZERS[kind], 1 / (1 + step), step, 10, 0.0)
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if bad is not None:
                parameter.grad.view(-1)[0] = bad
        optimizer.found_inf = torch.tensor(float(bad is not None))  # type: ignore[attr-defined]
        optimizer.step()


def bits(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Copies of all parameters and state by name, as bytes, for which -0.0 is not 0.0."""
    state, _ = flatten_optimizer(optimizer, model.named_parameters())
    named = {**model.state_dict(), **state}
    return {name: value.detach().clone().reshape(-1).view(torch.uint8) for name, value in named.items()}


@pytest.mark.parametrize(("bad", "earlier_steps"), [(float("nan"), 0), (float("inf"), 0), (float("nan"), 2)])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_gradient_that_is_not_finite_changes_no_bit(kind: str, bad: float, earlier_steps: int) -> None:
    model, optimizer = make(kind)
    advance(kind, model, optimizer, *range(earlier_steps))
    with torch.no_grad():
        model.layers[0].self_attn.q_proj.weight[0, 0] = -0.0
    before = bits(model, optimizer)
    advance(kind, model, optimizer, 8, bad=bad)
    after = bits(model, optimizer)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert earlier_steps or not any(after[name].any() for name in after.keys() - before.keys())  # new state is zero
    advance(kind, model, optimizer, 0)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert [name for name, value in bits(model, optimizer).items() if torch.equal(value, after[name])] == []


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_five_more_steps_after_disk_are_equal_to_the_last_bit(kind: str) -> None:
    model, optimizer = make(kind)
    advance(kind, model, optimizer, *range(5))
    tensors, state = flatten_optimizer(optimizer, model.named_parameters())
    matrix = "momentum_buffer" if kind == "muon" else "exp_avg"
    assert f"layers.0.self_attn.q_proj.weight/{matrix}" in tensors and "norm.weight/exp_avg_sq" in tensors
    resumed, again = make(kind)
    resumed.load_state_dict(model.state_dict())
    restore_optimizer(again, resumed.named_parameters(), {name: value.clone() for name, value in tensors.items()}, state)
    advance(kind, model, optimizer, *range(5, 10))
    advance(kind, resumed, again, *range(5, 10))
    expected, found = bits(model, optimizer), bits(resumed, again)
    assert expected.keys() == found.keys() and all(torch.equal(found[name], value) for name, value in expected.items())
