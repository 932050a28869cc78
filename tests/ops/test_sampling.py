"""Drawing tokens: the random numbers, the distribution, and what top-k and top-p leave to draw from."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osler.ops.sampling import RowSampling, pack_mask, row_uniform, sample, sampling_mask, unpack_mask
from osler.ops.sampling_params import COLDEST, SamplingParams


def assert_distributed(counts: torch.Tensor, expected: torch.Tensor | float) -> None:
    """Chi-square stays below a value that it passes about once in 30,000 (normal approximation)."""
    degrees = len(counts) - 1
    assert float(((counts - expected) ** 2 / expected).sum()) < degrees + 4 * math.sqrt(2 * degrees)


def shared(logits: torch.Tensor, **parameters: Any) -> RowSampling:
    return RowSampling.of([SamplingParams(**parameters)], logits.shape[-1], logits.device)


def test_uniforms_are_uniform_in_coarse_and_fine_bits() -> None:
    u = row_uniform(7, torch.arange(500)[:, None], torch.arange(200)).flatten()
    assert u.dtype == torch.float64 and float(u.min()) >= 0 and float(u.max()) < 1
    assert u.unique().numel() == u.numel()
    for values in (u, (u * 1000) % 1, (u * 2**30) % 1):
        assert_distributed(torch.histc(values, 100, 0, 1), u.numel() / 100)


@pytest.mark.parametrize("step", [(0, 1), (1, 0), (1, 1), (64, 0)])
def test_neighbouring_rows_and_positions_are_independent(step: tuple[int, int]) -> None:
    u = row_uniform(3, torch.arange(400)[:, None], torch.arange(250))
    a, b = u[: 400 - step[0], : 250 - step[1]], u[step[0] :, step[1] :]
    joint = (a * 10).long() * 10 + (b * 10).long()
    assert_distributed(torch.bincount(joint.flatten(), minlength=100).double(), a.numel() / 100)


def test_seeds_give_unrelated_streams() -> None:
    rows, positions = torch.arange(300)[:, None], torch.arange(100)
    streams = torch.stack([row_uniform(seed, rows, positions).flatten() for seed in (0, 1, 2, 1 << 32, -1, 123456789)])
    correlation = torch.corrcoef(streams).fill_diagonal_(0)
    assert float(correlation.abs().max()) < 5 / math.sqrt(streams.shape[1])


def test_a_uniform_depends_on_its_triple_only() -> None:
    whole = row_uniform(11, torch.arange(64), torch.full((64,), 9))
    some = torch.tensor([40, 3, 17])
    assert torch.equal(row_uniform(11, some, torch.full((3,), 9)), whole[some])
    # A fixed number: rollouts of a seed stay what they were from one version of the program to the next.
    assert row_uniform(1, torch.tensor([2]), torch.tensor([3])).item() == 0.8993092287765546


@pytest.mark.parametrize(("vocab", "temperature"), [(7, 1.0), (64, 0.7), (200, 2.0)])
def test_a_token_is_the_inverse_of_the_cumulative_distribution(vocab: int, temperature: float) -> None:
    logits = torch.randn(500, vocab, generator=torch.Generator().manual_seed(0)) * 3
    u = row_uniform(5, torch.arange(500), torch.zeros(1, dtype=torch.int64))
    token, logp, mask, _ = sample(logits, u, shared(logits, temperature=temperature))
    expected = (logits.double() / temperature).softmax(-1)
    assert mask is None and torch.equal(token, (expected.cumsum(-1) <= u[:, None]).sum(-1))
    torch.testing.assert_close(logp, expected.log().gather(1, token[:, None])[:, 0].float(), atol=1e-5, rtol=0)


def test_impossible_tokens_are_never_drawn_at_either_end_of_the_unit_interval() -> None:
    logits = torch.full((4, 200), -torch.inf)
    logits[:, [3, 100, 150]] = torch.tensor([0.0, 1.0, -20.0])
    u = torch.tensor([0.0, 1 - 2**-53, 0.5, 1 - 2**-24], dtype=torch.float64)
    token, logp, _, _ = sample(logits, u, shared(logits))
    assert token[0] == 3 and token[1] == 150
    assert bool(torch.isin(token, torch.tensor([3, 100, 150])).all()) and bool(logp.isfinite().all())


def test_the_coldest_temperature_takes_the_likeliest() -> None:
    logits = 50 * torch.randn(8, 130)
    token, logp, _, _ = sample(logits, torch.rand(8), shared(logits, temperature=COLDEST, top_p=0.9))
    assert torch.equal(token, logits.argmax(-1)) and torch.equal(logp, torch.zeros(8))


@pytest.mark.parametrize("bias", [(-1, 1.0), (3, math.nan), (3, math.inf)])
def test_a_bias_of_no_token_or_without_a_size_is_refused(bias: tuple[int, float]) -> None:
    with pytest.raises(ValueError, match="logit_bias adds"):
        SamplingParams(logit_bias=((2, -math.inf), bias))


def test_bias_and_penalties_are_added_to_the_logits_of_each_row_by_the_formula_of_openai() -> None:
    logits_BV = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    count_BV = torch.randint(0, 3, (3, 40), generator=torch.Generator().manual_seed(1)).float()
    count_BV[2, logits_BV[2].argmax()] = 2  # so that another token becomes the likeliest
    rows = [
        SamplingParams(temperature=0.5, logit_bias=((3, 5.0), (7, -100.0))),
        SamplingParams(presence_penalty=1.5, frequency_penalty=-0.5),
        SamplingParams(temperature=0.0, frequency_penalty=2.0, logit_bias=((0, -2.0),)),
    ]
    expected_BV = logits_BV.clone()
    expected_BV[0, 3] += 5
    expected_BV[0, 7] -= 100
    expected_BV[1] -= 1.5 * (count_BV[1] > 0) - 0.5 * count_BV[1]
    expected_BV[2] -= 2 * count_BV[2]
    expected_BV[2, 0] -= 2
    expected_BV[0] /= 0.5
    for u in (0.1, 0.5, 0.9):
        drawn = sample(logits_BV, torch.full((3,), u), RowSampling.of(rows, 40, logits_BV.device), None, count_BV)
        logp_BV = expected_BV.log_softmax(-1)
        torch.testing.assert_close(drawn.logp_B, logp_BV.gather(1, drawn.token_B[:, None]).squeeze(1))
        assert drawn.token_B[2] == expected_BV[2].argmax() != logits_BV[2].argmax()


def test_temperature_zero_takes_the_likeliest_and_reports_it_at_temperature_one() -> None:
    logits = torch.randn(8, 40, generator=torch.Generator().manual_seed(1))
    token, logp, mask, _ = sample(logits, torch.rand(8), shared(logits, temperature=0, top_k=3, top_p=0.5))
    assert torch.equal(token, logits.argmax(-1)) and mask is None
    torch.testing.assert_close(logp, logits.log_softmax(-1).amax(-1))


@settings(max_examples=60, deadline=None)
@given(
    vocab=st.integers(2, 80),
    top_k=st.none() | st.integers(1, 100),
    top_p=st.floats(0.01, 1.0) | st.just(1.0),
    temperature=st.floats(0.2, 3.0),
    seed=st.integers(0, 1000),
)
def test_mask_is_the_smallest_of_the_likeliest(
    vocab: int, top_k: int | None, top_p: float, temperature: float, seed: int
) -> None:
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    u = row_uniform(seed, torch.arange(5), torch.zeros(1, dtype=torch.int64))
    token, logp, mask, _ = sample(logits, u, shared(logits, temperature=temperature, top_k=top_k, top_p=top_p))
    if mask is None:
        assert (top_k is None or top_k >= vocab) and top_p == 1
        return
    scaled = logits.double() / temperature
    assert bool(mask.gather(1, token[:, None]).all())
    expected = scaled.masked_fill(~mask, -torch.inf).log_softmax(-1).gather(1, token[:, None])[:, 0]
    torch.testing.assert_close(logp.double(), expected, atol=1e-5, rtol=0)
    for row, kept in zip(scaled, mask, strict=True):
        count = int(kept.sum())
        assert 1 <= count <= min(top_k or vocab, vocab)
        assert row[kept].min() >= row.masked_fill(kept, -torch.inf).max()
        mass = row.topk(min(top_k or vocab, vocab)).values.softmax(-1)
        if top_p == 1:
            assert count == min(top_k or vocab, vocab)
        else:
            assert float(mass[: count - 1].sum()) < top_p + 1e-9
            assert float(mass[:count].sum()) >= top_p - 1e-6


def test_top_p_counts_what_top_k_left_and_equal_logits_leave_exactly_k() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert sampling_mask(logits, shared(logits, top_k=2, top_p=0.5)).tolist() == [[True, False, False, False]]
    assert sampling_mask(logits, shared(logits, top_p=0.5)).tolist() == [[True, True, False, False]]
    assert sampling_mask(torch.zeros(3, 10), shared(torch.zeros(3, 10), top_k=4)).sum(-1).tolist() == [4, 4, 4]


@settings(max_examples=30, deadline=None)
@given(vocab=st.integers(1, 70), seed=st.integers(0, 100))
def test_packing_a_mask_loses_nothing(vocab: int, seed: int) -> None:
    mask = torch.rand(3, 2, vocab, generator=torch.Generator().manual_seed(seed)) < 0.4
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 2, -(-vocab // 8))
    assert torch.equal(unpack_mask(packed, vocab), mask)


@pytest.mark.parametrize(
    ("name", "value"),
    [*(("temperature", value) for value in (-1.0, math.nan, math.inf, 1e-40)), ("top_k", 0), ("top_p", 0.0), ("top_p", 1.5),
     ("max_new_tokens", 0)],
)  # fmt: skip
def test_meaningless_parameters_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})
