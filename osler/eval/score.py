"""The score of an exam, with its confidence interval and its baselines.

One baseline is chance. The other always gives the best single letter, which is the cheapest gain for a model. Answers that
cannot be read or were cut, and questions that did not fit into the context, are counted and are wrong.

Items that ask for the same fact, or the same item under several option orders, are not independent. So the variance is computed
from the sums of ``clusters`` (a sandwich estimator corrected for few clusters). It says how many independent items the sample
is worth, and this effective size goes into Wilson's formula. A paired difference uses the variance itself. Sources: Wilson 1927;
Agresti and Min 2005 (adjusted interval for matched pairs); Cameron and Miller 2015 (clusters).
"""

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, comb, inf, sqrt
from statistics import NormalDist, fmean, stdev
from typing import Any

from osler.records.results import ExamScore, SampledAnswer
from osler.records.values import NAN
from osler.runtime.errors import UserError
from osler.tasks.answers import read_number
from osler.tasks.item import LETTERS, ExamItem, plain, render_answer, spelling, wording

ANSWERED = "answered"
UNPARSED = "unparsed"  # the completion ended by itself, but no single option (or number) can be read from it
CUT = "cut"  # the length limit came before a readable answer
TOO_LONG = "too_long"  # the question did not fit into the model's context
COVERAGES = (0.25, 0.5, 0.75)  # shares of the questions that are answered when the model skips those it is least sure of
BINS = 10  # intervals of confidence
STUDENT_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t at 0.975, of 2 to 10 values
Z_95 = NormalDist().inv_cdf(0.975)  # 95 % of a normal distribution lies within this many standard deviations of its mean


@dataclass(frozen=True)
class Result:
    """The result of one presentation of an item; ``item`` has its options in the order that was shown."""

    item: ExamItem
    status: str
    right: bool
    predicted: int | None = None  # the option's position as shown
    text: str = ""  # the answer as it was written
    thinking: str = ""  # the reasoning before it
    confidence: float | None = None  # the chosen option's share of the probability of all options; None: not known

    @property
    def cluster(self) -> str:
        """The group of results that depend on each other: those of one item, and those of the items of one cluster."""
        return self.item.cluster or f"item {self.item.id}"

    def sample(self, stage: str) -> SampledAnswer:
        """Return the answer as a line of a run's samples."""
        item = self.item
        shown = item.question, list(item.options), self.thinking, self.text, render_answer(item)
        confidence = NAN if self.confidence is None else self.confidence
        return SampledAnswer(item.id, stage, *shown, self.right, confidence, self.cluster)


