"""A pasted question is read in every form in which exams are printed, and what cannot be read is refused with what to do."""

import pytest

from osler.runtime.errors import UserError
from osler.tasks.item import render_question
from osler.tasks.pasted import read_pasted
from osler.tasks.registry import load_clinic

WANTED = "Which drug is best?", ("amoxicillin", "oral ibuprofen", "none of (A) and (B)")


@pytest.mark.parametrize(
    "text",
    [
        "Which drug is best? (A) amoxicillin (B) oral ibuprofen (C) none of (A) and (B)",
        "Which drug is best?\n(A) amoxicillin\n(B) oral\nibuprofen\n(C) none of (A) and (B)",
        "Which drug is best?\nA. amoxicillin\nB. oral ibuprofen\nC. none of (A) and (B)\n\nAmoxicillin is a penicillin.",
        "  Which drug is best?\r\n a) amoxicillin;\r\n b) oral  ibuprofen;\r\n c) none of (A) and (B)\r\n",
        "Which drug is best?\n[A] amoxicillin\n[B] oral ibuprofen\n[C] none of (A) and (B)\nCorrect answer: [B]\nBecause.",
        "Which drug is best? A. amoxicillin B. oral ibuprofen C. none of (A) and (B)",
    ],
)
def test_printed_forms(text):
    assert read_pasted(text) == WANTED


def test_osler_s_own_form():
    assert read_pasted("Which is best? amoxicillin (A) ibuprofen (B).") == ("Which is best?", ("amoxicillin", "ibuprofen"))
    assert read_pasted("The drug is\namoxicillin (A)\nibuprofen (B)") == ("The drug is", ("amoxicillin", "ibuprofen"))
    for item in load_clinic(split="train", limit=50):
        assert read_pasted(render_question(item)) == (item.question.strip(), item.options)


def test_letters_of_the_question_are_no_options():
    question, options = read_pasted("Vitamin (A) or vitamin (B)? (A) the first (B) the second (C) both (D) none")
    assert (question, options) == ("Vitamin (A) or vitamin (B)?", ("the first", "the second", "both", "none"))


def test_letters_that_only_look_like_those_of_options_are_text():
    assert read_pasted("At 310\n\u212a. what is best?\nA) ice\nB) tea") == ("At 310\n\u212a. what is best?", ("ice", "tea"))
    assert read_pasted("Which?\nA) ice\nB) tea\n\u0130. milk")[1] == ("ice", "tea \u0130. milk")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Which drug is best?", "no options"),
        ("Which? (A) amoxicillin (C) ibuprofen", "no options"),
        ("Which? (A) (B) ibuprofen", "Option A .* is empty"),
        ("Which? (A) ibuprofen (B) ibuprofen.", "Two options .* `ibuprofen.`"),
        ("the drug amoxicillin (A) ibuprofen (B)", "does not end before option A"),
        ("", "no options"),
    ],
)
def test_what_cannot_be_read_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        read_pasted(text)


@pytest.mark.parametrize("text", ["(A)" * 100_000, "\n" * 100_000, "A. " * 100_000, "(A) " + " " * 100_000, "\nthe " * 50_000])
def test_a_hostile_text_takes_no_longer_than_a_long_one(text):
    """A pattern or a loop that goes back for every letter would take hours here."""
    with pytest.raises(UserError):
        read_pasted(text)
