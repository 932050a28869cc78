"""Line charts and heat maps as the numbers that the template draws (`parts.html`), without a library, themed by the page's CSS.

Colours are classes (`c0`, `c1`, ...) that the style sheet colours for light and dark. Coordinates are those of the viewBox.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from osler.runtime import format as fmt

Numbers = npt.NDArray[Any]  # a chart takes a list as well
Scale = Callable[[Any], Any]

WIDTH, HEIGHT = 520, 240
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 12, 26
MAX_POINTS = 480  # more than one point per pixel draws nothing new and makes the page heavy
CELL_HEIGHT = 38
STRONGEST = 0.55  # the largest opacity of a cell's colour, so that its number can be read in light and in dark
SMOOTH_FROM = 30  # fewer points are drawn as they are


@dataclass
class Line:
    """One curve of a chart; y may hold NaN, which is drawn as a gap."""

    label: str
    x: Numbers
    y: Numbers
    colour: int
    smooth: bool = True

    def __post_init__(self) -> None:
        self.x, self.y = np.asarray(self.x), np.asarray(self.y, np.float64)

    def last(self, kind: str) -> str:
        """Return the last finite value as text, for a chart of this kind."""
        known = self.y[np.isfinite(self.y)]
        return fmt.value(known[-1], kind) if len(known) else fmt.MISSING


class Band(NamedTuple):
    """An area between two curves; all values are finite."""

    x: Numbers
    low: Numbers
    high: Numbers


def scale(low: float, high: float, start: float, end: float) -> Scale:
    """Return the linear map from values to coordinates, rounded to one decimal; a value outside lands on the edge."""
    return lambda value: np.round(start + (np.clip(value, low, high) - low) / (high - low) * (end - start), 1)


def nice_ticks(low: float, high: float, target: int = 5) -> list[float]:
    """Return round numbers (1, 2, 2.5 or 5 times a power of ten) that cover [low, high]."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / max(target - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def smoothed(y: Numbers) -> Numbers:
    """Return a centred bell-weighted mean over about a twentieth of the curve. It has no lag, and gaps stay gaps."""
    values = np.asarray(y, np.float64)
    radius = max(2, len(values) // 40)
    bell = np.exp(-0.5 * (2 * np.arange(-radius, radius + 1) / radius) ** 2)
    known = np.isfinite(values)
    inside = slice(radius, radius + len(values))
    total, weight = (np.convolve(each, bell)[inside] for each in (np.where(known, values, 0.0), known.astype(np.float64)))
    return np.where(known, total / np.where(known, weight, 1.0), math.nan)


def averaged(x: Numbers, y: Numbers, most: int = MAX_POINTS) -> tuple[Numbers, Numbers]:
    """Return the means of at most `most` stretches of equal length; a stretch without a finite value is a gap."""
    starts = np.arange(0, len(x), math.ceil(len(x) / most))
    known = np.isfinite(y)
    counts = np.add.reduceat(known.astype(np.float64), starts)
    sums = np.add.reduceat(np.where(known, y, 0.0), starts)
    return np.add.reduceat(x, starts) / np.diff(starts, append=len(x)), sums / np.where(counts > 0, counts, math.nan)


def thinned(x: Numbers, y: Numbers) -> tuple[Numbers, Numbers]:
    """Return about `MAX_POINTS` points at most, with each stretch's smallest and largest value; a stretch of NaN stays a gap."""
    n = len(x)
    if n <= MAX_POINTS:
        return x, y
    size = math.ceil(2 * n / MAX_POINTS)
    starts = np.arange(0, n, size)
    blocks = np.append(y, np.full(-n % size, math.nan)).reshape(-1, size)
    known = np.isfinite(blocks)
    least = starts + np.where(known, blocks, math.inf).argmin(axis=1)
    most = starts + np.where(known, blocks, -math.inf).argmax(axis=1)
    keep = np.unique(np.concatenate([[0, n - 1], least, most]))
    return x[keep], y[keep]


def line_chart(
    lines: Sequence[Line], *, title: str, kind: str = "number", zero: bool = False, over: str = "step",
    marks: Sequence[tuple[float, str, str]] = (), band: Band | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return the parts of a chart: curves with axes and ticks; nothing when no line has a finite point.

    kind: how values are written, see `format.value`. zero: the value axis starts at zero. over: what x counts, `step` or
    `tokens`. marks: (x, css class, meaning) of upright lines. band: an area behind the curves.
    """
    finite = [line.y[np.isfinite(line.y)] for line in lines]
    if not sum(map(len, finite)):
        return {}
    if band:
        finite += [band.low, band.high]
    first, last = (float(end(end(line.x) for line in lines if len(line.x))) for end in (min, max))
    x_low, x_high = (first, last) if last > first else (first - 1, last + 1)
    low, high, above = value_range(np.concatenate(finite), zero)
    rows = nice_ticks(low, high, 5)
    columns = [x for x in nice_ticks(first, last, 6) if first <= x <= last and abs(x - round(x)) < 1e-9]  # whole numbers
    axes = {"x": [x_low, x_high, LEFT, WIDTH - RIGHT], "y": [rows[0], rows[-1], HEIGHT - BOTTOM, TOP]}
    sx, sy = scale(*axes["x"]), scale(*axes["y"])
    curves, shown = [], []
    for line in lines:
        smooth = line.smooth and np.isfinite(line.y).sum() >= SMOOTH_FROM
        x, y = thinned(line.x, line.y)
        curves.append((line.colour, "raw" if smooth else "line", *_path(x, y, sx, sy)))
        if smooth:
            at, level = averaged(line.x, np.minimum(line.y, rows[-1]))  # a spike above the axis must not bend the level
            curves.append((line.colour, "line", *_path(at, smoothed(level), sx, sy)))
        values = [float(f"{v:.5g}") if math.isfinite(v) else None for v in y]
        shown.append({"label": line.label, "c": line.colour, "x": x.tolist(), "y": values})
    return {
        "spoken": f"{title}: {'; '.join(_spoken(line, kind, over) for line in lines if np.isfinite(line.y).any())}.",
        "rows": [(sy(y), fmt.tick(y, kind)) for y in rows],
        "columns": [(sx(x), fmt.tick(x)) for x in columns],
        "area": _points(*thinned(band.x, band.high), sx, sy) + _points(*thinned(band.x, band.low), sx, sy)[::-1] if band else [],
        # At most one mark of a class on a pixel: a thousand alerts are one thick line and not a thousand.
        "marks": {(round(sx(at)), css): meaning for at, css, meaning in marks if x_low <= at <= x_high},
        "curves": curves,
        "above": above,
        "data": {"kind": kind, "over": over, **axes, "lines": shown},  # the page's script reads it
    }


def heat_map(cells: Mapping[tuple[str, str], tuple[float, str]], *, title: str, base: float) -> dict[str, Any]:
    """Return the parts of a heat map of shares; nothing when no cell has a finite share.

    cells: a share and its meaning in words, by (column, row). base: the share without colour, which is that of guessing.
    """
    known = {place: cell for place, cell in cells.items() if math.isfinite(cell[0])}
    if not known:
        return {}
    columns, rows = (list(dict.fromkeys(place[axis] for place in cells)) for axis in (0, 1))
    width = (WIDTH - LEFT - RIGHT) / len(columns)
    x = {column: LEFT + number * width for number, column in enumerate(columns)}
    y = {row: TOP + number * CELL_HEIGHT for number, row in enumerate(rows)}
    told = {row: [f"{fmt.percent(known[at][0], 0)} at {at[0]}" for at in known if at[1] == row] for row in rows}
    return {
        "spoken": f"{title}. {'; '.join(f'{row}: ' + ', '.join(words) for row, words in told.items())}.",
        "columns": [(round(x[column] + width / 2, 1), column) for column in columns],
        "rows": [(y[row] + CELL_HEIGHT / 2, row) for row in rows],
        "cells": [
            (round(x[column], 1), y[row], round(STRONGEST * max(share - base, 0) / (1 - base), 3), fmt.percent(share, 0), meaning)
            for (column, row), (share, meaning) in known.items()
        ],
        "width": round(width, 1),
    }


def value_range(finite: Sequence[float] | Numbers, zero: bool) -> tuple[float, float, int]:
    """Return the bounds of the value axis and how many points are above it: a rare spike must not flatten the curve."""
    low, high, over = float(np.min(finite)), float(np.max(finite)), 0
    if len(finite) >= 50:
        rank = int(0.985 * (len(finite) - 1))
        usual = float(np.partition(finite, rank)[rank])
        if high - low > 4 * (usual - low) > 0:
            high = usual + 0.25 * (usual - low)
            over = int(np.sum(np.asarray(finite) > high))
    if zero:
        low = min(low, 0.0)
    if not high > low:
        margin = abs(low) * 0.1 or 0.5
        # A curve of zeros stands on its axis, because a share or a count has no room below.
        low, high = (0.0, high * 2) if zero and high > 0 else (low - margin if low else 0.0, high + margin)
    return low, high, over


def _points(x: Numbers, y: Numbers, sx: Scale, sy: Scale) -> list[str]:
    """Return the coordinates of points."""
    return [f"{a:g} {b:g}" for a, b in zip(sx(x), sy(y), strict=True)]


def _path(x: Numbers, y: Numbers, sx: Scale, sy: Scale) -> tuple[str, list[list[str]]]:
    """Return a path that NaN breaks, and the points that get a dot: lone points, and all points of a short line."""
    known = np.isfinite(y)
    points = _points(x, y, sx, sy)
    runs = [list(run) for is_known, run in groupby(range(len(y)), known.__getitem__) if is_known]
    path = " ".join("M" + " ".join(points[i] for i in run) for run in runs if len(run) > 1)
    return path, [points[i].split() for run in runs for i in run if known.sum() <= 24 or len(run) == 1]


def _spoken(line: Line, kind: str, over: str) -> str:
    """Say to readers who cannot see a line where it starts and ends."""
    known = np.flatnonzero(np.isfinite(line.y))
    ends = []
    for end in (known[0], known[-1]):
        place = fmt.count(line.x[end])
        ends.append(f"{fmt.value(line.y[end], kind)} at {f'step {place}' if over == 'step' else f'{place} {over}'}")
    return f"{line.label} from {ends[0]} to {ends[1]}"
