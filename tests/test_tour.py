"""`make tour` finds each of its places once."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("tour", Path(__file__).parents[1] / "scripts" / "tour.py")
tour = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tour)
FOUND = tour.find()


@pytest.mark.parametrize("name", FOUND)
def test_every_place_is_found_once(name):
    [place] = FOUND[name]
    source = (tour.PACKAGE.parent / place.path).read_text().splitlines()
    assert name.rpartition(".")[2] in source[place.line - 1] and place.meaning
