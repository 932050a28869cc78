"""The score of an exam, with its confidence interval and its baselines.

The baselines are chance and the best constant letter on the same items, the cheapest way for a model to gain. Answers that cannot
be read, were cut or had no room are counted and are wrong.

Items that ask for the same fact, or the same item under several option orders, are not independent. So the variance is computed
from the sums of ``clusters`` (a sandwich estimator corrected for few clusters), which says how many independent items the sample
is worth, and that effective size goes into the closed formula. Sources: Wilson 1927; Agresti and Min 2005 (adjusted interval for
matched pairs); Cameron and Miller 2015 (clusters).
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist
from typing import Any

from osler.records.results import ExamScore, SampledAnswer
from osler.runtime.errors import UserError
from osler.tasks.item import LETTERS, ExamItem, render_answer

ANSWERED = "answered"
UNPARSED = "unparsed"  # the completion ended by itself, but no single option (or number) can be read from it
CUT = "cut"  # the length limit came before a readable answer
TOO_LONG = "too_long"  # the question did not fit into the model's context
Z_95 = NormalDist().inv_cdf(0.975)  # of a normal distribution, 95 % lies within so many deviations


@dataclass(frozen=True)
class Result:
    """The result of one presentation of an item; ``item`` has its options in the order that was shown."""

    item: ExamItem
    status: str
    right: bool
    predicted: int | None = None  # the option's position as shown
    text: str = ""  # the answer as it was written
    thinking: str = ""  # the reasoning before it

    @property
    def cluster(self) -> str:
        """The group of results that depend on each other: those of one item, and those of items that ask for one fact."""
        return f"group {self.item.group}" if "/" in self.item.group else f"item {self.item.id}"

    def sample(self, stage: str) -> SampledAnswer:
        """Return the answer as a line of a run's samples."""
        item = self.item
        return SampledAnswer(
            item.id, stage, item.question, list(item.options), self.thinking, self.text, render_answer(item), self.right
        )


@dataclass(frozen=True, kw_only=True)
class ScoredExam(ExamScore):
    """A score and the answers that it was computed from."""

    results: tuple[Result, ...]


@dataclass(frozen=True)
class Difference:
    """``after - before`` on the same ``n`` items: the mean, and its interval."""

    mean: float
    interval: tuple[float, float]
    n: int


def summarise(results: Sequence[Result], *, max_seq_len: int = 0) -> ScoredExam:
    """Return the score of ``results``; ``max_seq_len`` says what a question may not have fitted into.

    Raises UserError when there are no results.
    """
    if not results:
        raise UserError("There are no items to score: the exam is empty.")
    count = len(results)
    options = [[result.item.is_right(index) for index in range(len(result.item.options))] for result in results]
    answers = Counter(index for each in options for index, is_right in enumerate(each) if is_right)
    constant, hits = min(answers.items(), key=lambda pair: (-pair[1], pair[0])) if answers else (None, 0)
    given = Counter(result.predicted for result in results)
    status = Counter(result.status for result in results)
    members: dict[str, list[Result]] = {}
    for result in results:
        if result.item.group:
            members.setdefault(result.item.group.split("/")[0], []).append(result)
    return ScoredExam(
        **_accuracy(results),
        n=len({result.item.id for result in results}),
        presentations=count,
        unparsed=status[UNPARSED],
        cut=status[CUT],
        too_long=status[TOO_LONG],
        max_seq_len=max_seq_len,
        letters={letter: given[index] for index, letter in enumerate(LETTERS[: max(map(len, options))])},
        constant_letter="" if constant is None else LETTERS[constant],
        constant_letter_baseline=hits / count,
        chance=sum(sum(each) / len(each) for each in options if each) / count,
        groups={name: {"n": len(own), **_accuracy(own)} for name, own in sorted(members.items())},
        results=tuple(results),
    )


def _accuracy(results: Sequence[Result]) -> dict[str, Any]:
    right = [float(result.right) for result in results]
    interval = mean_interval(right, [result.cluster for result in results])
    return {"correct": int(sum(right)), "accuracy": sum(right) / len(right), "interval": interval}


