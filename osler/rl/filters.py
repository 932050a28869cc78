"""Filters of samples and groups: which completions are bad samples, what becomes of them, and which groups teach
nothing.

The sample-quality filter is separate from the reward: it looks at the form of a completion (is it empty, does it run in
circles, does it hold an answer that can be read) and never at whether the answer is right. Plain Python, no state.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from osler.rl.config import AlgorithmConfig, QualityConfig

Verdict = Literal["ok", "empty", "degenerate", "no_answer"]
BAD_VERDICTS: tuple[Verdict, ...] = ("empty", "degenerate", "no_answer")


class Filtered(NamedTuple):
    """What the filters made of a sample: its reward, whether it stays in its group, whether its tokens get gradient."""

    reward: float
    stays: bool
    trained: bool


def check_sample(completion_ids: Sequence[int], *, text_is_empty: bool, has_answer: bool, quality: QualityConfig) -> Verdict:
    """Return the first reason why a completion is a bad sample, or "ok".

    ``completion_ids`` without the end-of-text token; ``has_answer`` says that an answer could be parsed, right or
    wrong.
    """
    if not completion_ids or text_is_empty:
        return "empty"
    long_enough = len(completion_ids) >= quality.min_tokens
    if long_enough and repeated_ngram_frac(completion_ids, quality.ngram) > quality.max_repeated_frac:
        return "degenerate"
    if quality.require_answer and not has_answer:
        return "no_answer"
    return "ok"


def repeated_ngram_frac(ids: Sequence[int], ngram: int) -> float:
    """Return the fraction of the n-grams of ``ids`` that occurred before in it, in [0, 1); 0 when there is none."""
    count = len(ids) - ngram + 1
    if count <= 0:
        return 0.0
    return 1.0 - len({tuple(ids[i : i + ngram]) for i in range(count)}) / count


def apply_filters(reward: float, verdict: Verdict, finished: bool, algorithm: AlgorithmConfig) -> Filtered:
    """Apply the quality action, then the overlong rule, to the raw reward of one sample.

    A dropped sample leaves its group: it is in no statistic, no loss and no denominator. A cut sample under
    ``overlong: mask`` stays in the baseline and the denominators and gets no gradient.
    """
    action = algorithm.quality.action
    bad = verdict != "ok" and action != "off"
    reward = 0.0 if bad else reward
    if not finished and algorithm.overlong == "penalise":
        reward -= algorithm.overlong_penalty
    stays = not (bad and action == "drop")
    return Filtered(reward, stays, trained=stays and (finished or algorithm.overlong != "mask"))


def all_equal(rewards: Iterable[float]) -> bool:
    """Say whether the rewards of a group's staying samples are all equal, so that nothing can be learned from it."""
    return len(set(rewards)) < 2


def letter_fractions(letters: Iterable[int | None], num_letters: int) -> dict[str, float]:
    """Return the share of every answered letter among the answers that could be read: the "always C" alarm."""
    read = [letter for letter in letters if letter is not None]
    return {f"answer/letter_{chr(ord('A') + index)}_frac": read.count(index) / max(1, len(read)) for index in range(num_letters)}
