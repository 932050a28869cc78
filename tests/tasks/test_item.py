"""How an item is shown, and when two items are the same question."""

import unicodedata
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osler.tasks.item import (
    ExamItem,
    bare,
    permute,
    points_at_options,
    render_answer,
    render_plain,
    render_question,
    reorder,
    shared_questions,
)
from osler.tasks.registry import load_clinic

DRUGS = ("penicillin", "amoxicillin", "vancomycin", "doxycycline")
ITEM = ExamItem(id="x1", question="First-line treatment?", options=DRUGS, answer_index=1)
SUM = ExamItem(id="s", question="What is 6 x 7?", options=(), answer_index=-1, answer="42")


def with_options(*options: str, answer_index: int = 0, name: str = "o") -> ExamItem:
    return ExamItem(id=name, question="?", options=options, answer_index=answer_index)


def test_a_context_stands_first_then_the_question_then_the_options_each_before_its_letter() -> None:
    assert render_question(ITEM) == "First-line treatment? penicillin (A) amoxicillin (B) vancomycin (C) doxycycline (D)"
    assert render_answer(ITEM) == "amoxicillin (B)"
    turned = reorder(ITEM, (3, 2, 1, 0))
    assert render_question(turned).endswith("doxycycline (A) vancomycin (B) amoxicillin (C) penicillin (D)")
    assert render_answer(turned) == "amoxicillin (C)"
    assert render_question(replace(with_options("yes", "no"), context="Abstract.")) == "Abstract.\n? yes (A) no (B)"
    assert render_question(SUM) == SUM.question and render_answer(SUM) == "42" and permute(SUM, 1, 2) == SUM
    with pytest.raises(ValueError, match="item o: answer_index 2 outside its 2 options"):
        with_options("a", "b", answer_index=2)


def test_plain_prompts_by_the_form_of_the_answer() -> None:
    shot = replace(with_options("rash", "cough", answer_index=1), question="Which?")
    item = replace(with_options("yes", "no"), context="Abstract.", shots=(shot,))
    assert {form: render_plain(item, form) for form in ("cloze", "letters", "answer")} == {
        "cloze": "Question: Which?\nAnswer: cough\n\nAbstract: Abstract.\nQuestion: ?\nAnswer:",
        "letters": "Question: Which?\nA. rash\nB. cough\nAnswer: B\n\nAbstract: Abstract.\nQuestion: ?\nA. yes\nB. no\nAnswer:",
        "answer": "Question: Which?\nAnswer: cough (B)\n\nAbstract: Abstract.\nQuestion: ?\nAnswer:",
    }
    assert render_question(bare(item)) == "Which?\nAnswer: cough\n\nAbstract.\n?"
    story = replace(with_options("falls", "flies"), question="A man", context="Baking", is_story=True, shots=(shot,))
    assert render_plain(replace(story, shots=()), "cloze") == "Baking: A man"
    assert render_plain(replace(item, id="medmcqa-1"), "letters").endswith("?\nChoices:\nA. yes\nB. no\nAnswer:")
    solved = ExamItem("gsm8k-1", "1 + 1?", (), -1, thinking="One more.", answer="2")
    asked = replace(solved, id="gsm8k-2", shots=(solved,))
    assert render_plain(asked, "letters") == "Question: 1 + 1?\nAnswer: One more.\n#### 2\n\nQuestion: 1 + 1?\nAnswer:"
    assert render_plain(replace(story, shots=(replace(story, shots=()),)), "cloze") == "Baking: A man falls\n\nBaking: A man"


@settings(derandomize=True)
@given(seed=st.integers(0, 2**40), visit=st.integers(0, 10**6), answer=st.integers(0, 4))
def test_permuting_keeps_the_right_answer(seed: int, visit: int, answer: int) -> None:
    item = with_options("a", "b", "c", "d", "e", answer_index=answer)
    moved = permute(item, seed, visit)
    assert moved.options[moved.answer_index] == item.options[answer]
    assert sorted(moved.options) == sorted(item.options)
    assert moved == permute(item, seed, visit)


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
        item = with_options("renin", "insulin", pointer, "gastrin", answer_index=2)
        assert item.keeps_order and all(permute(item, 7, visit) == item for visit in range(20))
    assert not ITEM.keeps_order and any(permute(ITEM, 7, visit) != ITEM for visit in range(20))


def test_an_option_that_is_there_twice_is_right_twice() -> None:
    item = with_options("4.6", "4.61", " 4.6", "5")
    assert [item.is_right(index) for index in range(4)] == [True, False, True, False]
    genotypes = with_options("AA", "Aa", "aa", answer_index=1)
    assert [genotypes.is_right(index) for index in range(3)] == [False, True, False]
    twins = with_options("same", "same", "other", answer_index=1)
    assert [reorder(twins, order).answer_index for order in [(0, 1, 2), (1, 0, 2), (2, 0, 1)]] == [1, 0, 2]


def test_all_orders_come_equally_often_and_visits_seeds_and_items_are_independent() -> None:
    counts = Counter(permute(with_options("a", "b", "c"), 7, visit).options for visit in range(6000))
    assert len(counts) == 6
    assert sum((n - 1000) ** 2 / 1000 for n in counts.values()) < 20.5  # chi-square, 5 degrees, p = 0.001
    items = [with_options(*DRUGS, name=name) for name in ("a", "b")]
    orders = {tuple(permute(item, seed, visit).options for visit in range(6)) for seed in range(3) for item in items}
    assert len(orders) == 6


# ---- the same question

DRUG = "A man with Ménière disease has vertigo: which drug helps at first?"
QUESTION = replace(with_options("betahistine", "aspirin", "insulin", "zinc"), question=DRUG)
GENERIC = replace(with_options("one", "two", "three", "All of the above"), question="Which of the following is true?")
PATIENTS = "Forty patients with vertigo were randomised."
ABSTRACT = replace(with_options("yes", "no", "maybe"), question="Does it help?", context=PATIENTS)


@pytest.mark.parametrize(
    ("item", "other", "same"),
    [
        (QUESTION, QUESTION, True),
        (QUESTION, replace(QUESTION, options=(*QUESTION.options, "water")), True),
        (QUESTION, replace(QUESTION, options=QUESTION.options[::-1], answer_index=3), True),
        (QUESTION, replace(QUESTION, options=("rest", "surgery"), answer_index=1), True),
        (QUESTION, replace(QUESTION, question=DRUG.upper()), True),
        (QUESTION, replace(QUESTION, question=unicodedata.normalize("NFD", DRUG)), True),
        (QUESTION, replace(QUESTION, question="“A man, with Ménière  disease, has vertigo –\nwhich drug helps at first”"), True),
        (QUESTION, replace(QUESTION, question=DRUG.replace("man", "woman")), False),
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
