"""The curves of a ``metrics.jsonl``, as arrays: a number takes 8 bytes here and not 60, and a log may hold millions of them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from osler.records.jsonl import read_lines
from osler.records.metrics import MetricsLine

Floats = npt.NDArray[np.float64]


@dataclass
class Series:
    """One metric over steps, in step order; NaN where the run logged a value that was not finite."""

    steps: npt.NDArray[np.int64]
    values: Floats

    def __init__(self, steps: Sequence[int] | npt.NDArray[np.int64] = (), values: Sequence[float] | Floats = ()) -> None:
        self.steps, self.values = np.asarray(steps, np.int64), np.asarray(values, np.float64)

    def __len__(self) -> int:
        return len(self.steps)

    def finite(self) -> Series:
        """Return the points whose value is finite."""
        known = np.isfinite(self.values)
        return self if known.all() else Series(self.steps[known], self.values[known])


@dataclass
class Curves:
    """What a log holds: a curve for each metric, tokens seen, unix seconds; and how many lines before the last are unreadable."""

    metrics: dict[str, Series] = field(default_factory=dict)
    tokens: Series = field(default_factory=Series)
    clock: Series = field(default_factory=Series)
    unreadable: int = 0


def read_curves(path: Path) -> Curves:
    """Return the curves of a ``metrics.jsonl``; of a step that was logged twice the later line counts.

    There are none when there is no file; raises UserError when it cannot be read.
    """
    steps, tokens, clock = array("q"), array("d"), array("d")
    values: dict[str, array[float]] = {}
    places: dict[str, array[int]] = {}  # the numbers of the lines that have a metric
    unreadable, is_torn = 0, False
    for raw in read_lines(path):
        unreadable += is_torn
        line = MetricsLine.parse(raw)
        is_torn = line is None and bool(raw.strip())
        if line is None:
            continue
        for name, value in line.values.items():
            if name not in values:
                values[name], places[name] = array("d"), array("I")
            values[name].append(value)
            places[name].append(len(steps))
        steps.append(line.step)
        tokens.append(line.tokens)
        clock.append(line.time)
    at = np.frombuffer(steps, np.int64)
    curves: dict[str, Series] = {}
    own, before = np.array([], np.int64), np.array([], np.uintc)
    for name in list(values):
        lines = np.frombuffer(places.pop(name), np.uintc)
        own = own if np.array_equal(before, lines) else at[lines]  # curves of the same lines share their steps
        curves[name], before = _in_order(own, np.frombuffer(values.pop(name), np.float64)), lines
    seen, clock_ = (_in_order(at, np.frombuffer(column, np.float64)) for column in (tokens, clock))
    return Curves(curves, seen, clock_, unreadable)


def _in_order(steps: npt.NDArray[np.int64], values: Floats) -> Series:
    """Return a curve in step order, each step once."""
    if (steps[1:] > steps[:-1]).all():
        return Series(steps, values)
    order = np.argsort(steps, kind="stable")
    steps = steps[order]
    is_last = np.append(steps[1:] != steps[:-1], True)
    return Series(steps[is_last], values[order[is_last]])
