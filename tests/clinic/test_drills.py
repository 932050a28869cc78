"""Drills: what is asked again has the letter it had, and nothing says which condition has which fact."""

from __future__ import annotations

import re

from osler.clinic.drills import cards, drills, phrase_pool

LETTERED = re.compile(r"(.+?) (\([A-F]\)) ?")


def test_what_is_asked_again_has_the_letter_it_had() -> None:
    letters = set()
    for text in cards(0, 300):
        first, second = text.removeprefix("Cards: ").removesuffix(".").split(". Again: ")
        pairs, asked = LETTERED.findall(first), LETTERED.findall(second)
        assert 4 <= len(pairs) <= 6 and len(asked) == len(pairs) + 2
        assert set(asked) <= set(pairs)
        assert [letter for _, letter in pairs] == [f"({letter})" for letter in "ABCDEF"[: len(pairs)]]
        assert all(phrase in phrase_pool() for phrase, _ in pairs)
        letters.update(letter for _, letter in asked)
    assert letters == {f"({letter})" for letter in "ABCDEF"}


def test_a_seed_is_a_text() -> None:
    assert list(cards(1, 20)) == list(cards(1, 20))
    assert list(cards(1, 20)) != list(cards(2, 20))
    assert list(drills(1, 20)) == list(drills(1, 20))
    assert list(drills(1, 20)) != list(drills(2, 20))


def test_a_drill_names_its_right_option_and_no_fact() -> None:
    items = list(drills(0, 400))
    for item in items:
        assert len(set(item.options)) == 4 and item.answer in item.question and item.answer in item.thinking
        assert item.condition == item.relation == "" and item.findings == ()
    counts = [sum(item.answer_index == index for item in items) for index in range(4)]
    assert min(counts) > 70 and len({item.id for item in items}) == 400
