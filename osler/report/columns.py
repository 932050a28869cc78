"""The numbers of a `metrics.jsonl`, column by column, and of a metric the curve: one number takes 8 bytes here, not 60.

A run may write hundreds of thousands of lines. They are read one by one and kept as arrays, so time and memory grow with their
number and stay small. Lines of the same keys follow one another, which is why a block of them is turned into columns at once.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from osler.errors import UserError
from osler.monitor.sinks import RESERVED
from osler.report.lenient import as_number, as_text, is_measurement, parse_line

Floats = npt.NDArray[np.float64]
BLOCK_LINES = 1000
MAX_STEP = 2**53  # of larger ones a float does not hold every digit


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
        """The points whose value is finite."""
        known = np.isfinite(self.values)
        return self if known.all() else Series(self.steps[known], self.values[known])


class Columns:
    """The lines of one stage: a number of each line as a column, and of each metric the lines that have it."""

    def __init__(self) -> None:
        self.steps, self.tokens, self.times = array("q"), array("d"), array("d")
        self.values: dict[str, array[float]] = {}
        self.lines: dict[str, array[int]] = {}

    def add(self, names: Sequence[str], lines: Sequence[Sequence[Any]]) -> None:
        """Take in lines of the same keys, all with a whole number as their step."""
        first, end = len(self.steps), len(self.steps) + len(lines)
        columns: dict[str, Sequence[Any]] = dict(zip(names, zip(*lines, strict=True), strict=True))
        self.steps.extend(columns["step"])
        for own, name in ((self.tokens, "tokens"), (self.times, "time")):
            column = columns.get(name, [math.nan] * len(lines))
            own.extend(_as_numbers(column) or map(as_number, column))
        for name, column in columns.items():
            if name in RESERVED:
                continue
            places: Sequence[int] = range(first, end)
            values = _as_numbers(column)
            if values is None:
                places = [place for place, raw in zip(places, column, strict=True) if is_measurement(raw)]
                values = array("d", [as_number(column[place - first]) for place in places])
            if places:
                self.values.setdefault(name, array("d")).extend(values)
                self.lines.setdefault(name, array("I")).extend(places)

    def series(self) -> tuple[dict[str, Series], Series, Series]:
        """Every metric's curve, then tokens seen and unix seconds; of a step that was logged twice the later line counts.

        Empties the columns, so that a long log is not held twice.
        """
        steps = np.frombuffer(self.steps, np.int64)
        curves: dict[str, Series] = {}
        lines, own = np.array([], np.uintc), np.array([], np.int64)
        for name in list(self.values):
            before, lines = lines, np.frombuffer(self.lines.pop(name), np.uintc)
            values = _finite_or_nan(self.values.pop(name))
            own = own if np.array_equal(before, lines) else steps[lines]  # curves of the same lines share their steps
            curves[name] = _in_order(own, values)
        seen, clock = (_in_order(steps, _finite_or_nan(column)) for column in (self.tokens, self.times))
        return curves, seen, clock


def _as_numbers(column: Sequence[Any]) -> array[float] | None:
    """A column of numbers, None when something in it is no number: null, or text."""
    try:
        return array("d", column)
    except (TypeError, OverflowError):
        return None


def _finite_or_nan(column: array[float]) -> Floats:
    values = np.frombuffer(column, np.float64)
    values[~np.isfinite(values)] = math.nan
    return values


def _in_order(steps: npt.NDArray[np.int64], values: Floats) -> Series:
    """A curve in step order, each step once."""
    if (steps[1:] > steps[:-1]).all():
        return Series(steps, values)
    order = np.argsort(steps, kind="stable")
    steps = steps[order]
    is_last = np.append(steps[1:] != steps[:-1], True)
    return Series(steps[is_last], values[order[is_last]])


def read_columns(path: Path, default: str = "") -> tuple[dict[str, Columns], int]:
    """The columns of every stage that a log names, and how many lines before the last were no objects.

    Lines that name no stage belong to `default`; when it is given, all lines do. Lines without a step are left out.
    """
    found: dict[str, Columns] = {}
    block: list[Sequence[Any]] = []
    keys: tuple[str, tuple[str, ...]] = ("", ())
    bad, is_torn = 0, False

    def end_block() -> None:
        if block:
            found.setdefault(keys[0], Columns()).add(keys[1], block)
            block.clear()

    try:
        file = path.open("rb")
    except FileNotFoundError:
        return {}, 0
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    with file:
        for raw in file:  # a binary file ends lines at the newline byte alone, as JSON does
            if not raw.strip():
                continue
            bad += is_torn
            line = parse_line(raw)
            is_torn = line is None
            if line is None or not _has_step(line):
                continue
            own = (default or as_text(line.get("stage")), tuple(line))
            if own != keys or len(block) == BLOCK_LINES:
                end_block()
                keys = own
            block.append(tuple(line.values()))
    end_block()
    return found, bad


def _has_step(line: dict[str, Any]) -> bool:
    """Whether a line has a step, which is a whole number from then on."""
    step = line.get("step")
    if type(step) is not int:
        step = as_number(step)
    if not abs(step) < MAX_STEP:
        return False
    line["step"] = int(step)
    return True