def describe_too_long(score: ExamScore) -> str:
    """Return a sentence on the questions that did not fit into the model's context; "" when all did or nothing is known."""
    if not 0 < score.too_long <= score.presentations:
        return ""
    room = f" of {score.max_seq_len:,.0f} tokens" if score.max_seq_len > 0 else ""
    counts = f"{score.too_long:,.0f} of {score.presentations:,.0f} questions"
    return f"{counts} did not fit into the model's context{room} and count as wrong."


def compare(before: ScoredExam, after: ScoredExam) -> Difference:
    """Return the gain from ``before`` to ``after``, paired item by item; an item's presentations are averaged first.

    Raises UserError when the two were not scored on the same items.
    """
    early, late = _by_item(before), _by_item(after)
    if early.keys() != late.keys():
        raise UserError(
            f"The two scores are of different items ({len(early.keys() - late.keys())} only in the first, "
            f"{len(late.keys() - early.keys())} only in the second): score both models on the same exam."
        )
    clusters = {result.item.id: result.cluster for result in before.results}
    return paired_difference(list(early.values()), [late[name] for name in early], [clusters[name] for name in early])


def _by_item(score: ScoredExam) -> dict[str, float]:
    shown: dict[str, list[bool]] = {}
    for result in score.results:
        shown.setdefault(result.item.id, []).append(result.right)
    return {name: sum(right) / len(right) for name, right in shown.items()}


# -- confidence intervals ----------------------------------------------------------------------------------------------


def wilson(correct: float, n: float) -> tuple[float, float]:
    """Return Wilson's 95 % score interval for ``correct`` among ``n``, which may be an effective, fractional size."""
    if n <= 0 or not 0 <= correct <= n:
        raise ValueError(f"{correct} correct of {n} is not a proportion")
    z, p = Z_95, correct / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # at the ends the formula is exactly 0 or 1; rounding must not take the interval past the score
    return (0.0 if correct == 0 else max(0.0, centre - half), 1.0 if correct == n else min(1.0, centre + half))


def mean_interval(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> tuple[float, float]:
    """Return Wilson's interval for the mean of ``values`` in [0, 1], at the effective sample size that the clusters leave.

    That is at most the number of values, and the number of clusters where the variance is zero (all right or all wrong).
    """
    if not values:
        raise ValueError("no items: a mean of nothing has no interval")
    p = sum(values) / len(values)
    clusters = range(len(values)) if clusters is None else clusters
    variance = _clustered_sum_of_squares(values, clusters, p) / len(values) ** 2
    groups = len(set(clusters))
    # the variance of a single cluster is zero, whatever rounding makes of it
    known = groups > 1 and variance > 1e-18
    size = min(float(len(values)), p * (1 - p) / variance) if known else float(groups)
    return wilson(min(p, 1.0) * size, size)


def paired_difference(before: Sequence[float], after: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Difference:
    """Return the change of a score in [0, 1] between two models on the same items, in the same order.

    The interval adds half an item to each of the four cells right/wrong by right/wrong (Agresti and Min), so it stays wide when
    the two models hardly ever disagree; ``mean`` is the plain difference.
    """
    changes = [late - early for early, late in zip(before, after, strict=True)]
    clusters = range(len(changes)) if clusters is None else clusters
    size = len(changes) + 2
    centre = sum(changes) / size
    squares = _clustered_sum_of_squares(changes, clusters, centre)
    squares += 0.5 * (1 - centre) ** 2 + 0.5 * (1 + centre) ** 2 + centre**2
    half = Z_95 * sqrt(squares) / size
    return Difference(sum(changes) / len(changes), (max(-1.0, centre - half), min(1.0, centre + half)), len(changes))


def _clustered_sum_of_squares(values: Sequence[float], clusters: Sequence[Hashable], centre: float) -> float:
    """Return n**2 times the variance of the mean: the sum of the clusters' squared sums of deviations, corrected."""
    totals: dict[Hashable, float] = dict.fromkeys(clusters, 0.0)
    for value, cluster in zip(values, clusters, strict=True):
        totals[cluster] += value
    counts, groups = Counter(clusters), len(totals)
    # G / (G - 1), but single items keep the textbook variance p (1 - p) / n, so that Wilson's own interval comes back exactly
    correction = groups / (groups - 1) if 1 < groups < len(values) else 1.0
    return correction * sum((total - counts[cluster] * centre) ** 2 for cluster, total in totals.items())
