"""Charts drawn as SVG text: no library, no network, themed by the page's CSS.

Every function returns one `<svg>` element. Colours are classes (`c0`, `c1`, ...) that the style sheet gives a colour in
light and in dark; text sizes too, so that a narrow screen can enlarge them. Coordinates are those of the viewBox.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from osler.report import format as fmt

Numbers = npt.NDArray[Any]  # a list is taken as well where a chart is given one

WIDTH, HEIGHT = 520, 240
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 12, 26
MAX_POINTS = 480  # more than one point per pixel draws nothing new and makes the page heavy
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
        """Return the last finite value, written as its chart's kind asks."""
        known = self.y[np.isfinite(self.y)]
        return fmt.value(known[-1], kind) if len(known) else fmt.MISSING


class Band(NamedTuple):
    """An area between two curves; all values are finite."""

    x: Numbers
    low: Numbers
    high: Numbers


@dataclass
class Scale:
    """A linear map from values to coordinates; a value outside lands on the edge."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        inside = min(max(value, self.low), self.high)
        return self.start + (inside - self.low) / (self.high - self.low) * (self.end - self.start)


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
    """Return a centred bell-weighted mean over about a twentieth of the curve: no lag, gaps stay gaps."""
    values = np.asarray(y, np.float64)
    radius = max(2, len(values) // 40)
    bell = np.exp(-0.5 * (2 * np.arange(-radius, radius + 1) / radius) ** 2)
    known = np.isfinite(values)
    inside = slice(radius, radius + len(values))
    total, weight = (np.convolve(of, bell)[inside] for of in (np.where(known, values, 0.0), known.astype(np.float64)))
    return np.where(known, total / np.where(known, weight, 1.0), math.nan)


def averaged(x: Numbers, y: Numbers, most: int = MAX_POINTS) -> tuple[Numbers, Numbers]:
    """Return the means of at most so many stretches of equal length; one without a finite value is a gap."""
    starts, known = np.arange(0, len(x), math.ceil(len(x) / most)), np.isfinite(y)
    counts, sums = np.add.reduceat(known.astype(np.float64), starts), np.add.reduceat(np.where(known, y, 0.0), starts)
    return np.add.reduceat(x, starts) / np.diff(starts, append=len(x)), sums / np.where(counts > 0, counts, math.nan)


def thinned(x: Numbers, y: Numbers) -> tuple[Numbers, Numbers]:
    """Return at most `MAX_POINTS` points that keep each stretch's smallest and largest value, and its gaps."""
    n = len(x)
    if n <= MAX_POINTS:
        return x, y
    size = math.ceil(2 * n / MAX_POINTS)
    starts, blocks = np.arange(0, n, size), np.append(y, np.full(-n % size, math.nan)).reshape(-1, size)
    known = np.isfinite(blocks)
    least = starts + np.where(known, blocks, math.inf).argmin(axis=1)
    most = starts + np.where(known, blocks, -math.inf).argmax(axis=1)
    keep = np.unique(np.concatenate([[0, n - 1], least, most]))
    return x[keep], y[keep]


def line_chart(
    lines: Sequence[Line], *, title: str, kind: str = "number", zero: bool = False, over: str = "step",
    marks: Sequence[tuple[float, str, str]] = (), band: Band | None = None,
) -> str:  # fmt: skip
    """Draw curves over steps with axes and ticks; empty text when no line has a finite point.

    kind: how values are written, see `format.value`. zero: the value axis starts at zero. over: what x counts, `step` or
    `tokens`. marks: (x, css class, meaning) of upright lines. band: an area behind the curves.
    """
    finite = [line.y[np.isfinite(line.y)] for line in lines]
    if not sum(map(len, finite)):
        return ""
    if band:
        finite += [band.low, band.high]
    first, last = (float(end(end(line.x) for line in lines if len(line.x))) for end in (min, max))
    x_low, x_high = (first, last) if last > first else (first - 1, last + 1)
    low, high, above = value_range(np.concatenate(finite), zero)
    y_ticks = nice_ticks(low, high, 5)
    sx = Scale(x_low, x_high, LEFT, WIDTH - RIGHT)
    sy = Scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [_axes(sx, sy, first, last, y_ticks, kind, over), _area(band, sx, sy) if band else "", _marks(marks, sx)]
    shown = []
    for line in lines:
        smooth = line.smooth and np.isfinite(line.y).sum() >= SMOOTH_FROM
        colour = f"c{line.colour}"
        x, y = thinned(line.x, line.y)
        parts.append(_curve(x, y, sx, sy, f"{colour} raw" if smooth else f"{colour} line"))
        if smooth:
            at, level = averaged(line.x, np.minimum(line.y, sy.high))  # a spike above the axis must not bend the level
            parts.append(_curve(at, smoothed(level), sx, sy, f"{colour} line"))
        values = [float(f"{v:.5g}") if math.isfinite(v) else None for v in y]
        shown.append({"label": line.label, "c": line.colour, "x": x.tolist(), "y": values})
    if above:
        parts.append(_text(LEFT + 6, TOP + 10, f"↑ {above} above the axis"))
    parts.append(f'<line class="hair" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="0" x2="0" visibility="hidden"/>')
    axes = {"x": [x_low, x_high, LEFT, WIDTH - RIGHT], "y": [sy.low, sy.high, sy.start, sy.end]}
    data = {"kind": kind, "over": over, **axes, "lines": shown}
    # In single quotes the many double quotes of JSON need no escape; they would double the page.
    encoded = escape(json.dumps(data, separators=(",", ":")), quote=False).replace("'", "&#39;")
    attrs = f"data-chart='{encoded}' tabindex=\"0\""
    return _svg("".join(parts), WIDTH, HEIGHT, _spoken(title, lines, kind, over), "chart", attrs)


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
        # Nothing but zeros stands on its axis: a share or a count has no room below.
        low, high = (0.0, high * 2) if zero and high > 0 else (low - margin if low else 0.0, high + margin)
    return low, high, over


