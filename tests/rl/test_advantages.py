"""Advantages: hand-computed groups, and the properties that hold for every group."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from osler.rl.loss import effective_groups, group_advantages

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 3.0, 1.0]], dtype=torch.float64)


def test_mean_subtracts_the_group_mean():
    expected = torch.tensor([[0.5, -0.5, -0.5, 0.5], [-1.0, -1.0, 2.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(REWARDS, "mean"), expected)


def test_mean_std_divides_by_the_deviation():
    std = REWARDS.std(dim=1, keepdim=True)
    expected = (REWARDS - REWARDS.mean(dim=1, keepdim=True)) / (std + 1e-4)
    torch.testing.assert_close(group_advantages(REWARDS, "mean_std"), expected)


def test_leave_one_out_uses_the_others():
    advantages = group_advantages(REWARDS, "leave_one_out")
    for p in range(2):
        for g in range(4):
            others = [REWARDS[p, j].item() for j in range(4) if j != g]
            assert advantages[p, g].item() == pytest.approx(REWARDS[p, g].item() - sum(others) / 3)


@pytest.mark.parametrize("kind", ["mean", "mean_std", "leave_one_out"])
def test_equal_rewards_give_exact_zeros(kind):
    rewards = torch.full((2, 3), 0.1, dtype=torch.float32)  # three times 0.1 over three is not 0.1 in every rounding
    assert group_advantages(rewards, kind).abs().max() == 0


@pytest.mark.parametrize("kind", ["mean", "mean_std", "leave_one_out"])
def test_dropped_samples_leave_the_group(kind):
    rewards = torch.tensor([[1.0, 0.0, 9.0, 0.0]], dtype=torch.float64)
    valid = torch.tensor([[True, True, False, True]])
    advantages = group_advantages(rewards, kind, valid_PG=valid)
    without = group_advantages(rewards[:, [0, 1, 3]], kind)
    torch.testing.assert_close(advantages[:, [0, 1, 3]], without)
    assert advantages[0, 2] == 0


@pytest.mark.parametrize("kind", ["mean", "mean_std", "leave_one_out"])
@pytest.mark.parametrize("kept", [0, 1])
def test_groups_with_one_sample_or_none_are_silent(kind, kept):
    valid = torch.arange(3)[None] < kept
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.5]]), kind, valid_PG=valid)
    assert advantages.abs().max() == 0
    assert not effective_groups(torch.tensor([[1.0, 0.0, 0.5]]), valid_PG=valid)[0]


@pytest.mark.parametrize("kind", ["mean", "mean_std", "leave_one_out"])
@given(rewards=st.lists(st.floats(-5, 5), min_size=2, max_size=8), shift=st.floats(-3, 3))
def test_advantages_sum_to_zero_and_ignore_a_shift(kind, rewards, shift):
    group = torch.tensor([rewards], dtype=torch.float64)
    advantages = group_advantages(group, kind)
    assert advantages.sum().abs() < 1e-6
    if effective_groups(group)[0] and group.amax() - group.amin() > 1e-3:
        torch.testing.assert_close(group_advantages(group + shift, kind), advantages, atol=1e-6, rtol=0)


def test_effective_groups():
    assert effective_groups(torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])).tolist() == [False, True, False]
