"""How an item is shown, and when two items are the same question."""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osler.tasks.item import (
    ExamItem,
    permute,
    points_at_options,
    render_answer,
    render_question,
    reorder,
    shared_questions,
)
from osler.tasks.registry import load_clinic

DRUGS = ("penicillin", "amoxicillin", "vancomycin", "doxycycline")
ITEM = ExamItem(id="x1", question="First-line treatment?", options=DRUGS, answer_index=1)


def test_options_are_written_as_text_then_letter() -> None:
    assert render_question(ITEM) == ("First-line treatment? penicillin (A) amoxicillin (B) vancomycin (C) doxycycline (D)")
    assert render_answer(ITEM) == "amoxicillin (B)"


def test_an_order_moves_the_texts_and_not_the_letters() -> None:
    shown = render_question(reorder(ITEM, (3, 2, 1, 0)))
    assert shown.endswith("doxycycline (A) vancomycin (B) amoxicillin (C) penicillin (D)")


def test_a_context_stands_before_the_question_and_free_answers_have_no_letters() -> None:
    shown = render_question(ExamItem(id="c", question="So?", options=("yes", "no"), answer_index=0, context="Abstract."))
    assert shown == "Abstract.\nSo? yes (A) no (B)"
    free = ExamItem(id="g", question="6 x 7?", options=(), answer_index=-1, answer="42")
    assert render_question(free) == "6 x 7?" and render_answer(free) == "42" and permute(free, 1, 2) == free


def test_an_answer_outside_the_options_is_refused() -> None:
    with pytest.raises(ValueError, match="x1"):
        ExamItem(id="x1", question="?", options=("a", "b"), answer_index=2)


@settings(derandomize=True)
@given(seed=st.integers(0, 2**40), visit=st.integers(0, 10**6), answer=st.integers(0, 4))
def test_permuting_keeps_the_right_answer(seed: int, visit: int, answer: int) -> None:
    item = ExamItem(id="p", question="?", options=("a", "b", "c", "d", "e"), answer_index=answer)
    moved = permute(item, seed, visit)
    assert moved.options[moved.answer_index] == item.options[answer]
    assert sorted(moved.options) == sorted(item.options)
    assert moved == permute(item, seed, visit)


def test_the_right_option_of_equal_texts_stays_the_right_one() -> None:
    twins = ExamItem(id="t", question="?", options=("same", "same", "other"), answer_index=1)
    assert [reorder(twins, order).answer_index for order in [(0, 1, 2), (1, 0, 2), (2, 0, 1)]] == [1, 0, 2]


POINTING = [
    "All of the above", "none of the above.", "None of these", "Any of the above", "both of them", "Both", "Neither", "None",
    "ALL", "All are correct", "Both are true", "Both 1 and 2", "1 and 2", "1, 2, and 3", "A and C", "A, B & D", "(A) or (C)",
    "a but not b", "Both A and B", "Both AB", "B only", "Only 3", "options B and D", "Option B",
    "Both option 2 and 3", "II and III", "a, b are true & c, d are false",
    "First can be any of the above but it should end with maxilla", "All of the following",
]  # fmt: skip
NOT_POINTING = [
    "amoxicillin", "A", "AB", "1", "1.5", "1/2", "2-3", "1-2 days", "yes", "True", "Above the clavicle", "Below",
    "Hepatitis B and C", "Both kidneys", "All trans retinoic acid", "Type 1 and 2", "Vitamin A and D", "Choice of hangman",
    "Spinal cord", "Enzymes of only one of those is present at a time",
    "Altitude of area above sea level", "None of the mother's cells",
    "Treatment option a patient prefers", "Drug A will not decrease blood pressure",
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), [*((t, True) for t in POINTING), *((t, False) for t in NOT_POINTING)])
def test_options_that_point_at_options_are_known(text: str, expected: bool) -> None:
    assert points_at_options(text) == expected


def test_options_that_point_at_options_are_not_permuted() -> None:
    for pointer in POINTING:
        item = ExamItem(id="p", question="?", options=("renin", "insulin", pointer, "gastrin"), answer_index=2)
        assert item.keeps_order and all(permute(item, 7, visit) == item for visit in range(20))
    assert not ITEM.keeps_order and any(permute(ITEM, 7, visit) != ITEM for visit in range(20))


