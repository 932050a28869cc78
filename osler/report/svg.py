"""Charts drawn as SVG text: no library, no network, themed by the page's CSS.

Every function returns one `<svg>` element. Colours are classes (`c0`, `c1`, ...) that the style sheet gives a colour in
light and in dark; text sizes too, so that a narrow screen can enlarge them. Coordinates are those of the viewBox.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from osler.report import format as fmt

Numbers = npt.NDArray[Any]  # a list is taken as well where a chart is given one

WIDTH, HEIGHT = 520, 240
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 12, 26
MAX_POINTS = 480  # more than one point per pixel draws nothing new and makes the page heavy
MAX_LEVELS = 4 * MAX_POINTS  # means that a long curve is smoothed from
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


@dataclass
class Band:
    """An area between two curves; all values are finite."""

    x: Numbers
    low: Numbers
    high: Numbers


@dataclass
class Scale:
    """A linear map from values to coordinates."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def nice_ticks(low: float, high: float, target: int = 5) -> tuple[list[float], float]:
    """Return round numbers (1, 2, 2.5 or 5 times a power of ten) that cover [low, high], and their distance."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / max(target - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)], step


def smoothed(y: Numbers) -> Numbers:
    """Return a centred bell-weighted mean over about a twentieth of the curve: no lag, gaps stay gaps."""
    values = np.asarray(y, np.float64)
    radius = max(2, len(values) // 40)
    bell = np.exp(-0.5 * (2 * np.arange(-radius, radius + 1) / radius) ** 2)
    known = np.isfinite(values)
    inside = slice(radius, radius + len(values))
    total = np.convolve(np.where(known, values, 0.0), bell)[inside]
    weight = np.convolve(known.astype(np.float64), bell)[inside]
    return np.where(known, total / np.where(known, weight, 1.0), math.nan)


def averaged(x: Numbers, y: Numbers) -> tuple[Numbers, Numbers]:
    """Return the means of at most `MAX_LEVELS` stretches of equal length; one without a finite value is a gap."""
    size = math.ceil(len(x) / MAX_LEVELS)
    if size <= 1:
        return x, y
    known = np.isfinite(y)
    starts = np.arange(0, len(x), size)
    counts, lengths = np.add.reduceat(known, starts, dtype=np.int64), np.diff(np.append(starts, len(x)))
    sums = np.add.reduceat(np.where(known, y, 0.0), starts)
    return np.add.reduceat(x, starts) / lengths, np.where(counts > 0, sums / np.maximum(counts, 1), math.nan)


def thinned(x: Numbers, y: Numbers) -> tuple[Numbers, Numbers]:
    """Return at most `MAX_POINTS` points that keep each stretch's smallest and largest value, and its gaps."""
    n = len(x)
    if n <= MAX_POINTS:
        return x, y
    size = math.ceil(2 * n / MAX_POINTS)
    starts = np.arange(0, n, size)
    places = np.append(np.arange(n), np.full(-n % size, n - 1)).reshape(-1, size)  # of stretches; the last one is filled up
    blocks = y[places]
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
    x_ticks, x_step = nice_ticks(first, last, 6)
    x_ticks = [t for t in x_ticks if first <= t <= last and abs(t - round(t)) < 1e-9]
    x_low, x_high = (first, last) if last > first else (first - 1, last + 1)
    low, high, above = value_range(np.concatenate(finite), zero, kind)
    y_ticks, y_step = nice_ticks(low, high, 5)
    sx = Scale(x_low, x_high, LEFT, WIDTH - RIGHT)
    sy = Scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [_y_axis(y_ticks, y_step, sy, kind), _x_axis(x_ticks, x_step, sx, over)]
    parts.append(_area(band, sx, sy) if band else "")
    parts.append(_marks(marks, sx))
    shown = []
    for line in lines:
        smooth = line.smooth and np.isfinite(line.y).sum() >= SMOOTH_FROM
        colour = f"c{line.colour}"
        x, y = thinned(line.x, line.y)
        parts.append(_curve(x, y, sx, sy, f"{colour} raw" if smooth else f"{colour} line"))
        if smooth:
            at, level = averaged(line.x, np.minimum(line.y, sy.high))  # a spike above the axis must not bend the level
            parts.append(_curve(*thinned(at, smoothed(level)), sx, sy, f"{colour} line"))
        shown.append({"label": line.label, "c": line.colour, "x": x.tolist(), "y": [_json_number(v) for v in y]})
    if above:
        parts.append(f'<text class="tick" x="{LEFT + 6}" y="{TOP + 10}">↑ {above} above the axis</text>')
    data: dict[str, object] = {
        "kind": kind,
        "over": over,
        "x": [x_low, x_high, LEFT, WIDTH - RIGHT],
        "y": [sy.low, sy.high, sy.start, sy.end],
    }
    data["lines"] = shown
    parts.append(f'<line class="hair" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="0" x2="0" visibility="hidden"/>')
    # In single quotes the many double quotes of JSON need no escape; they would double the page.
    encoded = html.escape(json.dumps(data, separators=(",", ":")), quote=False).replace("'", "&#39;")
    attrs = f"data-chart='{encoded}' tabindex=\"0\""
    return _svg("".join(parts), WIDTH, HEIGHT, _spoken(title, lines, kind, over), "chart", attrs)


