"""GRPO's advantages and loss against arithmetic done another way: by hand, enumeration, REINFORCE, a ten-line loop."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osler.rl.config import AlgorithmConfig, ClipConfig
from osler.rl.loss import LossInputs, add_sums, group_advantages, grpo_loss, kl_estimate, loss_metrics, token_weights

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 3.0, 1.0]], dtype=torch.float64)
KINDS = ["mean", "mean_std", "leave_one_out"]
ACTIONS = 7
POLICIES = ["on_policy", "off_policy"]


def test_advantages_by_hand():
    mean = torch.tensor([[0.5, -0.5, -0.5, 0.5], [-1.0, -1.0, 2.0, 0.0]], dtype=torch.float64)
    others = (REWARDS.sum(1, keepdim=True) - REWARDS) / 3
    expected = {"mean": mean, "mean_std": mean / (REWARDS.std(dim=1, keepdim=True) + 1e-4), "leave_one_out": REWARDS - others}
    for kind, values in expected.items():
        torch.testing.assert_close(group_advantages(REWARDS, kind), values)


@pytest.mark.parametrize("kind", KINDS)
def test_groups_that_teach_nothing_get_exact_zeros(kind):
    """Equal rewards (three times 0.1 over three is not 0.1 in every rounding), a single valid sample, none."""
    assert group_advantages(torch.full((2, 3), 0.1), kind).abs().max() == 0
    for kept in (0, 1):
        valid = torch.arange(3)[None] < kept
        assert group_advantages(torch.tensor([[1.0, 0.0, 0.5]]), kind, valid_PG=valid).abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_samples_leave_the_group(kind):
    rewards = torch.tensor([[1.0, 0.0, 9.0, 0.0]], dtype=torch.float64)
    advantages = group_advantages(rewards, kind, valid_PG=torch.tensor([[True, True, False, True]]))
    torch.testing.assert_close(advantages[:, [0, 1, 3]], group_advantages(rewards[:, [0, 1, 3]], kind))
    assert advantages[0, 2] == 0


@pytest.mark.parametrize("kind", KINDS)
@given(rewards=st.lists(st.floats(-5, 5), min_size=2, max_size=8), shift=st.floats(-3, 3))
def test_advantages_sum_to_zero_and_ignore_a_shift(kind, rewards, shift):
    group = torch.tensor([rewards], dtype=torch.float64)
    advantages = group_advantages(group, kind)
    assert advantages.sum().abs() < 1e-6
    if group.amax() - group.amin() > 1e-3:
        torch.testing.assert_close(group_advantages(group + shift, kind), advantages, atol=1e-6, rtol=0)


def bandit(off_policy: bool):
    """Logits of a policy, the distribution it was sampled from, and a reference, over a few actions."""
    generator = torch.Generator().manual_seed(3)
    theta, old, ref = torch.randn(3, ACTIONS, generator=generator, dtype=torch.float64)
    theta.requires_grad_()
    return theta, (old if off_policy else theta.detach()).log_softmax(-1), ref.log_softmax(-1)


def expected_kl_gradient(theta, logp_old, logp_ref, kind, beta=1.0):
    """Gradient of E_old[kl], every action enumerated as a completion of one token that weighs its old probability."""
    logp = theta.log_softmax(-1)
    inputs = LossInputs(
        logp_BT=logp[:, None],
        logp_old_BT=logp_old[:, None],
        logp_ref_BT=logp_ref[:, None],
        mask_BT=torch.ones(ACTIONS, 1, dtype=torch.bool),
        advantages_B=torch.zeros(ACTIONS, dtype=torch.float64),
        weight_BT=logp_old.exp()[:, None],
    )
    loss, _ = grpo_loss(inputs, AlgorithmConfig(kl=kind, beta=beta))
    return torch.autograd.grad(loss, theta)[0]


def true_kl_gradient(theta, logp_ref, reverse=False):
    logp = theta.log_softmax(-1)
    kl = (logp_ref.exp() * (logp_ref - logp)).sum() if reverse else (logp.exp() * (logp - logp_ref)).sum()
    return torch.autograd.grad(kl, theta)[0]


@pytest.mark.parametrize("off_policy", [False, True], ids=POLICIES)
def test_unbiased_kl_has_the_gradient_of_the_divergence(off_policy):
    theta, logp_old, logp_ref = bandit(off_policy)
    gradient = expected_kl_gradient(theta, logp_old, logp_ref, "unbiased")
    torch.testing.assert_close(gradient, true_kl_gradient(theta, logp_ref), atol=1e-6, rtol=0)


def test_on_policy_the_plain_estimates_have_their_known_gradients():
    theta, logp_old, logp_ref = bandit(off_policy=False)
    k1, k2, k3 = (expected_kl_gradient(theta, logp_old, logp_ref, kind) for kind in ("k1", "k2", "k3"))
    torch.testing.assert_close(k1, torch.zeros_like(k1), atol=1e-12, rtol=0)
    torch.testing.assert_close(k2, true_kl_gradient(theta, logp_ref), atol=1e-12, rtol=0)
    torch.testing.assert_close(k3, true_kl_gradient(theta, logp_ref, reverse=True), atol=1e-12, rtol=0)


@pytest.mark.parametrize("off_policy", [False, True], ids=POLICIES)
def test_unbiased_kl_value_is_the_divergence(off_policy):
    theta, logp_old, logp_ref = bandit(off_policy)
    logp = theta.detach().log_softmax(-1)
    value = (logp_old.exp() * kl_estimate(logp_ref - logp, (logp - logp_old).exp(), "unbiased")).sum()
    assert value.item() == pytest.approx((logp.exp() * (logp - logp_ref)).sum().item(), abs=1e-12)


def make_batch(seed=0, rows=6, width=5, drift=0.3, group=3, max_new_tokens=9, aggregate="sequence_mean"):
    """A random update: lengths 1..width, log-probs of a policy that drifted by ``drift`` since it was sampled."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    mask = torch.arange(width)[None] < lengths[:, None]
    old = -noise(rows, width).abs() - 0.1
    rewards = torch.rand(rows // group, group, generator=generator, dtype=torch.float64)
    return LossInputs(
        logp_BT=(old + drift * noise(rows, width)).requires_grad_(),
        logp_old_BT=old,
        logp_ref_BT=old + drift * noise(rows, width),
        mask_BT=mask,
        advantages_B=group_advantages(rewards).flatten(),
        weight_BT=token_weights(mask, aggregate, max_new_tokens=max_new_tokens, dtype=torch.float64),
    )


def select(inputs, rows):
    """The rows of an update as a micro-batch; the log-probabilities stay attached to the whole."""
    return LossInputs(
        inputs.logp_BT[rows],
        inputs.logp_old_BT[rows],
        None if inputs.logp_ref_BT is None else inputs.logp_ref_BT[rows],
        inputs.mask_BT[rows],
        inputs.advantages_B[rows],
        inputs.weight_BT[rows],
    )


@pytest.mark.parametrize("aggregate", ["sequence_mean", "token_mean", "constant"])
def test_the_drift_is_what_the_loss_gained_since_the_sampling(aggregate):
    """Nothing where the policy is the one that drew; elsewhere the loss minus that of the same rewards and lengths before it."""
    algorithm = AlgorithmConfig(beta=0.1, aggregate=aggregate)
    before, at_first = grpo_loss(make_batch(drift=0.0, aggregate=aggregate), algorithm)
    after, later = grpo_loss(make_batch(drift=0.6, aggregate=aggregate), algorithm)
    assert abs(at_first["drift"].item()) < 1e-8 < 1e-3 < abs(later["drift"].item())
    assert later["drift"].item() == pytest.approx((after - before).item(), abs=1e-8)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_step_zero_gradient_is_reinforce_with_the_group_mean_baseline(beta):
    batch = make_batch(drift=0.0)
    loss, _ = grpo_loss(batch, AlgorithmConfig(beta=beta))
    gradient = torch.autograd.grad(loss, batch.logp_BT)[0]
    logp = batch.logp_old_BT.clone().requires_grad_()
    rows, width = logp.shape
    reinforce = sum(
        -batch.advantages_B[i] * logp[i, t] / batch.mask_BT[i].sum() / rows
        for i in range(rows)
        for t in range(width)
        if batch.mask_BT[i, t]
    )
    torch.testing.assert_close(gradient, torch.autograd.grad(reinforce, logp)[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("advantage", "seq_kl", "masked"),
    [
        (-1.0, 0.3, True),
        (-1.0, 0.1, False),
        (1.0, 0.3, False),
        (1.0, 0.1, False),
        (0.0, 0.3, False),
        (-1.0, -0.3, False),
    ],
)
def test_opsm_truth_table(advantage, seq_kl, masked):
    """Masked only where the advantage is negative and the policy has moved away; the KL gradient stays either way."""
    wide = ClipConfig(low=0.9, high=9.0)  # so that clipping does not silence the rows on its own
    algorithm = AlgorithmConfig(beta=0.1, opsm_delta=0.2, clip=wide)
    old = torch.full((1, 4), -1.0, dtype=torch.float64)
    wobble = torch.tensor([[0.05, -0.05, 0.02, -0.02]], dtype=torch.float64)  # per token, gone in the mean over the sequence
    mask = torch.ones(1, 4, dtype=torch.bool)
    weight = token_weights(mask, "sequence_mean", max_new_tokens=4, dtype=torch.float64)

    def gradient(advantage, algorithm):
        logp = (old - seq_kl + wobble).requires_grad_()
        row = LossInputs(logp, old, old - 0.4, mask, torch.tensor([advantage], dtype=torch.float64), weight)
        loss, sums = grpo_loss(row, algorithm)
        return torch.autograd.grad(loss, logp)[0], sums["opsm_masked"].item()

    kl_only, _ = gradient(0.0, algorithm)
    unmasked, _ = gradient(advantage, AlgorithmConfig(beta=0.1, clip=wide))
    total, count = gradient(advantage, algorithm)
    assert count == int(masked)
    torch.testing.assert_close(total, kl_only if masked else unmasked, atol=1e-15, rtol=0)
    if advantage != 0.0:
        assert (kl_only - unmasked).abs().max() > 1e-2


ALGORITHMS = [
    AlgorithmConfig(beta=0.1, opsm_delta=0.1, aggregate=aggregate, ratio=ratio, kl=kl, clip=ClipConfig(low=0.2, high=0.28))
    for aggregate, ratio, kl in [
        ("sequence_mean", "token", "unbiased"),
        ("token_mean", "token", "k3"),
        ("constant", "token", "k2"),
        ("sequence_mean", "sequence", "unbiased"),
        ("token_mean", "sequence", "k1"),
    ]
]
LABELS = [f"{a.aggregate}-{a.ratio}-{a.kl}" for a in ALGORITHMS]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=LABELS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), cut=st.integers(1, 5))
def test_micro_batches_add_up(algorithm, seed, cut):
    batch = make_batch(seed=seed, aggregate=algorithm.aggregate)
    whole, sums = grpo_loss(batch, algorithm)
    parts = [grpo_loss(select(batch, rows), algorithm) for rows in (slice(0, cut), slice(cut, None))]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole, atol=1e-12, rtol=0)
    expected = torch.autograd.grad(whole, batch.logp_BT)[0]
    gradients = [torch.autograd.grad(loss, batch.logp_BT)[0] for loss, _ in parts]
    torch.testing.assert_close(gradients[0] + gradients[1], expected, atol=1e-12, rtol=0)
    together = loss_metrics(add_sums(add_sums({}, parts[0][1]), parts[1][1]))
    for name, value in loss_metrics(sums).items():
        assert together[name].item() == pytest.approx(value.item(), abs=1e-12), name


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=LABELS)
@pytest.mark.parametrize("garbage", [0.0, 50.0, float("inf"), float("nan")])
def test_padding_changes_nothing(algorithm, garbage):
    batch = make_batch(aggregate=algorithm.aggregate)
    loss, _ = grpo_loss(batch, algorithm)
    expected = torch.autograd.grad(loss, batch.logp_BT)[0]

    def pad(tensor):
        filled = torch.where(batch.mask_BT, tensor.detach(), garbage)
        return torch.cat([filled, torch.full((6, 4), garbage, dtype=torch.float64)], dim=1)

    mask = torch.cat([batch.mask_BT, torch.zeros(6, 4, dtype=torch.bool)], dim=1)
    logp = pad(batch.logp_BT).requires_grad_()
    weight = token_weights(mask, algorithm.aggregate, max_new_tokens=9, dtype=torch.float64)
    padded = LossInputs(logp, pad(batch.logp_old_BT), pad(batch.logp_ref_BT), mask, batch.advantages_B, weight)
    padded_loss, _ = grpo_loss(padded, algorithm)
    gradient = torch.autograd.grad(padded_loss, logp)[0]
    torch.testing.assert_close(padded_loss, loss, atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient[:, :5], expected, atol=1e-12, rtol=0)
    assert gradient[:, 5:].abs().max() == 0


