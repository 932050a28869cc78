"""Numbers are written in one way each."""

from __future__ import annotations

import math

import pytest

from osler.report import format as fmt


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.84, "0.8 s"), (9.97, "10 s"), (41, "41 s"), (59.6, "1 min 00 s"), (252, "4 min 12 s"), (3599.6, "1 h 00 min"),
     (7500, "2 h 05 min"), (3 * 86400 + 4 * 3600, "3 d 4 h"), (math.nan, "–"), (-1, "–")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert fmt.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (2.1337, "2.134"), (21.337, "21.34"), (213.37, "213.4"), (2133.7, "2,134"), (0.02134, "0.0213"),
     (3e-4, "3.00e−4"), (-3e-4, "−3.00e−4"), (-1.5, "−1.500"), (1_234_567, "1.23M"), (math.inf, "–"),
     (9.1e29, "9.1e+29"), (-2e15, "−2.0e+15"), (9.1e14, "910T")],
)  # fmt: skip
def test_measurements(value: float, text: str) -> None:
    assert fmt.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1, "1"), (1273, "1,273"), (99_900, "99,900"), (123_456, "123k"), (999_999, "1.00M"), (4.56e9, "4.56B")],
)
def test_counts(value: float, text: str) -> None:
    assert fmt.count(value) == text


def test_fractions_and_differences() -> None:
    assert fmt.percent(0.6133) == "61.3%"
    assert fmt.percent(math.nan) == "–"
    assert fmt.points(0.041) == "+4.1"
    assert fmt.points(-0.041) == "−4.1"
    assert fmt.points(0.0001) == fmt.points(-0.0001) == "0.0"
    assert fmt.plural(1, "question") == "1 question"
    assert fmt.plural(1273, "question") == "1,273 questions"


@pytest.mark.parametrize(
    ("value", "step", "kind", "text"),
    [(0, 0.5, "number", "0"), (1.5, 0.5, "number", "1.5"), (1, 0.5, "number", "1.0"), (40_000, 20_000, "count", "40k"),
     (2_500_000, 500_000, "number", "2.5M"), (0.25, 0.25, "percent", "25%"), (0.025, 0.005, "percent", "2.5%"),
     (2e-4, 1e-4, "number", "2e−4"), (800, 200, "number", "800")],
)  # fmt: skip
def test_ticks(value: float, step: float, kind: str, text: str) -> None:
    assert fmt.tick(value, step, kind) == text