def interval_bar(
    low: float, value: float, high: float, *, marks: Sequence[tuple[float, str, str]] = (),
    range_: tuple[float, float] = (0.0, 1.0), title: str, colour: int = 0,
) -> str:  # fmt: skip
    """Draw an interval as a bar and its centre as a dot, on an axis over `range_`; marks are (value, css class, meaning)."""
    width, height = 220, 26
    scale = Scale(*range_, 4, width - 4)
    parts = [f'<line class="rail" x1="4" x2="{width - 4}" y1="13" y2="13"/>']
    for at, css, meaning in marks:
        if math.isfinite(at):
            x = _c(scale(_clamp(at, range_)))
            parts.append(f'<line class="mark {css}" x1="{x}" x2="{x}" y1="3" y2="23"><title>{_e(meaning)}</title></line>')
    if math.isfinite(low) and math.isfinite(high):
        a, b = scale(_clamp(low, range_)), scale(_clamp(high, range_))
        parts.append(f'<rect class="c{colour} band" x="{_c(a)}" y="8" width="{_c(max(b - a, 1.5))}" height="10" rx="3"/>')
    if math.isfinite(value):
        parts.append(f'<circle class="c{colour} dot" cx="{_c(scale(_clamp(value, range_)))}" cy="13" r="4.2"/>')
    return _svg("".join(parts), width, height, title, "interval")


def ladder(rows: Sequence[tuple[str, float, float, float, int]], marks: Sequence[tuple[float, str, str]], title: str) -> str:
    """Draw the scores of several checkpoints under one another on an axis from 0 to 100%.

    rows: (label, low, value, high, colour); marks: (value, css class, words), drawn through all rows.
    """
    width, edge, row_height, top = 600, 8, 56, 30
    bottom = top + row_height * len(rows)
    scale = Scale(0, 1, edge, width - edge)
    parts = []
    for i in range(5):
        x, anchor = _c(scale(i / 4)), ("start", "middle", "middle", "middle", "end")[i]
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{top}" y2="{bottom}"/>')
        at = {"start": 0.0, "end": float(width)}.get(anchor, float(x))
        parts.append(f'<text class="tick" text-anchor="{anchor}" x="{_c(at)}" y="{bottom + 20}">{25 * i}%</text>')
    known = sorted((m for m in marks if math.isfinite(m[0])), key=lambda m: m[0])
    for i, (at, css, words) in enumerate(known):
        # Chance and the constant letter lie close together: one label goes to the left of its mark, one to the right.
        left = i == 0 and len(known) > 1
        x, anchor, dx = _c(scale(at)), "end" if left else "start", -6 if left else 6
        parts.append(f'<line class="mark {css}" x1="{x}" x2="{x}" y1="{top - 20}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" text-anchor="{anchor}" x="{_c(float(x) + dx)}" y="{top - 11}">{_e(words)}</text>')
    for i, (label, low, value, high, colour) in enumerate(rows):
        y = top + row_height * (i + 1) - 17
        end = f'text-anchor="end" x="{width - edge}" y="{y - 14}"'
        parts.append(f'<text class="label halo" x="{edge}" y="{y - 14}">{_e(label)}</text>')
        parts.append(f'<text class="label strong halo" {end}>{fmt.percent(value)}</text>')
        parts.append(f'<line class="rail" x1="{edge}" x2="{width - edge}" y1="{y}" y2="{y}"/>')
        if math.isfinite(low) and math.isfinite(high):
            a, b = scale(_clamp(low, (0, 1))), scale(_clamp(high, (0, 1)))
            box = f'x="{_c(a)}" y="{y - 7}" width="{_c(max(b - a, 2))}" height="14" rx="4"'
            parts.append(f'<rect class="c{colour} band" {box}/>')
        if math.isfinite(value):
            parts.append(f'<circle class="c{colour} dot" cx="{_c(scale(_clamp(value, (0, 1))))}" cy="{y}" r="6"/>')
    return _svg("".join(parts), width, bottom + 26, title, "ladder")


