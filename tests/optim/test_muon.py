"""Muon against a slow reference in float64, stack by stack; and the AdamW inside of it."""

import math

import pytest
import torch

from osler.optim.build import build_optimizer
from osler.optim.config import AdamWConfig, MuonConfig
from osler.optim.muon import Muon, equal_shapes, orthogonalize
from tests.models import tiny_model

pytestmark = pytest.mark.usefixtures("no_compiled_code")

SHAPES = [(24, 40), (40, 24), (24, 40), (16, 16), (24, 40), (40, 24), (1, 8)]


def reference_orthogonalize(matrix, steps=5):
    """One matrix in float64, word for word: x ← a x + (b A + c A²) x with A = x xᵀ, tall matrices on their side."""
    x = matrix.double()
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / max(float(x.norm()), 1e-7)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def make(shapes=SHAPES, seed=0, dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(seed)
    matrices = [torch.nn.Parameter(torch.randn(shape, generator=generator) / 4) for shape in shapes]
    group = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "newton_schulz_steps": 5, **options}
    return matrices, Muon([{"params": matrices, "name": "matrices", **group}], dtype=dtype)


def give_gradients(parameters, seed):
    generator = torch.Generator().manual_seed(1000 + seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("shape", sorted(set(SHAPES)))
def test_newton_schulz_is_the_reference_for_every_matrix_of_a_stack(shape):
    stack = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    expected = torch.stack([reference_orthogonalize(matrix) for matrix in stack])
    torch.testing.assert_close(orthogonalize(stack, 5, torch.float32).double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(orthogonalize(stack, 5, torch.bfloat16).double(), expected, rtol=0.05, atol=0.02)


def test_zero_stays_zero_and_no_step_is_only_a_normalisation():
    assert orthogonalize(torch.zeros(2, 4, 3), 5, torch.float32).abs().max() == 0
    assert torch.linalg.matrix_norm(orthogonalize(torch.ones(1, 4, 3), 0, torch.float32)) == pytest.approx(1.0)


def test_every_step_is_the_rule():
    matrices, optimizer = make()
    weights = [matrix.detach().double() for matrix in matrices]
    momenta = [torch.zeros_like(weight) for weight in weights]
    for step in range(4):
        group = optimizer.param_groups[0]
        group["lr"], group["momentum"], group["weight_decay"] = 0.02 / (1 + step), 0.85 + 0.02 * step, 0.1 * step
        give_gradients(matrices, step)
        optimizer.step()
        for index, matrix in enumerate(matrices):
            gradient, mu = matrix.grad.double(), group["momentum"]
            momenta[index] = mu * momenta[index] + (1 - mu) * gradient
            direction = reference_orthogonalize((1 - mu) * gradient + mu * momenta[index])
            weights[index] *= 1 - group["lr"] * group["weight_decay"]
            weights[index] -= group["lr"] * math.sqrt(max(1, matrix.shape[0] / matrix.shape[1])) * direction
            torch.testing.assert_close(matrix.detach().double(), weights[index], rtol=1e-5, atol=1e-6)
            momentum = optimizer.state[matrix]["momentum_buffer"]
            torch.testing.assert_close(momentum.double(), momenta[index], rtol=1e-5, atol=1e-6)


def test_stacks_are_bounded_and_cut_where_ranks_share_evenly(monkeypatch):
    monkeypatch.setattr("osler.optim.muon.STACK_ELEMENTS", 5 * 12)
    matrices = [torch.zeros(3, 4) for _ in range(11)] + [torch.zeros(4, 3)] * 2 + [torch.zeros(100, 100)] * 3
    assert [len(stack) for stack in equal_shapes(matrices, 1)] == [5, 5, 1, 2, 1, 1, 1]
    assert [len(stack) for stack in equal_shapes(matrices, 2)] == [4, 4, 3, 2, 2, 1]


def test_matrices_have_muon_and_the_rest_is_adamw_to_the_bit():
    config = MuonConfig(lr=0.05, adamw_lr=1e-3, weight_decay=0.2)
    model, twin = (tiny_model(norm_weight=True) for _ in range(2))
    optimizer = build_optimizer(model, config)
    reference = build_optimizer(twin, AdamWConfig(lr=1e-3))
    assert isinstance(optimizer, Muon) and optimizer.dtype == torch.float32
    assert build_optimizer(tiny_model(compute_dtype=torch.bfloat16), config).dtype == torch.bfloat16
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {group["name"]: group for group in optimizer.param_groups}
    rates = {name: (group["base_lr"], group["weight_decay"]) for name, group in groups.items()}
    assert rates == {"matrices": (0.05, 0.2), "embeddings": (1e-3, 0.0), "vectors": (1e-3, 0.0)}
    assert sum(len(group["params"]) for group in groups.values()) == len(names)
    assert all(parameter.dim() == 2 and "layers." in names[parameter] for parameter in groups["matrices"]["params"])
    for step in range(3):
        for each, built in ((model, optimizer), (twin, reference)):
            give_gradients(each.parameters(), step)
            built.step()
    moved = {names[parameter]: parameter for group in ("embeddings", "vectors") for parameter in groups[group]["params"]}
    assert len(moved) > 4 and all(torch.equal(parameter, twin.get_parameter(name)) for name, parameter in moved.items())


def test_vectors_are_refused_among_the_matrices():
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        make([(3,)])
