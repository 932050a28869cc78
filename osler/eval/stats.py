"""Confidence intervals for scores: of one proportion, and of the difference of two models on the same items.

Items that ask for the same fact, or the same item under several option orders, are not independent. Every function therefore
takes ``clusters``: the variance is computed from the clusters' sums (a sandwich estimator with the usual correction for few
clusters). It says how many independent items the sample is worth, and that effective size goes into the closed formula. A test
compares the intervals with those of a bootstrap.

Sources: Wilson 1927; Agresti and Min 2005 (adjusted interval for matched pairs); Cameron and Miller 2015 (clusters).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist


def wilson(correct: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval for ``correct`` among ``n``, which may be an effective, fractional size."""
    if n <= 0 or not 0 <= correct <= n:
        raise ValueError(f"{correct} correct of {n} is no proportion")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = correct / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # at the ends the formula is exactly 0 or 1; rounding must not take the interval past the score
    return (0.0 if correct == 0 else max(0.0, centre - half), 1.0 if correct == n else min(1.0, centre + half))


def mean_interval(
    values: Sequence[float], clusters: Sequence[Hashable] | None = None, confidence: float = 0.95
) -> tuple[float, float]:
    """Return Wilson's interval for the mean of ``values`` in [0, 1], at the effective sample size that the clusters leave.

    The effective size is at most the number of values, and the number of clusters where the variance is zero (all right
    or all wrong).
    """
    p = _mean(values)
    clusters = range(len(values)) if clusters is None else clusters
    variance = _clustered_sum_of_squares(values, clusters, p) / len(values) ** 2
    groups = len(set(clusters))
    # one cluster has no variance of its own, whatever rounding leaves of zero
    known = groups > 1 and variance > 1e-18
    size = min(float(len(values)), p * (1 - p) / variance) if known else float(groups)
    return wilson(min(p, 1.0) * size, size, confidence)


@dataclass(frozen=True)
class Difference:
    """``after - before`` on the same items: the mean, its interval, and how many items were gained and lost."""

    mean: float
    interval: tuple[float, float]
    n: int
    clusters: int
    gained: int
    lost: int


def paired_difference(
    before: Sequence[float],
    after: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> Difference:
    """Return the change of a score in [0, 1] between two models on the same items, in the same order.

    The interval adds half an item to each of the four cells right/wrong by right/wrong (Agresti and Min), so it stays
    wide when the two models hardly ever disagree; ``mean`` is the plain difference.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} scores before and {len(after)} after: they must be the same items")
    changes = [late - early for early, late in zip(before, after, strict=True)]
    clusters = range(len(changes)) if clusters is None else clusters
    mean = _mean(changes)
    size = len(changes) + 2
    centre = sum(changes) / size
    squares = _clustered_sum_of_squares(changes, clusters, centre)
    squares += 0.5 * (1 - centre) ** 2 + 0.5 * (1 + centre) ** 2 + centre**2
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * sqrt(squares) / size
    return Difference(
        mean=mean,
        interval=(max(-1.0, centre - half), min(1.0, centre + half)),
        n=len(changes),
        clusters=len(set(clusters)),
        gained=sum(change > 0 for change in changes),
        lost=sum(change < 0 for change in changes),
    )


def _mean(values: Sequence[float]) -> float:
    if not values:
        raise ValueError("no items: a mean of nothing has no interval")
    return sum(values) / len(values)


def _by_cluster(values: Sequence[float], clusters: Sequence[Hashable]) -> dict[Hashable, tuple[float, int]]:
    """Return the sum and the count of every cluster."""
    sums: dict[Hashable, tuple[float, int]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        total, count = sums.get(cluster, (0.0, 0))
        sums[cluster] = (total + value, count + 1)
    return sums


def _clustered_sum_of_squares(values: Sequence[float], clusters: Sequence[Hashable], centre: float) -> float:
    """Return n**2 times the variance of the mean: the sum of the clusters' squared sums of deviations, corrected."""
    sums = _by_cluster(values, clusters)
    groups = len(sums)
    # G / (G - 1), but single items keep the textbook variance p (1 - p) / n, so that Wilson's own interval comes back exactly
    correction = groups / (groups - 1) if 1 < groups < len(values) else 1.0
    return correction * sum((total - count * centre) ** 2 for total, count in sums.values())
