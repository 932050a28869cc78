"""The mathematics of GRPO (arXiv 2402.03300) as pure functions of tensors: advantages of rewards, a loss of log-probabilities.

    w      = exp(logp - logp_old)                                          never detached
    kl     = w * (exp(logp_ref - logp) - (logp_ref - logp) - 1)            unbiased k3: value and gradient
    seq_kl = mean over the tokens of a completion of (logp_old - logp)     detached
    M      = 0 where A < 0 and seq_kl > delta, else 1                      off-policy sequence mask (OPSM)
    loss   = sum over tokens of weight * [-min(w * A, clip(w) * A) * M + beta * kl]

Source: DeepSeek-V3.2 (arXiv 2512.02556), section 3.1. Detaching ``w`` in the KL would leave its value and ruin its
gradient, because grad(w) = w * grad(logp) is what turns an average over samples into the gradient of the divergence.

All averaging is in ``weight_BT``, which :func:`token_weights` makes once for the whole update. Micro-batches take slices of it,
so their losses and gradients add up to the whole, however the rows are split. ``logp``, ``logp_old`` and ``logp_ref`` must be
at one temperature and over the same sampling mask.

Shapes: P prompts, G samples of a prompt; B completions, T their tokens, padded on the right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from osler.rl.config import AlgorithmConfig

# Keeps ``mean_std`` finite in a group whose rewards are nearly equal. TRL uses the same value.
STD_FLOOR = 1e-4


def group_advantages(
    rewards_PG: Tensor, kind: Literal["mean", "mean_std", "leave_one_out"] = "mean", *, valid_PG: Tensor | None = None
) -> Tensor:
    """Return the advantage of every sample over its group's baseline, shape ``[P, G]``, in the dtype of the rewards.

    "mean" subtracts the group mean; "mean_std" also divides by the group's standard deviation (n - 1 in its
    denominator); "leave_one_out" subtracts the mean of the *other* samples (RLOO, arXiv 2402.14740). Samples where
    ``valid_PG`` is False take no part in any statistic and get advantage 0. The only valid sample of a group gets 0 too.
    A group whose valid rewards are all equal gets exact zeros.
    """
    valid_PG = torch.ones_like(rewards_PG, dtype=torch.bool) if valid_PG is None else valid_PG
    kept_PG = torch.where(valid_PG, rewards_PG, 0.0)
    count_P1 = valid_PG.sum(dim=1, keepdim=True).to(rewards_PG.dtype)
    advantages_PG = torch.where(valid_PG, rewards_PG - kept_PG.sum(dim=1, keepdim=True) / count_P1.clamp(min=1), 0.0)
    others_P1 = (count_P1 - 1).clamp(min=1)
    if kind == "leave_one_out":
        advantages_PG = advantages_PG * count_P1 / others_P1
    elif kind == "mean_std":
        std_P1 = (advantages_PG.square().sum(dim=1, keepdim=True) / others_P1).sqrt()
        advantages_PG = advantages_PG / (std_P1 + STD_FLOOR)
    highest_P1 = rewards_PG.masked_fill(~valid_PG, float("-inf")).amax(dim=1, keepdim=True)
    lowest_P1 = rewards_PG.masked_fill(~valid_PG, float("inf")).amin(dim=1, keepdim=True)
    return torch.where(highest_P1 > lowest_P1, advantages_PG, 0.0)


@dataclass(frozen=True)
class LossInputs:
    """The inputs of the loss, all aligned to completions; values under a False mask are ignored.

    ``logp_BT`` carries the gradient; ``logp_old_BT`` is what the sampler returned when it drew the token; ``logp_ref_BT`` may be
    None when beta is 0. ``mask_BT`` is True on completion tokens, the end-of-text token included.
    """

    logp_BT: Tensor
    logp_old_BT: Tensor
    logp_ref_BT: Tensor | None
    mask_BT: Tensor
    advantages_B: Tensor
    weight_BT: Tensor


def token_weights(
    mask_BT: Tensor,
    aggregate: Literal["sequence_mean", "token_mean", "constant"],
    *,
    max_new_tokens: int,
    trained_B: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return how much every token of one whole update counts in its loss, shape ``[B, T]``.

    Rows where ``trained_B`` is False (cut completions under ``overlong: mask``) get weight 0 but stay in the denominators, as
    tokens masked by OPSM do, so that masking does not raise the weight of the rest.
    """
    mask = mask_BT.to(dtype)
    length_B1 = mask.sum(dim=1, keepdim=True)
    rows = (length_B1 > 0).sum().clamp(min=1)
    if aggregate == "sequence_mean":
        weight_BT = mask / length_B1.clamp(min=1) / rows
    elif aggregate == "token_mean":
        weight_BT = mask / mask.sum().clamp(min=1)
    else:
        weight_BT = mask / (rows * max_new_tokens)
    return weight_BT if trained_B is None else weight_BT * trained_B[:, None]


