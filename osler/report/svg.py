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
    total, weight = (np.convolve(of, bell)[inside] for of in (np.where(known, values, 0.0), known.astype(np.float64)))
    return np.where(known, total / np.where(known, weight, 1.0), math.nan)


def averaged(x: Numbers, y: Numbers) -> tuple[Numbers, Numbers]:
    """Return the means of at most `MAX_LEVELS` stretches of equal length; one without a finite value is a gap."""
    starts, known = np.arange(0, len(x), math.ceil(len(x) / MAX_LEVELS)), np.isfinite(y)
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
    y_ticks, y_step = nice_ticks(low, high, 5)
    sx = Scale(x_low, x_high, LEFT, WIDTH - RIGHT)
    sy = Scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [_axes(sx, sy, first, last, (y_ticks, y_step), kind, over), _area(band, sx, sy) if band else "", _marks(marks, sx)]
    shown = []
    for line in lines:
        smooth = line.smooth and np.isfinite(line.y).sum() >= SMOOTH_FROM
        colour = f"c{line.colour}"
        x, y = thinned(line.x, line.y)
        parts.append(_curve(x, y, sx, sy, f"{colour} raw" if smooth else f"{colour} line"))
        if smooth:
            at, level = averaged(line.x, np.minimum(line.y, sy.high))  # a spike above the axis must not bend the level
            parts.append(_curve(*thinned(at, smoothed(level)), sx, sy, f"{colour} line"))
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


def interval_bar(
    low: float, value: float, high: float, *, marks: Sequence[tuple[float, str, str]] = (),
    range_: tuple[float, float] = (0.0, 1.0), title: str, colour: int = 0,
) -> str:  # fmt: skip
    """Draw an interval as a bar and its centre as a dot, on an axis over `range_`; marks are (value, css class, meaning)."""
    width, height = 220, 26
    scale = Scale(*range_, 4, width - 4)
    parts = [_line("rail", 4, width - 4, 13, 13)]
    for at, css, meaning in marks:
        if math.isfinite(at):
            parts.append(_line(f"mark {css}", scale(at), scale(at), 3, 23, meaning))
    parts.append(_interval(scale, (low, value, high), 13, 5, colour))
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
        x = scale(i / 4)
        at, anchor = {0: (0.0, "start"), 4: (float(width), "end")}.get(i, (x, "middle"))
        parts += [_line("grid", x, x, top, bottom), _text(at, bottom + 20, f"{25 * i}%", anchor)]
    known = sorted((m for m in marks if math.isfinite(m[0])), key=lambda m: m[0])
    for i, (at, css, words) in enumerate(known):
        # Chance and the constant letter lie close together: one label goes to the left of its mark, one to the right.
        anchor, dx = ("end", -6) if i == 0 and len(known) > 1 else ("start", 6)
        parts += [_line(f"mark {css}", scale(at), scale(at), top - 20, bottom), _text(scale(at) + dx, top - 11, words, anchor)]
    for i, (label, low, value, high, colour) in enumerate(rows):
        y = top + row_height * (i + 1) - 17
        parts.append(_text(edge, y - 14, label, css="label halo"))
        parts.append(_text(width - edge, y - 14, fmt.percent(value), "end", "label strong halo"))
        parts += [_line("rail", edge, width - edge, y, y), _interval(scale, (low, value, high), y, 7, colour)]
    return _svg("".join(parts), width, bottom + 26, title, "ladder")


def histogram(counts: dict[str, float]) -> str:
    """Draw a small bar for each key, the key beneath it, and a dotted line at the height of equal shares."""
    shares = {key: n if math.isfinite(n) else 0.0 for key, n in counts.items()}
    total = sum(shares.values())
    if not total > 0:
        return ""
    slot, top, floor = 20, 3, 30
    scale = Scale(0, max(*shares.values(), total / 2), 0, floor - top)
    parts = []
    width = slot * len(counts)
    for i, (key, n) in enumerate(counts.items()):
        height = scale(shares[key])
        box = f'x="{slot * i + 3}" y="{_c(floor - height)}" width="{slot - 6}" height="{_c(height)}" rx="1.5"'
        parts.append(f"<rect {box}><title>{escape(key)}: {fmt.count(n)} ({fmt.percent(shares[key] / total)})</title></rect>")
        parts.append(_text(slot * i + slot / 2, floor + 12, key, "middle"))
    even = floor - scale(total / len(counts))
    parts.append(_line("even", 0, width, even, even))
    title = "Letters: " + ", ".join(f"{key} {fmt.count(n)}" for key, n in counts.items())
    return _svg("".join(parts), width, 46, title, "letters", f'style="width:{width}px"')


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


def _axes(sx: Scale, sy: Scale, first: float, last: float, y_axis: tuple[list[float], float], kind: str, over: str) -> str:
    """Draw lines of the grid with their values, and whole numbers of steps or tokens beneath."""
    floor, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    out = []
    for value in y_axis[0]:
        label = fmt.tick(value, y_axis[1], kind)
        out += [_line("grid", LEFT, right, sy(value), sy(value)), _text(LEFT - 8, sy(value) + 4, label, "end")]
    out.append(_line("axis", LEFT, right, floor, floor))
    ticks, step = nice_ticks(first, last, 6)
    for value in ticks:
        if first <= value <= last and abs(value - round(value)) < 1e-9:
            x = sx(value)
            anchor = "end" if x > right - 10 else "start" if x < LEFT + 4 else "middle"
            out += [_line("axis", x, x, floor, floor + 4), _text(x, floor + 18, fmt.tick(value, step), anchor)]
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


def _interval(scale: Scale, ends: tuple[float, float, float], y: float, half_height: float, colour: int) -> str:
    """Draw an interval, given as low, value and high, as a bar and a dot; what is not finite is left out."""
    low, value, high = ends
    out = ""
    if math.isfinite(low) and math.isfinite(high):
        a, width = scale(low), max(scale(high) - scale(low), 2.0)
        box = f'x="{_c(a)}" y="{_c(y - half_height)}" width="{_c(width)}" height="{_c(2 * half_height)}" rx="3"'
        out = f'<rect class="c{colour} band" {box}/>'
    if math.isfinite(value):
        out += f'<circle class="c{colour} dot" cx="{_c(scale(value))}" cy="{_c(y)}" r="{_c(0.85 * half_height)}"/>'
    return out


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
