"""The charts: round ticks, gaps that stay gaps, values where they belong, which curves share one, how numbers are written."""

import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from osler.monitor.metrics import METRICS
from osler.report import svg
from osler.report.charts import FAMILIES, OTHER, bundle, charts_of, family_of, kind_of
from osler.report.curves import Series
from osler.report.page import PAGES
from osler.report.read import StageLog
from osler.report.svg import Line, averaged, line_chart, nice_ticks, smoothed, thinned
from osler.runtime import format as fmt

PARTS = PAGES.get_template("parts.html").module
FLOOR, LEFT, RIGHT = svg.HEIGHT - svg.BOTTOM, svg.LEFT, svg.WIDTH - svg.RIGHT


@pytest.mark.parametrize(("low", "high"), [(0, 1), (2.05, 8.3), (-0.3, 0.7), (0, 41_000), (1e-5, 3e-4), (3, 3), (0, 0), (-5, -1)])
def test_ticks_are_round_even_and_cover_the_range(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 9
    assert all(b - a == pytest.approx(step) for a, b in itertools.pairwise(ticks))
    assert min(abs(step / 10 ** math.floor(math.log10(step)) - m) for m in (1, 2, 2.5, 5, 10)) < 1e-9


def test_smoothing_keeps_constants_lags_not_and_keeps_gaps() -> None:
    assert smoothed([3.0] * 100) == pytest.approx([3.0] * 100)
    assert smoothed(range(200))[100] == pytest.approx(100)
    broken = smoothed([1.0] * 50 + [math.nan] + [1.0] * 50)
    assert math.isnan(broken[50]) and np.isnan(broken).sum() == 1


def test_thinning_keeps_ends_extremes_and_gaps() -> None:
    y = np.zeros(10_000)
    y[1234], y[4321], y[9000], y[5000:5100] = 50.0, -50.0, math.nan, math.nan
    tx, ty = thinned(np.arange(10_000), y)
    assert len(tx) <= svg.MAX_POINTS + 2 and tx.tolist() == sorted(tx)
    assert {0, 9999, 1234, 4321} <= set(tx.tolist()) and np.isnan(ty).any()


def test_a_long_curve_is_smoothed_from_means_and_keeps_long_gaps() -> None:
    x, y = np.arange(100_000.0), np.tile([1.0, 3.0], 50_000)
    y[7], y[60_000:70_000] = math.nan, math.nan
    at, level = averaged(x, y)
    known = np.isfinite(level)
    assert len(at) == len(level) <= svg.MAX_POINTS and at[0] > 0 and at[-1] < 99_999 and np.nanmax(abs(level - 2.0)) < 0.1
    assert not known[(at > 60_300) & (at < 69_700)].any() and known[(at < 59_700) | (at > 70_300)].all()
    assert [series.tolist() for series in averaged(x[:5], y[:5])] == [[0, 1, 2, 3, 4], [1, 3, 1, 3, 1]]


def chart(y: Sequence[float] | npt.NDArray[np.float64], x: Sequence[int] | None = None, **how: Any) -> str:
    """One line over its places, or over x."""
    return PARTS.chart(line_chart([Line(how.pop("label", "a"), range(len(y)) if x is None else x, y, 3)], title="T", **how))


def readout(drawing: str) -> Any:
    (data,) = re.findall(r"data-chart='([^']+)'", drawing)
    return json.loads(data)["lines"]


def path_data(drawing: str) -> list[str]:
    return re.findall(r' d="([^"]+)"', drawing)


def test_a_band_and_marks_lie_where_the_axes_say() -> None:
    band = svg.Band(np.array([0, 10]), np.array([0.0, 0.0]), np.array([4.0, 4.0]))
    drawing = chart([1.0, 3.0], [0, 10], band=band, marks=[(5, "alert", "<x>"), (11, "alert", "outside")])
    assert path_data(drawing)[0] == f"M{LEFT} {svg.TOP} {RIGHT} {svg.TOP} {RIGHT} {FLOOR} {LEFT} {FLOOR}Z"
    assert drawing.count('class="mark') == 1 and f'x1="{(LEFT + RIGHT) / 2:.0f}"' in drawing and "&lt;x&gt;" in drawing


def test_values_land_where_the_axis_says() -> None:
    drawing = chart([0.0, 1.0, 0.5], [0, 50, 100], kind="percent", zero=True)
    assert path_data(drawing) == [f"M{LEFT} {FLOOR} {(LEFT + RIGHT) // 2} {svg.TOP} {RIGHT} {(FLOOR + svg.TOP) / 2:g}"]
    assert ">100%</text>" in drawing and ">60</text>" in drawing
    low, high, above = svg.value_range([0.0, 0.0], False)
    assert low == 0.0 < high and not above, "nothing but zeros stands on the axis"


def test_a_gap_breaks_the_line_and_a_lone_point_is_a_dot() -> None:
    drawing = chart([1.0, 2.0, math.nan, 3.0, math.nan, 4.0, 5.0])
    assert path_data(drawing)[0].count("M") == 2 and drawing.count("<circle") == 5 and "nan" not in drawing.lower()
    one = chart([2.0], [5])
    assert one.count("<circle") == 1 and "nan" not in one and not path_data(one)
    assert line_chart([Line("a", [0, 1], [math.nan, math.nan], 0)], title="T") == line_chart([], title="T") == {}


def test_the_readout_and_the_words_hold_the_logged_values() -> None:
    drawing = chart([0.12345, math.nan, 7.0], label="<a> & b's")
    assert readout(drawing) == [{"label": "<a> & b's", "c": 3, "x": [0, 1, 2], "y": [0.12345, None, 7.0]}]
    assert "<title>T: &lt;a&gt; &amp; b&#39;s from 0.123 at step 0 to 7.000 at step 2.</title>" in drawing
    drawing = chart([8, 8, 64], [0, 4096, 200_000], kind="count", over="tokens", label="length")
    assert "<title>T: length from 8 at 0 tokens to 64 at 200k tokens.</title>" in drawing
    assert ">tokens</text>" in drawing and ">step</text>" not in drawing and ">200k</text>" in drawing


def test_a_spike_is_named_and_does_not_flatten_the_curve() -> None:
    drawing = chart([500.0 if i == 100 else 1.0 + 0.01 * (i % 7) for i in range(200)])
    assert "1 above the axis" in drawing and ">500</text>" not in drawing


def test_the_farthest_layer_is_the_one_that_is_not_finite() -> None:
    layers = {n: Series([1, 2], [1.0, 1.0 + n * n / 10]) for n in range(6)}
    lines_, band = bundle(layers)
    assert [line.label for line in lines_] == ["layer 0", "layer 3", "layer 5, farthest from the others"]
    assert (list(band.x), list(band.low), list(band.high)) == ([1, 2], [1.0, 1.0], [1.0, 3.5])
    layers[1] = Series([1, 2], [1.0, math.nan])
    assert "layer 1, farthest from the others" in [line.label for line in bundle(layers)[0]]
    lines_, band = bundle({0: Series([1], [math.nan])})
    assert [line.label for line in lines_] == ["layer 0"] and not len(band.x)


@pytest.mark.parametrize(
    ("names", "family", "expected"),
    [
        ([f"rewards/r{i}/mean" for i in range(10)], "Reinforcement learning",
         [[f"r{i}" for i in range(8)], ["r8", "r9"]]),
        (["perf/data_ms", "perf/forward_ms", "perf/loading_ms"], "Performance",
         [["data", "forward"], ["loading_ms"]]),
    ],
    ids=["of one row", "read beside one another"],
)  # fmt: skip
def test_metrics_that_belong_together_share_a_chart(names: list[str], family: str, expected: list[list[str]]) -> None:
    stage = StageLog(Path("none"))
    stage.log.curves = {name: Series([1], [1.0]) for name in names}
    ((found, charts),) = charts_of(stage, 0)[1]
    assert found.title == family and [[line.label for line in chart["lines"]] for chart in charts] == expected
    assert len({line.colour for line in charts[0]["lines"]}) == len(charts[0]["lines"])


def test_every_metric_of_the_table_has_a_family() -> None:
    assert [name for name in METRICS if family_of(name) is OTHER] == []
    assert family_of("train/grad_norm").title == "Gradients" and family_of("train/loss").title == "Quality"
    for each in FAMILIES:
        assert {family_of(row) for spec in each.charts for row, _ in spec.lines} <= {each}


WRITTEN: dict[Callable[..., str], dict[float | tuple[object, ...], str]] = {
    fmt.duration: {
        0.84: "0.8 s", 9.97: "10 s", 41: "41 s", 59.6: "1 min 00 s", 252: "4 min 12 s", 3599.6: "1 h 00 min", 7500: "2 h 05 min",
        3 * 86400 + 4 * 3600: "3 d 4 h", math.nan: "–", -1: "–",
    },
    fmt.number: {
        0: "0", 2.1337: "2.134", 21.337: "21.34", 213.37: "213.4", 2133.7: "2,134", 0.02134: "0.0213", 3e-4: "3.00e−4",
        -3e-4: "−3.00e−4", -1.5: "−1.500", 1_234_567: "1.23M", math.inf: "–", 9.1e29: "9.1e+29", -2e15: "−2.0e+15",
        9.1e14: "910T",
    },
    fmt.count: {1: "1", 1273: "1,273", 99_900: "99,900", 123_456: "123k", 999_999: "1.00M", 4.56e9: "4.56B"},
    fmt.size: {512: "512 B", 512_000: "512 kB", 2.5e9: "2.50 GB", math.nan: "–"},
    fmt.percent: {0.6133: "61.3%", math.nan: "–"},
    fmt.points: {0.041: "+4.1", -0.041: "−4.1", 0.0001: "0.0", -0.0001: "0.0"},
    fmt.plural: {(1, "question"): "1 question", (1273, "question"): "1,273 questions"},
    fmt.tick: {
        0: "0", 1.5: "1.5", -0.0002: "−0.0002", 2e-5: "2e−05", 800: "800", (40_000, "count"): "40k", 2_500_000: "2.5M",
        (0.25, "percent"): "25%", (0.025, "percent"): "2.5%", (2e9, "bytes"): "2G",
    },
    fmt.value: {(1.8374, kind_of("train/perplexity")): "1.837", (12345.0, kind_of("data/tokens/textbook")): "12,345"},
}  # fmt: skip


@pytest.mark.parametrize("write", WRITTEN, ids=lambda write: write.__name__)
def test_a_number_is_written_in_one_way(write: Callable[..., str]) -> None:
    for given, text in WRITTEN[write].items():
        assert write(*given if isinstance(given, tuple) else (given,)) == text, given
