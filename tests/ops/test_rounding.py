"""Stochastic rounding to bf16: right on average, exact where bf16 is, the same as its definition."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from osler.ops.rounding import random_bits, round_stochastic, round_stochastic_reference
from osler.ops.sampling import mix_int


def key(number: int) -> torch.Tensor:
    return torch.tensor(mix_int(number))


def test_the_mean_of_many_roundings_is_the_number():
    draws = 1 << 16
    for number in (1.001, -1.003, 3.14159, 1e-20, -2.5e30, 1e-39):
        x = torch.tensor(number)
        rounded = round_stochastic(x.expand(draws).contiguous(), random_bits(key(1), 0, draws)[0]).double()
        neighbours = rounded.unique()
        assert len(neighbours) == 2 and neighbours[0] < x < neighbours[1]
        gap = float(neighbours[1] - neighbours[0])
        assert abs(float(rounded.mean() - x.double())) < 4 * 0.5 * gap / draws**0.5  # four standard errors at most


def test_over_all_bits_the_mean_is_exact():
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    bits = torch.arange(1 << 16)
    for value in x:
        mean = round_stochastic(value.expand(1 << 16).contiguous(), bits).double().mean()
        assert mean == value.double()


def test_what_bf16_can_hold_stays():
    words = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    words = words[~words.isnan()]
    for bits in (0, 1, 12345, (1 << 16) - 1):
        rounded = round_stochastic(words.float(), torch.full(words.shape, bits))
        assert torch.equal(rounded.view(torch.int16), words.view(torch.int16))


@given(st.floats(width=32, min_value=-(2.0**127), max_value=2.0**127), st.integers(0, 65535))
def test_equals_the_definition(number, bits):
    x, drawn = torch.tensor([number]), torch.tensor([bits])
    assert torch.equal(round_stochastic(x, drawn), round_stochastic_reference(x, drawn))


def test_bits_are_uniform_independent_and_a_function_of_key_and_position():
    count = 1 << 18
    drawn = torch.stack(random_bits(key(7), 0, count))
    assert drawn.min() >= 0 and drawn.max() < 1 << 16
    centred = drawn.double() / 2**16 - 0.5
    error = (1 / 12) ** 0.5 / count**0.5
    assert centred.mean(1).abs().max() < 5 * error
    others = torch.stack(random_bits(key(8), 0, count)).double() / 2**16 - 0.5
    together = torch.corrcoef(torch.cat([centred, others, centred.roll(1, 1)]))
    assert (together - torch.eye(9)).abs().max() < 5 / count**0.5
    later = torch.stack(random_bits(key(7), 1000, 50))
    assert torch.equal(later, drawn[:, 1000:1050])