def ten_line_loop(batch, algorithm, max_new_tokens):
    """The formulas of the paper with Python floats, written without looking at the tensors' code."""
    total, low, high = 0.0, 1 - algorithm.clip.low, 1 + algorithm.clip.high
    lengths = [int(row.sum()) for row in batch.mask_BT]
    for i, n in enumerate(lengths):
        logp, old, ref = (x[i, :n].tolist() for x in (batch.logp_BT, batch.logp_old_BT, batch.logp_ref_BT))
        advantage, drift = float(batch.advantages_B[i]), sum(o - p for p, o in zip(logp, old, strict=True)) / n
        for p, o, r in zip(logp, old, ref, strict=True):
            w = math.exp(-drift) if algorithm.ratio == "sequence" else math.exp(p - o)
            gain = min(w * advantage, min(max(w, low), high) * advantage)
            gain = 0.0 if algorithm.opsm_delta is not None and advantage < 0 and drift > algorithm.opsm_delta else gain
            k3 = math.exp(r - p) - (r - p) - 1
            kl = {"unbiased": math.exp(p - o) * k3, "k3": k3, "k2": (p - r) ** 2 / 2, "k1": p - r}[algorithm.kl]
            share = {"sequence_mean": n * len(lengths), "token_mean": sum(lengths)}
            total += (algorithm.beta * kl - gain) / share.get(algorithm.aggregate, len(lengths) * max_new_tokens)
    return total


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=LABELS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_parity_with_a_ten_line_loop(algorithm, seed):
    batch = make_batch(seed=seed, aggregate=algorithm.aggregate, max_new_tokens=9, drift=0.8)
    loss, _ = grpo_loss(batch, algorithm)
    assert loss.item() == pytest.approx(ten_line_loop(batch, algorithm, 9), abs=1e-10)


def test_cut_rows_get_no_gradient_and_stay_counted():
    batch = make_batch()
    trained = torch.tensor([True, False, True, True, False, True])
    for aggregate in ("sequence_mean", "token_mean", "constant"):
        every = token_weights(batch.mask_BT, aggregate, max_new_tokens=9)
        some = token_weights(batch.mask_BT, aggregate, max_new_tokens=9, trained_B=trained)
        assert some[~trained].abs().max() == 0
        torch.testing.assert_close(some[trained], every[trained], atol=0, rtol=0)


def test_beta_without_reference_is_refused():
    batch = make_batch()
    bare = LossInputs(batch.logp_BT, batch.logp_old_BT, None, batch.mask_BT, batch.advantages_B, batch.weight_BT)
    with pytest.raises(ValueError, match="logp_ref_BT"):
        grpo_loss(bare, AlgorithmConfig(beta=0.1))