@dataclass(frozen=True, kw_only=True)
class ScoredExam(ExamScore):
    """A score and the answers that it was computed from; ``settings`` are what decided how the questions were asked."""

    results: tuple[Result, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    is_kept: bool = True  # whether it goes into the run's records: a smaller exam does not replace a larger one


@dataclass(frozen=True)
class Difference:
    """``after - before`` on the same ``n`` items: the mean, and its interval."""

    mean: float
    interval: tuple[float, float]
    n: int


def summarise(results: Sequence[Result], *, max_seq_len: int = 0) -> ScoredExam:
    """Return the score of ``results``; ``max_seq_len`` is the model's context, for the remark about questions that did not fit.

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
            members.setdefault(result.item.group, []).append(result)
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
        measures=dict(_measures(results)),
        results=tuple(results),
    )


def _accuracy(results: Sequence[Result]) -> dict[str, Any]:
    right = [float(result.right) for result in results]
    interval = mean_interval(right, [result.cluster for result in results])
    return {"correct": int(sum(right)), "accuracy": sum(right) / len(right), "interval": interval}


def _measures(results: Sequence[Result]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield further measures by name: right in all option orders, pass@k and majority over several samples, calibration."""
    items: dict[str, list[Result]] = {}
    orders: dict[tuple[str, tuple[str, ...]], list[Result]] = {}
    for result in results:
        items.setdefault(result.item.id, []).append(result)
        orders.setdefault((result.item.id, result.item.options), []).append(result)
    if len(orders) > len(items):
        right = [float(all(result.right for result in own)) for own in items.values()]
        yield "right in all orders", _measure(right, [own[0].cluster for own in items.values()])
    clusters = [own[0].cluster for own in orders.values()]
    samples = min(map(len, orders.values()))
    for k in sorted({*(1 << power for power in range(1, samples.bit_length())), samples} - {1}):
        passed = [pass_at_k(len(own), sum(result.right for result in own), k) for own in orders.values()]
        yield f"pass@{k}", _measure(passed, clusters)
    if samples > 1:
        yield f"majority of {samples}", _measure([majority(own) for own in orders.values()], clusters)
    sure = [(result.confidence, result) for result in results if result.confidence is not None]
    yield from _calibration(sorted(sure, key=lambda pair: -pair[0]), len(results)) if sure else ()


def _calibration(sure: Sequence[tuple[float, Result]], asked: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the accuracy at each coverage and in each bin of confidence, and the expected calibration error.

    ``sure`` has the surest result first. A coverage of 25 % counts the surest quarter, and all results that tie with its last.
    """

    def measure(part: Sequence[tuple[float, Result]]) -> dict[str, Any]:
        return _measure([float(result.right) for _, result in part], [result.cluster for _, result in part])

    for share in COVERAGES:
        least = sure[min(ceil(share * asked), len(sure)) - 1][0]
        yield f"accuracy at {share:.0%} coverage", measure([pair for pair in sure if pair[0] >= least])
    error = 0.0
    for number in range(BINS):
        if part := [pair for pair in sure if min(int(pair[0] * BINS), BINS - 1) == number]:
            found = {**measure(part), "confidence": sum(confidence for confidence, _ in part) / len(part)}
            error += len(part) * abs(found["value"] - found["confidence"]) / len(sure)
            yield f"right when {100 * number // BINS}–{100 * (number + 1) // BINS}% sure", found
    yield "expected calibration error", {"value": error, "interval": (NAN, NAN), "n": len(sure)}


def _measure(values: Sequence[float], clusters: Sequence[str]) -> dict[str, Any]:
    return {"value": sum(values) / len(values), "interval": mean_interval(values, clusters), "n": len(values)}


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Return the unbiased estimate, from ``samples``, of the chance that any of ``k`` is right (Chen et al., 2021)."""
    return 1 - comb(samples - right, k) / comb(samples, k)


def majority(results: Sequence[Result]) -> float:
    """Return whether the answer that was given most often is right; on a tie, the share of the tied answers that are right.

    Numbers vote by their value, options and other texts as in the comparison with the right one. Unreadable answers do not vote.
    """
    votes = Counter(_vote(result) for result in results if result.status == ANSWERED)
    most = max(votes.values(), default=0)
    right = {_vote(result) for result in results if result.right}
    leaders = [vote for vote, count in votes.items() if count == most]
    return sum(vote in right for vote in leaders) / max(len(leaders), 1)


def _vote(result: Result) -> Hashable:
    if result.predicted is not None:
        return wording(result.item.options[result.predicted])
    if result.item.aliases:
        return spelling(result.text)
    number = read_number(result.text)
    return plain(result.text) if number is None else number


def describe_too_long(score: ExamScore) -> str:
    """Return a sentence on the questions that did not fit into the model's context; "" when all did or nothing is known."""
    if not 0 < score.too_long <= score.presentations:
        return ""
    room = f" of {score.max_seq_len:,.0f} tokens" if score.max_seq_len > 0 else ""
    counts = f"{score.too_long:,.0f} of {score.presentations:,.0f} questions"
    return f"{counts} did not fit into the model's context{room} and count as wrong."


def describe_cut(score: ExamScore) -> str:
    """Return a sentence on the answers that the length limit cut; "" when it cut at most one of twenty or nothing is known."""
    if not score.cut * 20 > score.presentations:
        return ""
    return f"{score.cut:,.0f} of {score.presentations:,.0f} answers were cut; max_new_tokens=N gives more room."


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


def mcnemar(gained: int, lost: int) -> float:
    """Return the p-value of McNemar's exact test for independent items: ``gained`` became right, ``lost`` became wrong."""
    changed = gained + lost
    return min(1.0, 2 * sum(comb(changed, count) for count in range(min(gained, lost) + 1)) / 2**changed)


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

    This size is never above the number of values. Where the variance is zero (all values alike), it is the number of clusters.
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


def mean_change(changes: Sequence[float]) -> Difference:
    """Return the mean of paired differences with Student's 95 % interval, which is infinite for a single pair.

    From eleven pairs on, ten pairs' quantile makes the interval a little too wide.
    """
    mean, count = fmean(changes), len(changes)
    if count < 2:
        return Difference(mean, (-inf, inf), count)
    half = STUDENT_95[min(count, 10) - 2] * stdev(changes) / sqrt(count)
    return Difference(mean, (mean - half, mean + half), count)


def _clustered_sum_of_squares(values: Sequence[float], clusters: Sequence[Hashable], centre: float) -> float:
    """Return n**2 times the variance of the mean: the sum of the clusters' squared sums of deviations, corrected."""
    totals: dict[Hashable, float] = dict.fromkeys(clusters, 0.0)
    for value, cluster in zip(values, clusters, strict=True):
        totals[cluster] += value
    counts, groups = Counter(clusters), len(totals)
    # G / (G - 1), but single items keep the textbook variance p (1 - p) / n, so that Wilson's own interval comes back exactly
    correction = groups / (groups - 1) if 1 < groups < len(values) else 1.0
    return correction * sum((total - counts[cluster] * centre) ** 2 for cluster, total in totals.items())