def histogram(counts: dict[str, float]) -> str:
    """Draw a small bar for each key, the key beneath it, and a dotted line at the height of equal shares."""
    total = sum(v for v in counts.values() if math.isfinite(v))
    if not total > 0:
        return ""
    slot, top, floor = 20, 3, 30
    peak = max(v for v in counts.values() if math.isfinite(v)) / total
    parts = []
    width = slot * len(counts)
    for i, (key, n) in enumerate(counts.items()):
        share = n / total if math.isfinite(n) else 0.0
        height = (floor - top) * share / max(peak, 0.5)
        box = f'x="{slot * i + 3}" y="{_c(floor - height)}" width="{slot - 6}" height="{_c(height)}" rx="1.5"'
        parts.append(f"<rect {box}><title>{_e(key)}: {fmt.count(n)} ({fmt.percent(share)})</title></rect>")
        parts.append(f'<text class="tick" text-anchor="middle" x="{slot * i + slot / 2:g}" y="{floor + 12}">{_e(key)}</text>')
    even = floor - (floor - top) / len(counts) / max(peak, 0.5)
    parts.append(f'<line class="even" x1="0" x2="{width}" y1="{_c(even)}" y2="{_c(even)}"/>')
    title = "Letters: " + ", ".join(f"{key} {fmt.count(n)}" for key, n in counts.items())
    return _svg("".join(parts), width, 46, title, "letters", f'style="width:{width}px"')


def value_range(finite: Sequence[float] | Numbers, zero: bool, kind: str) -> tuple[float, float, int]:
    """Return the bounds of the value axis and how many points lie above it: a rare spike must not flatten the curve."""
    low, high, over = float(np.min(finite)), float(np.max(finite)), 0
    if len(finite) >= 50:
        rank = int(0.985 * (len(finite) - 1))
        usual = float(np.partition(finite, rank)[rank])
        if high - low > 4 * (usual - low) > 0:
            high = usual + 0.25 * (usual - low)
            over = int(np.sum(np.asarray(finite) > high))
    if zero:
        low = min(low, 0.0)
    if kind == "percent":
        high = min(high, 1.0) if high <= 1.0 else high
    if not high > low:
        margin = abs(low) * 0.1 or 0.5
        # Nothing but zeros stands on its axis: a share or a count has no room below.
        low, high = (0.0, high * 2) if zero and high > 0 else (low - margin if low else 0.0, high + margin)
    return low, high, over


def _y_axis(ticks: list[float], step: float, scale: Scale, kind: str) -> str:
    out = []
    for value in ticks:
        y = _c(scale(value))
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        label = fmt.tick(value, step, kind)
        out.append(f'<text class="tick" text-anchor="end" x="{LEFT - 8}" y="{_c(float(y) + 4)}">{label}</text>')
    return "".join(out)


