"""One policy update: how rows are cut into micro-batches, and which rows move the policy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from osler.optim.build import build_optimizer
from osler.optim.config import AdamWConfig
from osler.rl.config import AlgorithmConfig
from osler.rl.step import Row, micro_batches, update_policy


def row(prompt, completion, *, advantage=1.0, trained=True):
    return Row(list(range(4, 4 + prompt)), list(range(5, 5 + completion)), [-5.0] * completion, advantage, None, trained)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=20),
    budget=st.integers(1, 200),
)
def test_micro_batches_hold_every_row_once_within_the_budget(sizes, budget):
    rows = [row(*size) for size in sizes]
    batches = micro_batches(rows, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(rows)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(rows[index].tokens for index in batch) <= budget


def moved(make_policy, rows, algorithm, **options):
    """How far an update moves the policy, and its metrics."""
    model = make_policy()
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    optimizer = build_optimizer(model, AdamWConfig(lr=1e-3, weight_decay=0.0))
    metrics = update_policy(model, optimizer, rows, algorithm, **options)
    return (torch.nn.utils.parameters_to_vector(model.parameters()) - before).abs().max().item(), metrics


def test_rows_that_are_not_trained_do_not_move_the_policy(make_policy):
    algorithm = AlgorithmConfig(beta=0.1, max_new_tokens=8)
    reference = make_policy().requires_grad_(False)
    with torch.no_grad():
        reference.lm_head.weight.mul_(1.5)
    distance, metrics = moved(make_policy, [row(3, 4, trained=False)] * 2, algorithm, reference=reference)
    assert distance == 0.0
    assert metrics["kl"] > 0.0
    assert moved(make_policy, [row(3, 4)] * 2, algorithm, reference=reference)[0] > 0.0


def test_the_reference_is_only_read(make_policy):
    reference = make_policy().requires_grad_(False)
    before = {name: value.clone() for name, value in reference.state_dict().items()}
    moved(make_policy, [row(3, 4), row(2, 2, advantage=-1.0)], AlgorithmConfig(beta=0.1), reference=reference)
    assert all(torch.equal(value, before[name]) for name, value in reference.state_dict().items())
    assert all(parameter.grad is None for parameter in reference.parameters())


def test_what_is_missing_is_named(make_policy):
    with pytest.raises(ValueError, match="reference"):
        moved(make_policy, [row(3, 4)], AlgorithmConfig(beta=0.1))
    with pytest.raises(ValueError, match="at least one row"):
        moved(make_policy, [], AlgorithmConfig(beta=0.0))
