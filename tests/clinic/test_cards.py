"""Matching cards: both halves hold the same lettered phrases, and nothing in them says which condition has which fact."""

from __future__ import annotations

import re

from osler.clinic.cards import cards, phrase_pool

LETTERED = re.compile(r"(.+?) (\([A-F]\)) ?")


def test_both_halves_hold_the_same_pairs_in_another_order() -> None:
    reordered = 0
    for text in cards(0, 300):
        first, second = text.removeprefix("Cards: ").removesuffix(".").split(". Again: ")
        pairs, again = LETTERED.findall(first), LETTERED.findall(second)
        assert 4 <= len(pairs) <= 6
        assert sorted(pairs) == sorted(again)
        assert [letter for _, letter in pairs] == [f"({letter})" for letter in "ABCDEF"[: len(pairs)]]
        assert all(phrase in phrase_pool() for phrase, _ in pairs)
        reordered += pairs != again
    assert reordered > 270


def test_a_seed_is_a_text() -> None:
    assert list(cards(1, 20)) == list(cards(1, 20))
    assert list(cards(1, 20)) != list(cards(2, 20))
