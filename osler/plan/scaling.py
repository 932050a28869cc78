"""How many bits per byte a model ends at, from its parameters and the tokens that it learns, fitted on Osler's own small runs.

    bits per byte = E + A / parameters^alpha + B / tokens^beta        (the form of Hoffmann et al. 2022, arXiv 2203.15556)

Parameters are those of matrices and head, which FLOPs are counted of. ``benchmarks/scaling_fit.py`` makes the runs and writes the
fit to ``scaling_fit.json``, with fits of the runs drawn again with replacement (bootstrap), from which an interval follows. Far
from the runs the interval grows; where it is wider than ``WIDEST``, or the runs are farther away than ``FARTHEST``, the fit tells
nothing. Without the file there is no fit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from osler.config.schema import config, decode
from osler.model.config import ModelConfig
from osler.plan.estimate import Estimate

FIT_FILE = Path(__file__).with_name("scaling_fit.json")
EXPONENTS = tuple(number / 100 for number in range(4, 121, 4))  # that are tried for parameters and tokens
INTERVAL = (0.05, 0.95)  # of the bootstrap's predictions
WIDEST = 0.25  # share of the value; a wider interval tells nothing
FARTHEST = 1000.0  # times beyond the runs; the bootstrap does not know whether the formula still holds there
SOURCE = "fitted on Osler's own small runs (scaling_fit.py)"


class Point(NamedTuple):
    """The end of a run."""

    parameters: float  # of matrices and head
    tokens: float
    bits_per_byte: float


class Curve(NamedTuple):
    """One fit of the formula."""

    floor: float  # E
    of_parameters: float  # A
    alpha: float
    of_tokens: float  # B
    beta: float

    def at(self, parameters: float, tokens: float) -> float:
        """Return the bits per byte at the end of a run."""
        return self.floor + self.of_parameters * parameters**-self.alpha + self.of_tokens * tokens**-self.beta


@dataclass(frozen=True)
class Fit:
    """The fit of all runs, fits of the runs drawn again, and the ranges of parameters and tokens of the runs."""

    curve: Curve
    drawn: tuple[Curve, ...]
    parameters: tuple[float, float]
    tokens: tuple[float, float]

    def at(self, parameters: float, tokens: float) -> Estimate:
        """Return the bits per byte at the end of a run, with the interval of the bootstrap."""
        values = sorted(curve.at(parameters, tokens) for curve in self.drawn)
        low, high = (values[min(len(values) - 1, int(share * len(values)))] for share in INTERVAL)
        value = self.curve.at(parameters, tokens)
        return Estimate(min(low, value), value, max(high, value), SOURCE)

    def beyond(self, parameters: float, tokens: float) -> float:
        """Return how many times as far from the runs a point is, in the farther of its two numbers; 1 among the runs."""
        ranges = ((parameters, self.parameters), (tokens, self.tokens))
        return max(1.0, *(max(number / high, low / number) for number, (low, high) in ranges))


def tells(estimate: Estimate, beyond: float) -> bool:
    """Return whether an interval is narrow enough, and its place near enough to the runs, to say anything."""
    return estimate.high - estimate.low <= WIDEST * estimate.value and beyond <= FARTHEST


def counted_parameters(model: ModelConfig) -> float:
    """Return the parameters of matrices and head, by which the fit counts."""
    return (model.flops_per_token(0)) / 6


def fit_points(points: Sequence[Point], draws: int, seed: int = 0) -> Fit:
    """Fit the formula to the ends of runs by least squares of relative errors, and to ``draws`` samples of them.

    Raises ValueError for fewer than five points, or for points of one size or one length.
    """
    import numpy as np

    if len(points) < 5 or len({one.parameters for one in points}) < 2 or len({one.tokens for one in points}) < 2:
        raise ValueError(f"{len(points)} runs are too few for a fit: it needs five, of several sizes and lengths")
    random = np.random.default_rng(seed)
    number = len(points)
    samples = [np.arange(number), *(random.integers(0, number, number) for _ in range(draws))]
    curves = [_least_squares(points, np.bincount(sample, minlength=number)) for sample in samples]
    sizes, lengths = sorted(one.parameters for one in points), sorted(one.tokens for one in points)
    return Fit(curves[0], tuple(curves[1:]), (sizes[0], sizes[-1]), (lengths[0], lengths[-1]))


def _least_squares(points: Sequence[Point], counts: Any) -> Curve:
    """Return the best curve over ``EXPONENTS``; for two exponents the rest is linear, and its coefficients are not negative."""
    import numpy as np

    table = np.array(points)
    sizes, lengths, values = table.T
    root = np.sqrt(counts) / values
    best, found = math.inf, Curve(float(np.average(values, weights=counts)), 0.0, EXPONENTS[0], 0.0, EXPONENTS[0])
    of_size = {exponent: sizes**-exponent for exponent in EXPONENTS}
    of_length = {exponent: lengths**-exponent for exponent in EXPONENTS}
    ones = np.ones_like(values)
    for alpha, size in of_size.items():
        for beta, length in of_length.items():
            columns = np.stack([ones, size, length], axis=1)
            solved, *_ = np.linalg.lstsq(columns * root[:, None], values * root, rcond=None)
            error = float(np.sum(counts * ((columns @ solved) / values - 1) ** 2))
            if error < best and min(solved) >= 0:
                best, found = error, Curve(float(solved[0]), float(solved[1]), alpha, float(solved[2]), beta)
    return found


@config
class FitFile:
    """What ``scaling_fit.json`` holds of a fit; the runs are there too."""

    curve: tuple[float, float, float, float, float]
    drawn: tuple[tuple[float, float, float, float, float], ...]
    parameters: tuple[float, float]
    tokens: tuple[float, float]


def read_fit(path: Path = FIT_FILE) -> Fit | None:
    """Return the committed fit; None where there is none."""
    if not path.is_file():
        return None
    stored = decode(FitFile, json.loads(path.read_text(encoding="utf-8"))["fit"], source=str(path))
    return Fit(Curve(*stored.curve), tuple(Curve(*curve) for curve in stored.drawn), stored.parameters, stored.tokens)
