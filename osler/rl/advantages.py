"""Advantages of completions against the other completions of their prompt (GRPO, arXiv 2402.03300).

Shapes: P prompts, G samples of a group.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

# Keeps ``mean_std`` finite in a group whose rewards are nearly equal; the value TRL uses.
STD_FLOOR = 1e-4


def group_advantages(
    rewards_PG: Tensor,
    kind: Literal["mean", "mean_std", "leave_one_out"] = "mean",
    *,
    valid_PG: Tensor | None = None,
) -> Tensor:
    """Return the advantage of every sample over its group's baseline, shape ``[P, G]``, in the dtype of the rewards.

    "mean" subtracts the group mean; "mean_std" also divides by the group's standard deviation (n - 1 in its
    denominator); "leave_one_out" subtracts the mean of the *other* samples (RLOO, arXiv 2402.14740). Samples where
    ``valid_PG`` is False take no part in any statistic and get advantage 0; so does the only valid sample of a group.
    A group whose valid rewards are all equal gets exact zeros.
    """
    valid_PG = torch.ones_like(rewards_PG, dtype=torch.bool) if valid_PG is None else valid_PG
    kept_PG = torch.where(valid_PG, rewards_PG, 0.0)
    count_P1 = valid_PG.sum(dim=1, keepdim=True).to(rewards_PG.dtype)
    centred_PG = torch.where(valid_PG, rewards_PG - kept_PG.sum(dim=1, keepdim=True) / count_P1.clamp(min=1), 0.0)
    others_P1 = (count_P1 - 1).clamp(min=1)
    if kind == "mean":
        advantages_PG = centred_PG
    elif kind == "leave_one_out":
        advantages_PG = centred_PG * count_P1 / others_P1
    elif kind == "mean_std":
        std_P1 = (centred_PG.square().sum(dim=1, keepdim=True) / others_P1).sqrt()
        advantages_PG = centred_PG / (std_P1 + STD_FLOOR)
    else:
        raise ValueError(f"unknown advantage {kind!r}")
    return torch.where(effective_groups(rewards_PG, valid_PG=valid_PG)[:, None], advantages_PG, 0.0)


def effective_groups(rewards_PG: Tensor, *, valid_PG: Tensor | None = None) -> Tensor:
    """Return which groups teach anything, bool ``[P]``: at least two valid samples whose rewards are not all equal."""
    if valid_PG is None:
        return rewards_PG.amax(dim=1) > rewards_PG.amin(dim=1)
    highest_P = rewards_PG.masked_fill(~valid_PG, float("-inf")).amax(dim=1)
    lowest_P = rewards_PG.masked_fill(~valid_PG, float("inf")).amin(dim=1)
    return highest_P > lowest_P
