"""The same question is found however it is written, and a question that says little is not taken for another."""

from __future__ import annotations

import os
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest

from osler.tasks import medmcqa
from osler.tasks.clinic import load as load_clinic
from osler.tasks.item import ExamItem
from osler.tasks.overlap import shared_questions

ITEM = ExamItem(
    id="a",
    question="A man with Ménière disease has vertigo: which drug helps at first?",
    options=("betahistine", "aspirin", "insulin", "zinc"),
    answer_index=0,
)
STATEMENTS = ("one", "two", "three", "All of the above")
GENERIC = ExamItem(id="g", question="Which of the following is true?", options=STATEMENTS, answer_index=0)
PATIENTS = "Forty patients with vertigo were randomised."
ABSTRACT = replace(ITEM, question="Does it help?", context=PATIENTS, options=("yes", "no", "maybe"))
SUM = ExamItem(id="s", question="What is 6 x 7?", options=(), answer_index=-1, answer="42")


@pytest.mark.parametrize(
    ("item", "other", "same"),
    [
        (ITEM, ITEM, True),
        (ITEM, replace(ITEM, options=(*ITEM.options, "water")), True),
        (ITEM, replace(ITEM, options=ITEM.options[::-1], answer_index=3), True),
        (ITEM, replace(ITEM, options=("rest", "surgery"), answer_index=1), True),
        (ITEM, replace(ITEM, question=ITEM.question.upper()), True),
        (ITEM, replace(ITEM, question=unicodedata.normalize("NFD", ITEM.question)), True),
        (ITEM, replace(ITEM, question="“A man, with Ménière  disease, has vertigo –\nwhich drug helps at first”"), True),
        (ITEM, replace(ITEM, question=ITEM.question.replace("man", "woman")), False),
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


def test_real_questions_are_told_apart() -> None:
    root = os.environ.get("OSLER_SHARED_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data"
    path = Path(root) / "exams" / "medmcqa-validation-2000.jsonl"
    if not path.is_file():
        pytest.skip("the real exam files are not here; set OSLER_SHARED_DATA to the folder that has exams/")
    items = medmcqa.load(path)
    pairs = shared_questions(items[:1000], items[1000:])
    assert len(pairs) == 3  # the file has them twice, with a letter or the case of an option changed
    assert all(item.answer_index == other.answer_index for item, other in pairs)
