"""Intervals against published values, against each other, and against simulation."""

from __future__ import annotations

import random

import pytest

from osler.eval.score import mean_interval, paired_difference, wilson


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson_gives_the_published_values(correct: int, n: int, low: float, high: float) -> None:
    assert wilson(correct, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_ends_contain_the_score_and_refuse_nonsense() -> None:
    assert wilson(0, 7)[0] == 0.0 and wilson(7, 7)[1] == 1.0
    narrow, wide = wilson(50, 100, confidence=0.5), wilson(50, 100, confidence=0.99)
    assert wide[0] < narrow[0] < 0.5 < narrow[1] < wide[1]
    for correct, n in [(1, 0), (3, 2), (-1, 2)]:
        with pytest.raises(ValueError):
            wilson(correct, n)


def test_independent_values_give_plain_wilson() -> None:
    values = [1.0] * 37 + [0.0] * 63
    assert mean_interval(values) == pytest.approx(wilson(37, 100))
    assert mean_interval(values, list(range(100))) == pytest.approx(wilson(37, 100))


def test_copies_of_an_item_are_worth_one_item() -> None:
    values = [1.0] * 37 + [0.0] * 63
    copied = [value for value in values for _ in range(4)]
    items = [index for index in range(100) for _ in range(4)]
    low, high = mean_interval(copied, items)
    assert (low, high) == pytest.approx(wilson(37, 100), abs=0.001)
    assert mean_interval([1.0] * 40, [i // 4 for i in range(40)]) == wilson(10, 10)
    with pytest.raises(ValueError):
        mean_interval([])


def test_clustered_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = random.Random(5)
    covered = plain = 0
    for _ in range(400):
        values, clusters = [], []
        for cluster in range(60):
            ability = rng.betavariate(1.2, 0.8)  # mean 0.6, strongly shared inside a cluster
            for _ in range(5):
                values.append(float(rng.random() < ability))
                clusters.append(cluster)
        low, high = mean_interval(values, clusters)
        covered += low <= 0.6 <= high
        low, high = mean_interval(values)
        plain += low <= 0.6 <= high
    assert 0.92 <= covered / 400 <= 0.985
    assert plain / 400 < 0.88  # ignoring the clusters would be wrong


def test_paired_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = random.Random(6)
    covered = 0
    for _ in range(600):
        before, after = [], []
        for _ in range(120):
            draw = rng.random()  # both right 0.5, gained 0.2, lost 0.1, both wrong 0.2: true gain 0.1
            before.append(float(draw < 0.5 or 0.7 <= draw < 0.8))
            after.append(float(draw < 0.7))
        low, high = paired_difference(before, after).interval
        covered += low <= 0.1 <= high
    assert 0.93 <= covered / 600 <= 0.975


def test_paired_clustered_interval_covers_the_truth() -> None:
    rng = random.Random(7)
    covered = plain = 0
    for _ in range(400):
        before, after, clusters = [], [], []
        for cluster in range(50):
            learned = rng.random() < 0.3  # a fact is learned as a whole: 30 % of the facts go from 0 to 1
            for _ in range(6):
                before.append(0.0)
                after.append(float(learned))
                clusters.append(cluster)
        result = paired_difference(before, after, clusters)
        covered += result.interval[0] <= 0.3 <= result.interval[1]
        unaware = paired_difference(before, after).interval
        plain += unaware[0] <= 0.3 <= unaware[1]
    assert 0.90 <= covered / 400 <= 0.985
    assert plain / 400 < 0.75


def test_paired_difference_counts_what_changed() -> None:
    result = paired_difference([1, 1, 0, 0, 0], [1, 0, 1, 1, 0])
    assert (result.mean, result.n, result.gained, result.lost, result.clusters) == (0.2, 5, 2, 1, 5)
    assert result.interval[0] < 0 < 0.2 < result.interval[1]
    same = paired_difference([1.0] * 50, [1.0] * 50)
    assert same.mean == 0 and same.interval[0] < 0 < same.interval[1]  # no disagreement is not certainty
    with pytest.raises(ValueError, match="same items"):
        paired_difference([1.0], [1.0, 0.0])


def bootstrap(values: list[float], clusters: list[int], resamples: int = 2000) -> tuple[float, float]:
    """The slower route to the same interval: draw whole clusters with replacement and take percentiles of the mean."""
    rng = random.Random(0)
    groups = [[value for value, mine in zip(values, clusters, strict=True) if mine == one] for one in dict.fromkeys(clusters)]
    means = []
    for _ in range(resamples):
        drawn = [value for group in rng.choices(groups, k=len(groups)) for value in group]
        means.append(sum(drawn) / len(drawn))
    means.sort()
    return means[resamples // 40], means[resamples - 1 - resamples // 40]


def test_bootstrap_agrees_with_the_formula() -> None:
    rng = random.Random(8)
    values = [float(rng.random() < 0.4) for _ in range(400)]
    clusters = [index // 4 for index in range(400)]
    assert bootstrap(values, list(range(400))) == pytest.approx(mean_interval(values), abs=0.012)
    assert bootstrap(values, clusters) == pytest.approx(mean_interval(values, clusters), abs=0.012)
    changes = [float(rng.random() < 0.3) - float(rng.random() < 0.15) for _ in range(400)]
    formula = paired_difference([0.0] * 400, changes, clusters).interval
    assert bootstrap(changes, clusters) == pytest.approx(formula, abs=0.015)