def grpo_loss(inputs: LossInputs, algorithm: AlgorithmConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss (a scalar to call backward on) and sums for the metrics.

    The sums are detached scalars on the device of the inputs (no host sync). Add up several micro-batches with
    :func:`add_sums`, and turn the result into means with :func:`loss_metrics`.
    """
    mask_BT, advantages_B1 = inputs.mask_BT, inputs.advantages_B[:, None]
    length_B = mask_BT.sum(dim=1).clamp(min=1)
    # The padding is filled and not multiplied by 0, so that even an infinity in it reaches neither value nor gradient.
    log_ratio_BT = (inputs.logp_BT - inputs.logp_old_BT).masked_fill(~mask_BT, 0.0)
    ratio_BT = log_ratio_BT.exp()
    seq_kl_B = -log_ratio_BT.detach().sum(dim=1) / length_B

    if algorithm.ratio == "sequence":
        policy_ratio_BT = (log_ratio_BT.sum(dim=1) / length_B).exp()[:, None].expand_as(ratio_BT)
    else:
        policy_ratio_BT = ratio_BT
    low, high = 1.0 - algorithm.clip.low, 1.0 + algorithm.clip.high
    surrogate_BT = -torch.minimum(policy_ratio_BT * advantages_B1, policy_ratio_BT.clamp(low, high) * advantages_B1)
    on_policy_B = torch.ones_like(inputs.advantages_B, dtype=torch.bool)
    if algorithm.opsm_delta is not None:
        on_policy_B = ~((inputs.advantages_B < 0) & (seq_kl_B > algorithm.opsm_delta))
    per_token_BT = surrogate_BT * on_policy_B[:, None]
    undrifted_BT = -advantages_B1 * on_policy_B[:, None]  # the surrogate with every ratio at 1

    kl_BT = torch.zeros_like(log_ratio_BT)
    if algorithm.beta > 0.0:
        if inputs.logp_ref_BT is None:
            raise ValueError("beta > 0 needs logp_ref_BT")
        log_ref_ratio_BT = (inputs.logp_ref_BT - inputs.logp_BT).masked_fill(~mask_BT, 0.0)
        kl_BT = kl_estimate(log_ref_ratio_BT, ratio_BT, algorithm.kl)
        per_token_BT = per_token_BT + algorithm.beta * kl_BT
    loss = (per_token_BT * inputs.weight_BT).sum()

    with torch.no_grad():
        clipped_low_BT = (policy_ratio_BT < low) & (advantages_B1 < 0) & mask_BT
        clipped_high_BT = (policy_ratio_BT > high) & (advantages_B1 > 0) & mask_BT
        row_B = mask_BT.any(dim=1)
        sums = {
            "loss": loss.detach(),
            "drift": ((per_token_BT.detach() - undrifted_BT) * inputs.weight_BT).sum(),
            "tokens": mask_BT.sum(),
            "rows": row_B.sum(),
            "kl": kl_BT.detach().sum(),
            "clip_low": clipped_low_BT.sum(),
            "clip_high": clipped_high_BT.sum(),
            "opsm_masked": (~on_policy_B & row_B).sum(),
            "seq_kl": (seq_kl_B * row_B).sum(),
            "approx_kl": kl_estimate(log_ratio_BT, ratio_BT, "k3").sum(),  # from the policy that drew the tokens to this one
            "logp_difference": log_ratio_BT.detach().abs().sum(),
            "logp_difference_max": log_ratio_BT.detach().abs().max(),
        }
    return loss, sums


def kl_estimate(log_ref_ratio_BT: Tensor, ratio_BT: Tensor, kind: Literal["unbiased", "k3", "k2", "k1"]) -> Tensor:
    """Return the per-token estimate of KL(policy || reference) from ``logp_ref - logp`` and the ratio ``w``."""
    k3_BT = log_ref_ratio_BT.exp() - log_ref_ratio_BT - 1.0
    if kind == "unbiased":
        return ratio_BT * k3_BT
    if kind == "k3":
        return k3_BT
    return 0.5 * log_ref_ratio_BT.square() if kind == "k2" else -log_ref_ratio_BT


def add_sums(total: dict[str, Tensor], part: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the sums of two disjoint sets of rows; keys that end in ``_max`` take the maximum."""
    if not total:
        return dict(part)
    return {
        name: torch.maximum(value, part[name]) if name.endswith("_max") else value + part[name] for name, value in total.items()
    }


def loss_metrics(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn the sums of one update into its metrics, under the names of ``monitor/metrics.py``; they stay on the device."""
    tokens, rows = sums["tokens"].clamp(min=1), sums["rows"].clamp(min=1)
    metrics = {
        "loss": sums["loss"],
        "loss/drift": sums["drift"],
        "kl": sums["kl"] / tokens,
        "clip_ratio/low_mean": sums["clip_low"] / tokens,
        "clip_ratio/high_mean": sums["clip_high"] / tokens,
        "opsm/masked_frac": sums["opsm_masked"] / rows,
        "opsm/seq_kl_mean": sums["seq_kl"] / rows,
        "approx_kl": sums["approx_kl"] / tokens,
        "sampling/sampling_logp_difference/mean": sums["logp_difference"] / tokens,
        "sampling/sampling_logp_difference/max": sums["logp_difference_max"],
    }
    if "entropy" in sums:
        metrics["entropy"] = sums["entropy"] / tokens
    return metrics
