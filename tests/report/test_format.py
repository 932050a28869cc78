"""Numbers are written in one way each."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from osler.report import format as fmt
from osler.report.charts import kind_of

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
        (0, 0.5): "0", (1.5, 0.5): "1.5", (1, 0.5): "1.0", (40_000, 20_000, "count"): "40k", (2_500_000, 500_000): "2.5M",
        (0.25, 0.25, "percent"): "25%", (0.025, 0.005, "percent"): "2.5%", (2e-4, 1e-4): "2e−4", (800, 200): "800",
        (2e9, 1e9, "bytes"): "2G",
    },
    fmt.value: {(1.8374, kind_of("train/perplexity")): "1.837", (12345.0, kind_of("data/tokens/textbook")): "12,345"},
}  # fmt: skip


@pytest.mark.parametrize("write", WRITTEN, ids=lambda write: write.__name__)
def test_a_number_is_written_in_one_way(write: Callable[..., str]) -> None:
    for given, text in WRITTEN[write].items():
        assert write(*given if isinstance(given, tuple) else (given,)) == text, given
