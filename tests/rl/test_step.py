"""One policy update: how rows are cut into micro-batches, and which rows move the policy."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from osler.inference.engine import InferenceEngine
from osler.model.config import SparseAttentionConfig
from osler.model.init import is_of_indexer
from osler.optim.build import build_optimizer
from osler.optim.config import AdamWConfig
from osler.parallel.engine import ParallelEngine
from osler.rl.config import AlgorithmConfig
from osler.rl.step import PolicyLoss, TrainingRow, assign_to_ranks, completion_logprobs, micro_batches, update_policy
from osler.runs.micro_batch import MicroBatchLimit
from osler.runs.process import Learner, Run
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder
from osler.runtime.world import World
from tests.models import tiny_model


def row(prompt, completion, *, advantage=1.0, trained=True):
    return TrainingRow(list(range(4, 4 + prompt)), list(range(5, 5 + completion)), [-5.0] * completion, advantage, None, trained)


@given(sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=20), budget=st.integers(1, 200))
def test_micro_batches_hold_every_chosen_row_once_within_the_budget(sizes, budget):
    rows = [row(*size) for size in sizes]
    chosen = list(range(0, len(rows), 2))
    batches = micro_batches(rows, chosen, budget)
    assert sorted(index for batch in batches for index in batch) == chosen
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(rows[index].tokens for index in batch) <= budget


@given(sizes=st.lists(st.tuples(st.integers(1, 30), st.sampled_from([None, None, 0, 1])), max_size=20), ranks=st.integers(2, 4))
def test_rows_are_dealt_to_those_who_drew_them_and_otherwise_evenly(sizes, ranks):
    rows = [replace(row(size, 1), sampled_by_rank=sampled_by_rank) for size, sampled_by_rank in sizes]
    chosen = list(range(0, len(rows), 2))
    shares = assign_to_ranks(rows, chosen, ranks)
    assert sorted(index for share in shares for index in share) == chosen
    assert all(rows[index].sampled_by_rank in (None, rank) for rank, share in enumerate(shares) for index in share)
    if all(rows[index].sampled_by_rank is None for index in chosen):
        tokens = [sum(rows[index].tokens for index in share) for share in shares]
        assert max(tokens) - min(tokens) <= max((rows[index].tokens for index in chosen), default=0)


def learner_of(model, weight_decay=0.0):
    optimizer = build_optimizer(model, AdamWConfig(lr=1e-3, weight_decay=weight_decay))
    return Learner(model, optimizer, ParallelEngine(PolicyLoss(model)), clip_norm=1.0)


def weights(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def moved(make_policy, rows, algorithm, micro_batch_tokens=None, **options):
    """How far an update moves the policy, and its metrics."""
    model = make_policy()
    before = weights(model)
    learner = learner_of(model)
    limit = MicroBatchLimit(learner, micro_batch_tokens)
    metrics = update_policy(learner, rows, algorithm, micro_batch_limit=limit, **options)
    return (weights(model) - before).abs().max().item(), metrics


def test_rows_that_are_not_trained_do_not_move_the_policy(make_policy):
    algorithm = AlgorithmConfig(beta=0.1, max_new_tokens=8)
    reference = make_policy().requires_grad_(False)
    with torch.no_grad():
        reference.lm_head.weight.mul_(1.5)
    distance, metrics = moved(make_policy, [row(3, 4, trained=False)] * 2, algorithm, reference=reference)
    assert distance == 0.0
    assert metrics["kl"] > 0.0
    assert moved(make_policy, [row(3, 4)] * 2, algorithm, reference=reference)[0] > 0.0


@pytest.mark.parametrize("advantages", [(1.0, 0.0, -1.0, 0.0), (0.0, 0.0, 0.0, 0.0)])
def test_a_backward_pass_without_rows_of_no_advantage_is_the_same_update(make_policy, monkeypatch, advantages):
    """The plain form runs every row through the backward pass; two updates, so that momentum counts."""
    rows = [row(3 + i, 4 + i % 2, advantage=advantage) for i, advantage in enumerate(advantages)]

    def updated():
        learner = learner_of(make_policy(), weight_decay=0.1)
        update_policy(learner, [row(3, 4), row(2, 2, advantage=-1.0)], AlgorithmConfig(beta=0.0))
        metrics = update_policy(learner, rows, AlgorithmConfig(beta=0.0))
        return weights(learner.model), metrics

    fast, fast_metrics = updated()
    monkeypatch.setattr(TrainingRow, "has_gradient", lambda row, beta: True)
    plain, plain_metrics = updated()
    torch.testing.assert_close(fast, plain, atol=1e-6, rtol=0)
    assert fast_metrics.pop("data/padding_frac") <= plain_metrics.pop("data/padding_frac")  # passes of their own for the others
    assert fast_metrics == pytest.approx(plain_metrics, abs=1e-5)


def test_the_index_of_a_sparse_policy_learns_from_completions_in_the_same_pass():
    model = tiny_model(attention=SparseAttentionConfig(index_heads=2, index_head_dim=16, top_k=6, local_window=2))
    weight = model.layers[0].self_attn.indexer.q_proj.weight
    before = weight.detach().clone()
    update_policy(learner_of(model), [row(20, 14, trained=False), row(12, 3, trained=False)], AlgorithmConfig(beta=0.0))
    assert torch.equal(weight, before), "rows that are not trained teach the index nothing"
    update_policy(learner_of(model), [row(20, 14), row(12, 3, advantage=-1.0)], AlgorithmConfig(beta=0.0))
    assert not torch.equal(weight, before)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_k": 9}])
def test_a_policy_that_copies_is_trained_on_the_probabilities_it_was_sampled_with(sampling):
    model, algorithm = tiny_model(copy_head_dim=8), AlgorithmConfig(beta=0.0, max_new_tokens=12, **sampling)
    with torch.no_grad():
        model.copy_head.k_proj.weight.mul_(8.0)
    prompts = [[5, 6, 7, 8, 5, 6], [9, 10, 9]]
    drawn = InferenceEngine(model).generate(prompts, algorithm.sampling, samples_per_prompt=2)
    rows = [TrainingRow(prompts[n // 2], one.ids, one.logprobs, (-1.0) ** n, one.packed_masks) for n, one in enumerate(drawn)]
    logp_BT, *_ = completion_logprobs(model, rows, temperature=algorithm.temperature)
    torch.testing.assert_close(logp_BT, torch.tensor([one.logprobs for one in drawn]), atol=1e-5, rtol=1e-5)
    before = {name: weight.detach().clone() for name, weight in model.copy_head.named_parameters()}
    update_policy(learner_of(model), rows, algorithm)
    assert not any(torch.equal(weight, before[name]) for name, weight in model.copy_head.named_parameters())


@pytest.mark.parametrize(("most", "updates"), [(None, 6), (0.9, 6), (0.2, 1)])
def test_a_batch_whose_policy_has_moved_too_far_gets_no_further_update(make_policy, most, updates):
    """Half of these rows were drawn by another policy and have a negative advantage, so the mask leaves them out."""
    rows = [row(3, 4, advantage=advantage) for advantage in (1.0, 1.0, -1.0, -1.0)]
    algorithm = AlgorithmConfig(beta=0.0, opsm_delta=1e-4, updates_per_batch=6, max_masked_frac=most)
    assert moved(make_policy, rows, algorithm)[1]["opsm/updates"] == updates
    with pytest.raises(ValueError, match="opsm_delta"):
        AlgorithmConfig(max_masked_frac=0.5)


def test_updates_go_on_until_the_policy_is_farther_from_the_sampler_than_it_may_be(make_policy):
    """The policy itself drew these rows, so it moves away from them update by update."""
    rows = [row(3, 4, advantage=advantage) for advantage in (1.0, 0.5, -0.5, -1.0)]
    with torch.no_grad():
        logp, *_ = completion_logprobs(make_policy(), rows, temperature=1.0)
    rows = [replace(one, logprobs=drawn) for one, drawn in zip(rows, logp.tolist(), strict=True)]
    algorithm = AlgorithmConfig(beta=0.0)
    means = [moved(make_policy, rows, replace(algorithm, updates_per_batch=n))[1]["approx_kl"] for n in (1, 2, 3, 4)]
    found = [means[0], *(n * now - (n - 1) * before for n, (before, now) in enumerate(pairwise(means), start=2))]
    assert found[0] == pytest.approx(0.0, abs=1e-6) and found == sorted(found), "each update moves it further"
    for updates, (nearer, farther) in enumerate(pairwise(found), start=2):
        limited = replace(algorithm, updates_per_batch=9, target_kl=(nearer + farther) / 2)
        assert moved(make_policy, rows, limited)[1]["opsm/updates"] == updates


def test_the_kl_of_a_sparse_policys_index_does_not_shrink_the_step_of_the_policy():
    """It would if all gradients were clipped together: here the index has a thousand times the gradient."""
    algorithm, ends = AlgorithmConfig(beta=0.0), []
    for factor in (1.0, 1000.0):
        learner = replace(learner_of(tiny_model(attention=SparseAttentionConfig(top_k=6, local_window=2))), clip_norm=1e-3)
        for name, parameter in learner.model.named_parameters():
            if is_of_indexer(name):
                parameter.register_hook(lambda gradient, factor=factor: gradient * factor)
        update_policy(learner, [row(3, 9), row(3, 4, advantage=-1.0)], algorithm)
        ends.append({name: weight.detach() for name, weight in learner.model.named_parameters()})
    assert all(torch.equal(ends[0][name], weight) for name, weight in ends[1].items() if not is_of_indexer(name))


def test_an_update_without_memory_is_made_again_in_smaller_passes(make_policy, tmp_path):
    """The second of two updates does not fit, and allocations really fail. An update that was made is not made again."""
    algorithm = AlgorithmConfig(beta=0.1, updates_per_batch=2, max_new_tokens=8)
    rows = [row(3, 4 + i % 2, advantage=(-1.0) ** i) for i in range(4)]
    ends, seen, most, run = [], [], [4], Run(RunFolder.create(tmp_path / "run"), World())

    def hungry(layer, given):
        seen.append(len(given[0]))
        torch.empty(2**60 if len(seen) > 1 and seen[-1] > most[0] else 1)

    for fits in (4, 1):
        most[:] = [fits]
        seen.clear()
        learner = learner_of(make_policy())
        learner.model.layers[0].register_forward_pre_hook(hungry)
        limit = MicroBatchLimit(learner, None, run)
        update_policy(learner, rows, algorithm, reference=make_policy().requires_grad_(False), micro_batch_limit=limit)
        ends.append(weights(learner.model))
    resumed = MicroBatchLimit(learner, None, run)
    assert seen == [4, 4, 2, 1, 1, 1, 1] and [resumed.tokens(update) for update in (1, 2)] == [None, 8]
    torch.testing.assert_close(ends[1], ends[0], atol=2e-6, rtol=0)
    most[:] = [0]
    with pytest.raises(UserError, match="one row at once"):
        update_policy(learner, rows, algorithm, reference=make_policy().requires_grad_(False), micro_batch_limit=limit)


def test_only_rows_with_something_to_learn_are_backpropagated(make_policy, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: seen.append(loss))
    rows = [row(3, 4), row(3, 4, advantage=0.0), row(3, 4, trained=False)]
    _, metrics = moved(make_policy, rows, AlgorithmConfig(beta=0.0), micro_batch_tokens=7)
    assert len(seen) == 1
    assert not seen[0].isnan() and metrics["sampling/sampling_logp_difference/mean"] > 0.0
