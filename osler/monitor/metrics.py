"""What every logged number means: one table, name -> (unit, meaning).

A name in angle brackets stands for any run of letters, digits, `_`, `-` and `.`: `eval/<split>_accuracy` declares
`eval/test_accuracy`. Names of reinforcement learning are TRL's, so that people find them; the report takes its
units and its captions from here, and a test holds the code to the table. Fractions run from 0 to 1.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Metric(NamedTuple):
    """One row of the table: the unit a value is in, and what the value says."""

    unit: str
    meaning: str


METRICS: dict[str, Metric] = {
    # training: pretraining, mid-training, supervised fine-tuning
    "train/loss": Metric("nats/token", "mean cross-entropy of the batch's labelled tokens"),
    "train/lr": Metric("per step", "learning rate of the first parameter group"),
    "train/grad_norm": Metric("norm", "length of the whole gradient before clipping"),
    "train/skipped_steps": Metric("steps", "updates skipped since the line before, because the gradient was not finite"),
    "train/stage": Metric("number", "stage of the curriculum, counted from 1"),
    "train/seq_len": Metric("tokens", "length of the rows of this stage"),
    "train/batch_tokens": Metric("tokens", "tokens in one optimizer step of this stage"),
    # evaluation: never trained on
    "eval/loss": Metric("nats/token", "mean cross-entropy on held-out text"),
    "eval/bits_per_byte": Metric("bits/byte", "held-out loss per byte of text, comparable across tokenizers"),
    "eval/<split>_accuracy": Metric("fraction", "exam questions of the split answered correctly"),
    "eval/<split>_unparsed_frac": Metric("fraction", "exam answers of the split without a readable letter"),
    "eval/seconds": Metric("s", "time this evaluation took"),
    # speed and memory
    "perf/tokens_per_second": Metric("tokens/s", "training tokens through the optimizer, all devices together"),
    "perf/step_seconds": Metric("s", "wall time of one optimizer step"),
    "perf/rollout_tokens_per_second": Metric("tokens/s", "completion tokens sampled per second of sampling"),
    "perf/train_tokens_per_second": Metric("tokens/s", "tokens trained on per second of training, sampling excluded"),
    "perf/rollout_frac": Metric("fraction", "share of the step's time spent sampling"),
    # reinforcement learning (GRPO), TRL's names
    "loss": Metric("objective", "GRPO loss; its level means little, its trend less"),
    "reward": Metric("reward", "mean total reward of the batch's completions"),
    "reward_std": Metric("reward", "spread of the reward inside a group, averaged over groups"),
    "frac_reward_zero_std": Metric("fraction", "groups whose rewards are all equal, which teach nothing"),
    "rewards/<name>/mean": Metric("reward", "mean of one reward function"),
    "rewards/<name>/std": Metric("reward", "spread of one reward function"),
    "kl": Metric("nats/token", "distance of the policy from the frozen reference"),
    "entropy": Metric("nats/token", "how undecided the policy is about the next token"),
    "clip_ratio/low_mean": Metric("fraction", "tokens clipped at the lower bound of the probability ratio"),
    "clip_ratio/high_mean": Metric("fraction", "tokens clipped at the upper bound of the probability ratio"),
    "completions/mean_length": Metric("tokens", "mean length of a completion"),
    "completions/min_length": Metric("tokens", "shortest completion of the batch"),
    "completions/max_length": Metric("tokens", "longest completion of the batch"),
    "completions/clipped_ratio": Metric("fraction", "completions cut at the length limit before they ended"),
    "sampling/sampling_logp_difference/mean": Metric("nats", "gap between sampler's and trainer's log-prob, mean"),
    "sampling/sampling_logp_difference/max": Metric("nats", "gap between sampler's and trainer's log-prob, largest"),
    # reinforcement learning, ours
    "opsm/masked_frac": Metric("fraction", "completions whose surrogate the off-policy sequence mask removed"),
    "opsm/seq_kl_mean": Metric("nats/token", "mean over completions of old minus current log-prob"),
    "groups/effective": Metric("groups", "groups of the batch whose rewards differ, so that they teach"),
    "filters/<name>_frac": Metric("fraction", "completions that the named sample-quality filter caught"),
    "answer/letter_<X>_frac": Metric("fraction", "readable answers that chose this letter"),
    "answer/format_ok": Metric("fraction", "completions with a readable answer"),
    "answer/correct_frac": Metric("fraction", "completions with the right answer"),
    "tasks/<name>/reward": Metric("reward", "mean total reward on one task"),
    "tasks/<name>/correct_frac": Metric("fraction", "completions on one task with the right answer"),
}

_PATTERNS: list[tuple[re.Pattern[str], str]] = [
    (re.compile(re.sub(r"<\w+>", r"[\\w.\\-]+", name)), name) for name in METRICS if "<" in name
]


def declared_name(name: str) -> str | None:
    """The row of `METRICS` that declares a metric (itself, or the pattern it fits), or None."""
    if name in METRICS:
        return name
    return next((row for pattern, row in _PATTERNS if pattern.fullmatch(name)), None)


def describe(name: str) -> Metric | None:
    """Unit and meaning of a metric as it appears in a log, or None when the table does not declare it."""
    row = declared_name(name)
    return METRICS[row] if row is not None else None
