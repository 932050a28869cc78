"""The drawings: round ticks, gaps that stay gaps, values where they belong."""

from __future__ import annotations

import html
import itertools
import json
import math
import re
from typing import Any

import numpy as np
import pytest

from osler.report import svg
from osler.report.svg import Line, averaged, line_chart, nice_ticks, smoothed, thinned


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (2.05, 8.3), (-0.3, 0.7), (0, 41_000), (1e-5, 3e-4), (3, 3), (0, 0), (-5, -1)]
)
def test_ticks_are_round_even_and_cover_the_range(low: float, high: float) -> None:
    ticks, step = nice_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high
    assert 2 <= len(ticks) <= 9
    assert all(b - a == pytest.approx(step) for a, b in itertools.pairwise(ticks))
    assert min(abs(step / 10 ** math.floor(math.log10(step)) - m) for m in (1, 2, 2.5, 5, 10)) < 1e-9


def test_smoothing_keeps_constants_lags_not_and_keeps_gaps() -> None:
    assert smoothed([3.0] * 100) == pytest.approx([3.0] * 100)
    ramp = smoothed([float(i) for i in range(200)])
    assert ramp[100] == pytest.approx(100)
    broken = smoothed([1.0] * 50 + [math.nan] + [1.0] * 50)
    assert math.isnan(broken[50]) and sum(math.isnan(v) for v in broken) == 1


def test_thinning_keeps_ends_extremes_and_gaps() -> None:
    x = [float(i) for i in range(10_000)]
    y = [0.0] * 10_000
    y[1234], y[4321], y[9000] = 50.0, -50.0, math.nan
    y[5000:5100] = [math.nan] * 100
    tx, ty = (thin.tolist() for thin in thinned(np.array(x), np.array(y)))
    assert len(tx) <= svg.MAX_POINTS + 2 and tx == sorted(tx)
    assert {0.0, 9999.0, 1234.0, 4321.0} <= set(tx)
    assert any(math.isnan(v) for v in ty)


def test_a_long_curve_is_smoothed_from_means_and_keeps_long_gaps() -> None:
    x, y = np.arange(100_000.0), np.tile([1.0, 3.0], 50_000)
    y[7], y[60_000:70_000] = math.nan, math.nan
    at, level = averaged(x, y)
    assert len(at) == len(level) <= svg.MAX_LEVELS and at[0] > 0 and at[-1] < 99_999
    known = np.isfinite(level)
    assert not known[(at > 60_100) & (at < 69_900)].any() and known[(at < 59_900) | (at > 70_100)].all()
    assert np.nanmax(abs(level - 2.0)) < 0.1
    assert [series.tolist() for series in averaged(x[:5], y[:5])] == [[0, 1, 2, 3, 4], [1, 3, 1, 3, 1]]


def readout(drawing: str) -> Any:
    (data,) = re.findall(r"data-chart='([^']+)'", drawing)
    return json.loads(html.unescape(data))


def test_a_chart_of_a_long_curve_shows_its_extremes() -> None:
    y = np.ones(300_000)
    y[123_456] = -5.0
    drawing = line_chart([Line("a", np.arange(300_000), y, 0)], title="T")
    data = readout(drawing)
    (line,) = data["lines"]
    assert line["y"][line["x"].index(123_456)] == -5.0 and len(line["x"]) <= svg.MAX_POINTS + 2


def path_data(drawing: str) -> list[str]:
    return re.findall(r' d="([^"]+)"', drawing)


def test_a_band_and_marks_lie_where_the_axes_say() -> None:
    line = svg.Line("a", [0, 10], [1.0, 3.0], 0)
    band, marks = svg.Band([0, 10], [0.0, 0.0], [4.0, 4.0]), [(5, "alert", "<x>"), (11, "alert", "outside")]
    drawing = svg.line_chart([line], title="T", band=band, marks=marks)
    left, right, floor = svg.LEFT, svg.WIDTH - svg.RIGHT, svg.HEIGHT - svg.BOTTOM
    assert f'<path class="c5 area" d="M{left} {svg.TOP} {right} {svg.TOP} {right} {floor} {left} {floor}Z"/>' in drawing
    assert drawing.count('class="mark') == 1 and f'x1="{(left + right) / 2:.0f}"' in drawing and "&lt;x&gt;" in drawing