def test_an_option_that_is_there_twice_is_right_twice() -> None:
    item = ExamItem(id="t", question="?", options=("4.6", "4.61", " 4.6", "5"), answer_index=0)
    assert [item.is_right(index) for index in range(4)] == [True, False, True, False]
    assert item.repeats_an_option and not ITEM.repeats_an_option
    genotypes = ExamItem(id="g", question="?", options=("AA", "Aa", "aa"), answer_index=1)
    assert [genotypes.is_right(index) for index in range(3)] == [False, True, False]


def test_all_orders_come_equally_often() -> None:
    item = ExamItem(id="o", question="?", options=("a", "b", "c"), answer_index=0)
    counts = Counter(permute(item, 7, visit).options for visit in range(6000))
    assert len(counts) == 6
    assert sum((n - 1000) ** 2 / 1000 for n in counts.values()) < 20.5  # chi-square, 5 degrees, p = 0.001


def test_visits_seeds_and_items_are_permuted_independently() -> None:
    orders = {
        tuple(permute(ExamItem(id=name, question="?", options=DRUGS, answer_index=0), seed, visit).options for visit in range(6))
        for seed in range(3)
        for name in ("a", "b")
    }
    assert len(orders) == 6


# ---- the same question

QUESTION = ExamItem(
    id="a",
    question="A man with Ménière disease has vertigo: which drug helps at first?",
    options=("betahistine", "aspirin", "insulin", "zinc"),
    answer_index=0,
)
STATEMENTS = ("one", "two", "three", "All of the above")
GENERIC = ExamItem(id="g", question="Which of the following is true?", options=STATEMENTS, answer_index=0)
PATIENTS = "Forty patients with vertigo were randomised."
ABSTRACT = replace(QUESTION, question="Does it help?", context=PATIENTS, options=("yes", "no", "maybe"))
SUM = ExamItem(id="s", question="What is 6 x 7?", options=(), answer_index=-1, answer="42")


@pytest.mark.parametrize(
    ("item", "other", "same"),
    [
        (QUESTION, QUESTION, True),
        (QUESTION, replace(QUESTION, options=(*QUESTION.options, "water")), True),
        (QUESTION, replace(QUESTION, options=QUESTION.options[::-1], answer_index=3), True),
        (QUESTION, replace(QUESTION, options=("rest", "surgery"), answer_index=1), True),
        (QUESTION, replace(QUESTION, question=QUESTION.question.upper()), True),
        (QUESTION, replace(QUESTION, question=unicodedata.normalize("NFD", QUESTION.question)), True),
        (QUESTION, replace(QUESTION, question="“A man, with Ménière  disease, has vertigo –\nwhich drug helps at first”"), True),
        (QUESTION, replace(QUESTION, question=QUESTION.question.replace("man", "woman")), False),
        (ABSTRACT, replace(ABSTRACT, answer_index=1), True),
        (ABSTRACT, replace(ABSTRACT, context="", question=f"{ABSTRACT.context} {ABSTRACT.question}"), True),
        (ABSTRACT, replace(ABSTRACT, context="Forty patients with gout were randomised."), False),
        (GENERIC, replace(GENERIC, options=("four", "five", "six", "All of the above")), False),
        (GENERIC, replace(GENERIC, options=("Two.", "ONE", "six", "seven", "All of the above")), True),
        (GENERIC, replace(GENERIC, question="which of the following is TRUE"), True),
        (SUM, replace(SUM, question="what is 6 x 7"), True),
        (SUM, replace(SUM, question="What is 6 + 7?", answer="13"), False),
        (replace(SUM, question="What is 6 - 7?", answer="-1"), replace(SUM, question="What is 6 + 7?", answer="13"), False),
        (replace(SUM, question="?"), replace(SUM, question="!"), False),
    ],
)
def test_the_same_question(item: ExamItem, other: ExamItem, same: bool) -> None:
    assert shared_questions([item], [replace(GENERIC, question="Another?"), other]) == ([(item, other)] if same else [])


def test_the_clinic_shares_no_question_between_its_splits() -> None:
    trained = load_clinic(split="train", limit=2000)
    assert shared_questions(trained, load_clinic(split="validation", limit=500)) == []
    assert len(shared_questions(trained, trained[:50])) == 50
