"""Mixtures: weights hold over every thousand rows, and each source goes on where it was."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from osler.data.mixture import PERIOD, Mixture
from osler.data.order import Order
from osler.data.packing import MixedPacking, StreamPacking, WholePacking

WEIGHTS = st.lists(st.floats(0.01, 1), min_size=1, max_size=9)


@given(WEIGHTS)
def test_any_thousand_rows_hold_the_weights(weights: list[float]) -> None:
    mixture = Mixture(weights)
    sources = [mixture.locate(row)[0] for row in range(2 * PERIOD)]
    counts = np.cumsum(np.eye(len(weights), dtype=int)[sources], axis=0)
    windows = counts[PERIOD:] - counts[:-PERIOD]
    assert np.abs(windows / PERIOD - np.array(weights) / sum(weights)).max() <= 0.001
    assert np.abs(counts - np.outer(range(1, 2 * PERIOD + 1), mixture.fractions)).max() < 1, "within one row at any time"


@given(WEIGHTS, st.integers(0, 5000))
def test_a_row_is_found_without_those_before_it(weights: list[float], count: int) -> None:
    mixture = Mixture(weights)
    dealt = [0] * len(weights)
    for row in range(count):
        source, number = mixture.locate(row)
        assert number == dealt[source]
        dealt[source] += 1
    assert mixture.rows(count) == dealt


def test_the_rows_are_these_in_every_version() -> None:
    """A stored run resumes in this order: if it changes, every old run breaks silently."""
    mixture = Mixture([85, 15])
    assert "".join(str(mixture.locate(row)[0]) for row in range(20)) == "00010000001000001000"
    assert mixture.locate(10**15) == (0, 850_000_000_000_000)


@pytest.mark.parametrize("weights", [[0, 0], [1, 1e-5]])
def test_weights_that_cannot_be_honoured_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weight"):
        Mixture(weights)
    assert Mixture([3, 0]).rows(7) == [7, 0], "a source may rest"


@pytest.mark.parametrize("kind", [StreamPacking, WholePacking])
def test_each_source_is_packed_by_itself(kind, make_shards) -> None:  # type: ignore[no-untyped-def]
    """Also where documents are kept whole: then weights are shares of the rows, and padding is that of each source's rows."""
    parts = {name: kind(Order(make_shards(lengths), 0), 8) for name, lengths in [("a", [9, 5, 30]), ("b", [40, 3])]}
    packing = MixedPacking(parts, Mixture([2, 1]))
    rows = {name: itertools.count() for name in parts}
    for index in range(30):
        name = "ab"[packing.mixture.locate(index)[0]]
        assert np.array_equal(packing.row(index).ids, parts[name].row(next(rows[name])).ids)
    assert packing.tokens(30) == {name: part.tokens(count) for (name, part), count in zip(parts.items(), (20, 10), strict=True)}
    used = sum(packing.tokens(30).values()) / (30 * 9)
    assert packing.padding(0, 30) == (0 if kind is StreamPacking else pytest.approx(1 - used))
    skipping = MixedPacking(parts, packing.mixture, [3, 2])
    assert np.array_equal(skipping.row(0).ids, parts["a"].row(3).ids)