def _x_axis(ticks: list[float], step: float, scale: Scale, over: str) -> str:
    floor = HEIGHT - BOTTOM
    out = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>']
    for value in ticks:
        x = scale(value)
        anchor = "end" if x > WIDTH - RIGHT - 10 else "start" if x < LEFT + 4 else "middle"
        label = fmt.tick(value, step)
        out.append(f'<line class="axis" x1="{_c(x)}" x2="{_c(x)}" y1="{floor}" y2="{floor + 4}"/>')
        out.append(f'<text class="tick" text-anchor="{anchor}" x="{_c(x)}" y="{floor + 18}">{label}</text>')
    out.append(f'<text class="tick" text-anchor="end" x="{LEFT - 8}" y="{floor + 18}">{over}</text>')
    return "".join(out)


def _area(band: Band, sx: Scale, sy: Scale) -> str:
    """Draw a band as one shape, along its upper edge and back along its lower one."""
    there = list(zip(*thinned(band.x, band.high), strict=True))
    back = list(zip(*thinned(band.x, band.low), strict=True))[::-1]
    points = " ".join(f"{_c(sx(x))} {_c(sy(_clamp(y, (sy.low, sy.high))))}" for x, y in there + back)
    return f'<path class="c5 area" d="M{points}Z"/>'


def _marks(marks: Sequence[tuple[float, str, str]], sx: Scale) -> str:
    """Draw upright lines, at most one of a class on a pixel: a thousand alerts are one thick line and not a thousand."""
    out = {}
    for at, css, meaning in marks:
        if sx.low <= at <= sx.high:
            x = f"{sx(at):.0f}"
            line = f'<line class="mark {css}" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
            out[x, css] = f"{line}<title>{_e(meaning)}</title></line>"
    return "".join(out.values())


def _curve(x: Numbers, y: Numbers, sx: Scale, sy: Scale, css: str) -> str:
    """Draw a path that NaN breaks; points that stand alone, and all points of a short line, get a dot."""
    runs: list[list[tuple[str, str]]] = [[]]
    for a, b in zip(x, y, strict=True):
        if math.isfinite(b):
            runs[-1].append((_c(sx(a)), _c(sy(_clamp(b, (sy.low, sy.high))))))
        elif runs[-1]:
            runs.append([])
    path = " ".join("M" + " ".join(f"{a} {b}" for a, b in run) for run in runs if len(run) > 1)
    few = sum(map(len, runs)) <= 24
    dots = [point for run in runs if few or len(run) == 1 for point in run]
    out = f'<path class="{css}" d="{path}"/>' if path else ""
    return out + "".join(f'<circle class="{css.split()[0]} dot" cx="{a}" cy="{b}" r="2.8"/>' for a, b in dots)


def _spoken(title: str, lines: Sequence[Line], kind: str, over: str) -> str:
    """Say what a chart shows to those who do not see it: where each line starts and ends."""

    def at(x: float) -> str:
        return f"step {fmt.count(x)}" if over == "step" else f"{fmt.count(x)} {over}"

    spoken = []
    for line in lines:
        known = np.flatnonzero(np.isfinite(line.y))
        if len(known):
            (a, first), (b, last) = ((line.x[end], line.y[end]) for end in (known[0], known[-1]))
            spoken.append(f"{line.label} from {fmt.value(first, kind)} at {at(a)} to {fmt.value(last, kind)} at {at(b)}")
    return f"{title}: {'; '.join(spoken)}."


def _svg(body: str, width: float, height: float, title: str, css: str, attrs: str = "") -> str:
    box = f'viewBox="0 0 {width:g} {height:g}"'
    return f'<svg class="{css}" {box} role="img" {attrs}><title>{_e(title)}</title>{body}</svg>'


def _clamp(value: float, range_: tuple[float, float]) -> float:
    return min(max(value, range_[0]), range_[1])


def _json_number(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _c(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")


def _e(text: str) -> str:
    return html.escape(text)