def test_values_land_where_the_axis_says() -> None:
    drawing = line_chart([Line("a", [0, 50, 100], [0.0, 1.0, 0.5], 0)], title="T", kind="percent", zero=True)
    floor, left, right = svg.HEIGHT - svg.BOTTOM, svg.LEFT, svg.WIDTH - svg.RIGHT
    middle = (floor + svg.TOP) / 2
    assert path_data(drawing) == [f"M{left} {floor} {(left + right) // 2} {svg.TOP} {right} {middle:g}"]
    assert ">100%</text>" in drawing and ">60</text>" in drawing


def test_a_gap_breaks_the_line_and_a_lone_point_is_a_dot() -> None:
    y = [1.0, 2.0, math.nan, 3.0, math.nan, 4.0, 5.0]
    drawing = line_chart([Line("a", list(range(7)), y, 0)], title="T")
    assert path_data(drawing)[0].count("M") == 2
    assert drawing.count("<circle") == 5
    assert "nan" not in drawing.lower()


def test_one_point_and_no_point() -> None:
    one = line_chart([Line("a", [5], [2.0], 0)], title="T")
    assert one.count("<circle") == 1 and "nan" not in one and not path_data(one)
    assert line_chart([Line("a", [1, 2], [math.nan, math.nan], 0)], title="T") == ""
    assert line_chart([], title="T") == ""


def test_nothing_but_zeros_stands_on_the_axis() -> None:
    low, high, above = svg.value_range([0.0, 0.0], False)
    assert low == 0.0 < high and not above


def test_the_readout_holds_the_logged_values() -> None:
    drawing = line_chart([Line("<a>", [0, 1, 2], [0.12345, math.nan, 7.0], 3)], title="T & U")
    data = readout(drawing)
    assert data["lines"] == [{"label": "<a>", "c": 3, "x": [0, 1, 2], "y": [0.12345, None, 7.0]}]
    assert "<title>T &amp; U: &lt;a&gt; from 0.123 at step 0 to 7.000 at step 2.</title>" in drawing


def test_a_chart_over_tokens_says_so() -> None:
    drawing = line_chart([Line("length", [0, 4096, 200_000], [8, 8, 64], 0)], title="T", kind="count", over="tokens")
    assert "<title>T: length from 8 at 0 tokens to 64 at 200k tokens.</title>" in drawing
    assert ">tokens</text>" in drawing and ">step</text>" not in drawing and ">200k</text>" in drawing


def test_a_spike_is_named_and_does_not_flatten_the_curve() -> None:
    y = [1.0 + 0.01 * (i % 7) for i in range(200)]
    y[100] = 500.0
    drawing = line_chart([Line("a", list(range(200)), y, 0)], title="T")
    assert "1 above the axis" in drawing
    assert ">500</text>" not in drawing


def test_interval_bar_marks_and_clamps() -> None:
    marks = [(0.25, "chance", "guessing 25%"), (math.nan, "constant", "none")]
    bar = svg.interval_bar(-0.1, 0.5, 1.2, marks=marks, title="T")
    assert bar.count('class="mark') == 1 and "guessing 25%" in bar
    assert 'x="4" y="8" width="212"' in bar and 'cx="110"' in bar
    assert "<circle" not in svg.interval_bar(math.nan, math.nan, math.nan, title="T")


def test_a_histogram_says_its_shares() -> None:
    assert svg.histogram({}) == "" and svg.histogram({"A": 0.0}) == ""
    assert "A: 30 (75.0%)" in svg.histogram({"A": 30.0, "B": 10.0})
