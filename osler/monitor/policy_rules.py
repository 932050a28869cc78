"""The rules for GRPO: what goes wrong with a policy that learns from rewards. ``rules.py`` says what a rule is. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median
from string import ascii_uppercase

from osler.monitor.history import ALL_EQUAL, CUT, ENTROPY, LETTERS, LOGP_DIFFERENCE, REWARD, History
from osler.monitor.rules import Finding

CUT_SHARE = 0.9  # above this share of cut completions something is wrong with the template or the limit
FINE_CUT_SHARE = 0.5  # below this share in a run's first lines the template and the limit were right
LINES = 20  # of the medians below
EQUAL_SHARE = 0.8  # of the groups
VARIED, SILENT = 0.2, 0.02  # nats per token: an entropy to begin with, and one of a policy that has stopped exploring
SAMPLER_GAP = 0.02  # nats per token by which sampler and trainer differ
ONE_LETTER = 0.7  # of the answers


def cut(past: History) -> Iterator[Finding]:
    """Hardly a completion ends by itself. When most did at first, the steps since have broken the model."""
    if past.line[CUT] > CUT_SHARE:
        least = min(past.first[CUT])
        cause = (
            f", where at first it were {least:.0%}. The learning rate is probably too high: go back to a checkpoint from before "
            f"and try {past.settings.slower}."
            if least < FINE_CUT_SHARE
            else ". Either algorithm.max_new_tokens is too small, or the model never learned to end (was it fine-tuned with the "
            "chat template?)."
        )
        yield Finding(
            "cut-completions",
            f"{past.line[CUT]:.0%} of the completions were cut at {past.settings.max_new_tokens} tokens{cause}",
        )


def unrewarded(past: History) -> Iterator[Finding]:
    """No reward for so many steps that it cannot be chance. When there was some at first, the model has lost it."""
    if past.without_reward >= past.settings.zero_reward_patience:
        most = max(past.first[REWARD])
        cause = (
            f"At first the mean reward was {most:.2g}, so the learning rate is probably too high: go back to a checkpoint from "
            f"before and try {past.settings.slower}."
            if most > 0.0
            else "Look at samples.jsonl in the run folder, and start from a model that is right now and then."
        )
        yield Finding(
            "no-reward",
            f"no completion earned a reward for {past.without_reward} steps; there is nothing to learn from. {cause}",
        )


def equal_rewards(past: History) -> Iterator[Finding]:
    """Most groups have equal rewards, and so no gradient. (Groups without any reward are another rule's.)"""
    shares = past.last(ALL_EQUAL, LINES)
    if len(shares) == LINES and median(shares) > EQUAL_SHARE and not past.without_reward:
        yield Finding(
            "equal-rewards",
            f"in most of the last {LINES} lines more than {EQUAL_SHARE:.0%} of the groups had equal rewards and taught nothing. "
            f"Replace them ({past.settings.section}algorithm.dynamic_sampling=true), or ask what the model gets right about half "
            "the time.",
        )


def silent(past: History) -> Iterator[Finding]:
    """The policy always says the same."""
    entropies = past.last(ENTROPY, LINES)
    if len(entropies) == LINES and max(past.first[ENTROPY]) > VARIED and median(entropies) < SILENT:
        yield Finding(
            "no-exploration",
            f"the entropy has fallen from {max(past.first[ENTROPY]):.2f} to {median(entropies):.3f}: the policy has stopped "
            f"exploring, and can learn nothing new. Go back to a checkpoint from before and try {past.settings.slower}.",
        )


def sampler_apart(past: History) -> Iterator[Finding]:
    """Sampler and trainer do not agree about the policy."""
    gaps = past.last(LOGP_DIFFERENCE, LINES)
    if len(gaps) == LINES and median(gaps) > SAMPLER_GAP:
        yield Finding(
            "sampler-apart",
            f"sampler and trainer differ by {median(gaps):.3f} in the log-probability of a token, and the ratios of the loss are "
            f"off by that much. Both compute alike with {past.settings.section}precision=fp32.",
            median(gaps),
        )


def one_letter(past: History) -> Iterator[Finding]:
    """One letter takes over, although the options are shuffled."""
    shares = {letter: past.last(name, LINES) for letter, name in zip(ascii_uppercase, LETTERS, strict=True) if name in past.line}
    for letter, values in shares.items():
        if len(shares) > 2 and len(values) == LINES and median(values) > ONE_LETTER:
            yield Finding(
                "one-letter",
                f"{median(values):.0%} of the completions of the last {LINES} lines answered {letter}, and the options are "
                f"shuffled: that is a habit, not knowledge. Go back to a checkpoint from before and try {past.settings.slower}.",
            )


POLICY_RULES: tuple[tuple[str, Callable[[History], Iterator[Finding]]], ...] = (
    (CUT, cut),
    (REWARD, unrewarded),
    (ALL_EQUAL, equal_rewards),
    (ENTROPY, silent),
    (LOGP_DIFFERENCE, sampler_apart),
    (LETTERS[0], one_letter),
)
