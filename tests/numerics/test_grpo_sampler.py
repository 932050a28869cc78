"""The sampler's log-probabilities beside those the update computes by a full forward, and what must not change them."""

import pytest
import torch

from osler.inference.engine import InferenceEngine
from osler.ops.sampling_params import SamplingParams
from osler.parallel.engine import ParallelEngine
from osler.rl.config import AlgorithmConfig
from osler.rl.step import PolicyLoss, TrainingRow, completion_logprobs, update_policy
from osler.runs.micro_batch import MicroBatchLimit
from osler.runs.process import Learner
from tests.models import tiny_model

VOCAB = 37
STOPS = range(1, VOCAB, 6)
SAMPLERS = [(1.0, None, 1.0), (0.7, None, 1.0), (1.0, 5, 1.0), (1.3, None, 0.8), (0.9, 12, 0.9)]


def sharp_model(seed=0):
    """Sharper than at the start of training, so that sampling masks and ratios have something to show."""
    model = tiny_model(seed=seed, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=VOCAB, max_seq_len=48, residual_init="zero")
    with torch.no_grad():
        for parameter in model.parameters():
            generator = torch.Generator().manual_seed(parameter.numel())
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model


def sample_rows(model, *, sampler=(1.0, None, 1.0), advantage=None):
    """Twelve completions of prompts of different lengths, as rows to learn from."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(4, VOCAB, (length,), generator=generator).tolist() for length in (2, 7, 5)]
    temperature, top_k, top_p = sampler
    sampling = SamplingParams(max_new_tokens=20, temperature=temperature, top_k=top_k, top_p=top_p, stop_ids=tuple(STOPS), seed=5)
    drawn = InferenceEngine(model).generate(prompts, sampling, samples_per_prompt=4)
    values = [0.5, -0.5, 1.0, -1.0] * 3 if advantage is None else [advantage] * 12
    return [TrainingRow(prompts[r // 4], row.ids, row.logprobs, values[r], row.packed_masks) for r, row in enumerate(drawn)]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampler_logprobs_equal_a_full_forward(sampler):
    model = sharp_model()
    rows = sample_rows(model, sampler=sampler)
    assert len({len(row.completion_ids) for row in rows}) > 2, "rows of several lengths, or the test shows little"
    with torch.no_grad():
        logp, entropy, mask, _ = completion_logprobs(model, rows, temperature=sampler[0])
    assert mask.sum(1).tolist() == [len(row.completion_ids) for row in rows]
    for r, row in enumerate(rows):
        expected = torch.tensor(row.logprobs)
        torch.testing.assert_close(logp[r, : len(expected)], expected, atol=1e-5, rtol=0)
    assert (entropy[mask] >= -1e-6).all()
    assert logp[~mask].abs().sum() == 0


@pytest.mark.parametrize("sampler", [(1.0, 5, 1.0), (1.3, None, 0.8)])
def test_without_the_sampling_mask_the_logprobs_are_wrong(sampler):
    """What the sampling mask is stored for: over the whole vocabulary the same tokens have other log-probabilities."""
    model = sharp_model()
    rows = [TrainingRow(r.prompt_ids, r.completion_ids, r.logprobs, r.advantage) for r in sample_rows(model, sampler=sampler)]
    with torch.no_grad():
        logp, _, _, _ = completion_logprobs(model, rows, temperature=sampler[0])
    gaps = [(logp[r, : len(row.logprobs)] - torch.tensor(row.logprobs)).abs().max() for r, row in enumerate(rows)]
    assert max(gaps) > 0.05


def test_padding_does_not_change_a_rows_logprobs():
    model = sharp_model()
    rows = sample_rows(model)
    with torch.no_grad():
        together, _, _, _ = completion_logprobs(model, rows, temperature=1.0)
        for r, row in enumerate(rows):
            alone, _, _, _ = completion_logprobs(model, [row], temperature=1.0)
            torch.testing.assert_close(together[r, : alone.shape[1]], alone[0], atol=1e-5, rtol=0)


def learner_of(model, optimizer, clip_norm=1.0):
    return Learner(model, optimizer, ParallelEngine(PolicyLoss(model)), clip_norm)


def gradient_after(rows, algorithm, *, micro_batch_tokens=100_000, reference=None):
    """The change of the parameters by one plain gradient step of size 1: minus the gradient of the update."""
    model = sharp_model()
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    learner = learner_of(model, optimizer, 1e9)
    limit = MicroBatchLimit(learner, micro_batch_tokens)
    metrics = update_policy(learner, rows, algorithm, reference=reference, micro_batch_limit=limit)
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach() - before, metrics


@pytest.mark.parametrize("aggregate", ["sequence_mean", "token_mean", "constant"])
def test_the_updates_gradient_ignores_micro_batches_and_order(aggregate):
    rows = sample_rows(sharp_model(1))  # drawn by another model: ratios differ from 1
    algorithm = AlgorithmConfig(aggregate=aggregate, beta=0.1, opsm_delta=0.05, max_new_tokens=20)
    reference = sharp_model(2)
    whole, whole_metrics = gradient_after(rows, algorithm, reference=reference)
    assert whole.abs().max() > 1e-4
    for shuffled, budget in ((rows, 60), (rows[::-1], 100_000), (rows[5:] + rows[:5], 30)):
        part, metrics = gradient_after(shuffled, algorithm, micro_batch_tokens=budget, reference=reference)
        torch.testing.assert_close(part, whole, atol=2e-6, rtol=1e-4)
        for name in ("loss", "kl", "entropy", "clip_ratio/low_mean", "opsm/masked_frac", "opsm/seq_kl_mean"):
            assert metrics[name] == pytest.approx(whole_metrics[name], abs=1e-5), name


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_step_zero_of_a_real_model(sampler):
    """Drawn by the policy itself, which is also the reference: ratio 1, nothing clipped or masked, no divergence."""
    model = sharp_model()
    rows = sample_rows(model, sampler=sampler)
    algorithm = AlgorithmConfig(
        temperature=sampler[0], top_k=sampler[1], top_p=sampler[2], beta=0.1, opsm_delta=0.1, max_new_tokens=20
    )
    _, metrics = gradient_after(rows, algorithm, reference=model)
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-5
    assert metrics["clip_ratio/low_mean"] == metrics["clip_ratio/high_mean"] == metrics["opsm/masked_frac"] == 0
    assert abs(metrics["kl"]) < 1e-8
    assert metrics["entropy"] > 0


def test_several_updates_per_batch_go_off_policy_and_the_mask_acts():
    rows = sample_rows(sharp_model(), advantage=-1.0)
    model = sharp_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, fused=True)
    algorithm = AlgorithmConfig(beta=0.0, updates_per_batch=4, opsm_delta=0.01, max_new_tokens=20)
    metrics = update_policy(learner_of(model, optimizer, 1e9), rows, algorithm)
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-5  # of the first update: trainer and sampler agree
    assert 0 < metrics["opsm/masked_frac"] < 1
    assert metrics["opsm/seq_kl_mean"] > 0