def _axes(sx: Scale, sy: Scale, first: float, last: float, y_ticks: list[float], kind: str, over: str) -> str:
    """Draw lines of the grid with their values, and whole numbers of steps or tokens beneath."""
    floor, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    out = []
    for value in y_ticks:
        label = fmt.tick(value, kind)
        out += [_line("grid", LEFT, right, sy(value), sy(value)), _text(LEFT - 8, sy(value) + 4, label, "end")]
    out.append(_line("axis", LEFT, right, floor, floor))
    for value in nice_ticks(first, last, 6):
        if first <= value <= last and abs(value - round(value)) < 1e-9:
            x = sx(value)
            anchor = "end" if x > right - 10 else "start" if x < LEFT + 4 else "middle"
            out += [_line("axis", x, x, floor, floor + 4), _text(x, floor + 18, fmt.tick(value), anchor)]
    return "".join([*out, _text(LEFT - 8, floor + 18, over, "end")])


def _area(band: Band, sx: Scale, sy: Scale) -> str:
    """Draw a band as one shape, along its upper edge and back along its lower one."""
    there = list(zip(*thinned(band.x, band.high), strict=True))
    back = list(zip(*thinned(band.x, band.low), strict=True))[::-1]
    points = " ".join(f"{_c(sx(x))} {_c(sy(y))}" for x, y in there + back)
    return f'<path class="c5 area" d="M{points}Z"/>'


def _marks(marks: Sequence[tuple[float, str, str]], sx: Scale) -> str:
    """Draw upright lines, at most one of a class on a pixel: a thousand alerts are one thick line and not a thousand."""
    drawn = {(round(sx(at)), css): meaning for at, css, meaning in marks if sx.low <= at <= sx.high}
    return "".join(_line(f"mark {css}", x, x, TOP, HEIGHT - BOTTOM, meaning) for (x, css), meaning in drawn.items())


def _curve(x: Numbers, y: Numbers, sx: Scale, sy: Scale, css: str) -> str:
    """Draw a path that NaN breaks; points that stand alone, and all points of a short line, get a dot."""
    runs: list[list[tuple[str, str]]] = [[]]
    for a, b in zip(x, y, strict=True):
        if math.isfinite(b):
            runs[-1].append((_c(sx(a)), _c(sy(b))))
        elif runs[-1]:
            runs.append([])
    path = " ".join("M" + " ".join(f"{a} {b}" for a, b in run) for run in runs if len(run) > 1)
    few = sum(map(len, runs)) <= 24
    dots = [point for run in runs if few or len(run) == 1 for point in run]
    out = f'<path class="{css}" d="{path}"/>' if path else ""
    return out + "".join(f'<circle class="{css.split()[0]} dot" cx="{a}" cy="{b}" r="2.8"/>' for a, b in dots)


def _spoken(title: str, lines: Sequence[Line], kind: str, over: str) -> str:
    """Describe a chart to readers who cannot see it: where each line starts and ends."""
    spoken = []
    for line in lines:
        known = np.flatnonzero(np.isfinite(line.y))
        if len(known):
            first, last = (
                f"{fmt.value(line.y[end], kind)} at "
                + (f"step {fmt.count(line.x[end])}" if over == "step" else f"{fmt.count(line.x[end])} {over}")
                for end in (known[0], known[-1])
            )
            spoken.append(f"{line.label} from {first} to {last}")
    return f"{title}: {'; '.join(spoken)}."


def _svg(body: str, width: float, height: float, title: str, css: str, attrs: str = "") -> str:
    box = f'viewBox="0 0 {width:g} {height:g}"'
    return f'<svg class="{css}" {box} role="img" {attrs}><title>{escape(title)}</title>{body}</svg>'


def _line(css: str, x1: float, x2: float, y1: float, y2: float, meaning: str = "") -> str:
    title = f"<title>{escape(meaning)}</title>" if meaning else ""
    return f'<line class="{css}" x1="{_c(x1)}" x2="{_c(x2)}" y1="{_c(y1)}" y2="{_c(y2)}">{title}</line>'


def _text(x: float, y: float, text: str, anchor: str = "start", css: str = "tick") -> str:
    return f'<text class="{css}" text-anchor="{anchor}" x="{_c(x)}" y="{_c(y)}">{escape(text)}</text>'


def _c(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")
