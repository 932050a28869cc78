"""How an answer is read: every form has a row, and what is not sure is not read. The exam and the rewards read alike."""

from dataclasses import replace
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osler.eval.exams import grade
from osler.tasks.answers import published_reading, read_answer, read_choice, read_number
from osler.tasks.item import ExamItem, render_answer
from osler.tasks.rewards import correct
from osler.tokenizer.chat import Completion

DRUGS = ("penicillin", "amoxicillin", "vancomycin", "doxycycline")
ITEM = ExamItem(id="x1", question="First-line treatment?", options=DRUGS, answer_index=1)
SUM = ExamItem(id="s1", question="6 x 12?", options=(), answer_index=-1, answer="72")

READ_AS_B = [
    "amoxicillin (B)", "  amoxicillin (B).", "amoxicilin (B)", "amoxicillin (b)", "(B)", "B", "B.", "b", "B)", "B: amoxicillin",
    "B. amoxicillin", "(B) amoxicillin", "amoxicillin", "Amoxicillin.", '"amoxicillin"', "The answer is B", "the answer is B",
    "The answer is (B).", "Answer: B", "Answer: B.", "answer: b", "So the correct answer is: amoxicillin (B).",
    "The answer is amoxicillin.", "Option B", "option (b)", "**B**", "**B.** amoxicillin", "**amoxicillin (B)**", "`B`",
    "**Answer:** B", r"\boxed{B}", r"$\boxed{\text{(B)}}$", "#### B", "（Ｂ）", "Ｂ", "amoxicillin (B), because it is oral",
    "amoxicillin (B) amoxicillin (B)", "A beta lactam (B)", "B\namoxicillin", "answer:B", "The answer is:(B)",
    'The answer is "B"',
    'The answer is "B".', "B is correct", "(B) is correct.", "Option B is the right answer.",
]  # fmt: skip
NOT_READ = [
    "", "   ", "aspirin", "Bacteria", "A fever",  # a letter inside a word, or an article
    "E", "(E)", "amoxicillin (E)", "Answer: E",  # no such option
    "not (A)", "not amoxicillin", "The answer is not B", "It isn't (B)", "anything but (B)", "all except (B)", "rule out (B)",
    "not (A), but (C)", "not A, but C", "Not B but C", "A or B",
    "Neither A nor (B)", "A or (B)", "X or Y (B)", "(A) or (B)", "amoxicillin or penicillin", "both (B)", "A, B", "A B C D",
    "(A) (B) (C) (D)", "B and C", "B/C", "Options B", "penicillin (A) amoxicillin (B)", "penicillin amoxicillin (B)",
    "penicillin (B)", "B. penicillin", "The answer is penicillin (B)",  # the text of one, the letter of another
    "Answer: B Answer: C", r"\boxed{B} \boxed{C}", "#### B #### C", "amoxicillin (B). Wait, penicillin (A).",
    "amoxicillin (B). No.", "maybe (B)", "possibly B", "B?", "I guess (B)",
    "unlikely amoxicillin (B)", "least likely (B)", "less likely (B)", "without amoxicillin (B)", "apart from (B)",
    "contraindicated (B)", "contraindications: (B)", "excluded: (B)", "dont give (B)", "rejecting (B)", "doubtful (B)",
    "(B), I mean the third", "(B). Actually the third", "A amoxicillin", "B penicillin", "B C", "B amoxicillin or penicillin",
    "B is correct or C is", "E is correct", "B is incorrect", "B is correct?", "answer:B or C",
    "Β", "В",  # Greek and Cyrillic
    "(B) is wrong", "?" * 5000 + "(B)",
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), [*((text, 1) for text in READ_AS_B), *((text, None) for text in NOT_READ)])
def test_reading_a_choice(text: str, expected: int | None) -> None:
    assert read_choice(text, DRUGS) == expected


LIKE_LETTERS_OR_DOUBT: dict[tuple[str, ...], dict[str, int | None]] = {
    ("A", "B", "AB", "O"): {"O (D)": 3, "O": 3, "A": 0},
    # the letter A or the blood group A, the letter A of the text B or two letters
    ("B", "A", "AB", "O"): {"A": None, "A (B)": 1, "A B": None, "A is correct": None, '"A"': None},
    ("with", "without"): {"without (B)": 1},
    ("RhO(D)", "x", "y", "B"): {"B (D)": 3},
    ("Vitamin D", "Zinc", "Vitamin (A)", "Iron"): {"Vitamin (A) (C)": 2, "Vitamin (A)": None},
    ("Scurvy", "Vitamin (A) deficiency"): {"Vitamin (A) deficiency": 1},
    ("RhO(D) protects the mother.", "RhO(D) protects the fetus."): {
        "RhO(D) protects the fetus. (B)": 1, "RhO(D) protects the mother. (B)": None,
    },
    ("Proteus", "E. coli", "Klebsiella", "Serratia", "Candida"): {"E. coli": 1},
    ("measles", "mumps", "hepatitis B virus"): {"hepatitis B viru (C)": 2},
    ("raised D-dimer", "ferritin", "lactate", "troponin"): {"raised D-dimers (A)": 0},
    ("growth", "no growth"): {"no grwth (B)": 1},  # the option says "no" itself
    ("AA", "Aa", "aa"): {"Aa": 1, "AA (B)": None, "aA": None},
    ("10²", "102"): {"10² (A)": 0, "102": 1},
    ("x", "_x_"): {"_x_ (B)": 1},
    ("yes", "no", "maybe"): {"maybe (C)": 2, "maybe (D)": None, "no": 1},
    ("left", "right", "Both"): {"Both": 2},
}  # fmt: skip


@pytest.mark.parametrize("options", LIKE_LETTERS_OR_DOUBT, ids="-".join)
def test_option_texts_that_look_like_letters_or_doubt(options: tuple[str, ...]) -> None:
    for text, expected in LIKE_LETTERS_OR_DOUBT[options].items():
        assert read_choice(text, options) == expected, text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((text, "72") for text in (
            "72", "72.", "72!", "072", "+72", "72 apples", "72 times", "#### 72", "It is 3 of 4. #### 72",
            "She sold 48 + 24 = 72", "72 = 72.0", "x = 72", "$72", "72$", "$ 72", "€72",
            "72%", "72 %", "72 percent", "the total is 72.",
            "Answer:72", "Answer: 72", "the answer is 72",
            "**72**", "$72$", r"\$72", r"\boxed{72}", r"It is 3 and 4, so $\boxed{72}$.", "７２", "٧٢", "७२",
        )),
        ("$1,080", "1080"), ("109,200,000", "109200000"), ("1,000.50", "1000.5"), ("１，０８０", "1080"), ("١٬٠٨٠", "1080"),
        ("1" + "0" * 28 + "1", "1" + "0" * 28 + "1"), ("-1" + "0" * 28 + "1", "-1" + "0" * 28 + "1"),  # to the last digit
        ("-5", "-5"), ("answer:-5", "-5"), ("−5", "-5"), ("-$5", "-5"), ("$-5", "-5"), ("0.50 dollars", "0.5"), ("$.50", "0.5"),
        *((text, None) for text in (
            "", "none", "seventy-two", "nan", "inf", "?", "1" * 2000,
            "1e3", "5k", "5 k", "3²", "10^3", "0x10", "72kg", "2nd", "3D", "½", "七", "7٢",  # something is glued to it
            "1_000", "1 000", "1 000", "1'000", "1.000,5", "1,08", "0,500", "1000,000", "1,000,00",  # other separators
            "1/2", "2 1/2", "1 / 2", "10:30", "3-4", "3–4", "(72)", "5'10\"",
            "- 5", "–5", "--5", "~72", "≈ 72", "> 72",
            "72 or 73", "between 3 and 4", "not 72", "isn't 72", "about 72", "at least 72", "5 million", "minus 5", "half of 72",
            "Answer:72 or 73", "Answer:71 = 72",
            "4 + 4", "3 x 3", "2 * 3 * 4", "71 = 72", "x = 71, y = 72", "#### 71 #### 72", r"\boxed{71} \boxed{72}",
        )),
    ],
)  # fmt: skip
def test_reading_a_number(text: str, expected: str | None) -> None:
    assert read_number(text) == (None if expected is None else Decimal(expected))


def test_the_text_of_an_option_that_is_there_twice_is_read_and_right() -> None:
    twins = replace(ITEM, options=("36 hours", "72 hours", "36 hours", "7 days"), answer_index=0)
    for text, right in [("36 hours (A)", True), ("36 hours (C)", True), ("36 hours", True), ("C", True), ("72 hours (B)", False)]:
        completion = Completion(thinking="x", answer=text, finished=True, well_formed=True)
        assert grade(twins, completion).right == right and correct(twins, completion) == right
    assert read_choice("36 hours (B)", twins.options) is None


WORDS = [*READ_AS_B, *NOT_READ[:-1], "not ", "A", "B", "(A)", "(B)", "(E)", "penicillin", " or ", " ", ". ", ", "]
DIGITS = ["7", "72", "1,080", ".", "-", "−", "$", "%", "/", "=", "####", "e5", "k", "²", "_", ",", " ", " cm", "\\boxed{", "}"]


@settings(max_examples=200, derandomize=True)
@given(st.lists(st.sampled_from(WORDS), max_size=3).map("".join), st.lists(st.sampled_from(DIGITS), max_size=6).map("".join))
def test_the_exam_and_the_reward_read_alike(choice: str, number: str) -> None:
    for item, text in ((ITEM, choice), (SUM, number)):
        completion = Completion(thinking="x", answer=text, finished=True, well_formed=True)
        result, reading = grade(item, completion), read_answer(item, completion)
        assert (result.right, result.predicted) == (correct(item, completion) == 1, reading.choice)
        assert reading.readable == (result.status == "answered") and (reading.readable or not reading.right)


@settings(derandomize=True)
@given(st.text(max_size=200))
def test_reading_never_fails_and_stays_in_range(text: str) -> None:
    assert read_choice(text, DRUGS) in (None, 0, 1, 2, 3)
    number = read_number(text)
    assert number is None or number.is_finite()


@settings(derandomize=True)
@given(st.lists(st.text(min_size=1, max_size=12).filter(str.strip), min_size=2, max_size=6), st.data())
def test_the_taught_form_is_always_read_back(options: list[str], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(options) - 1))
    read = read_choice(render_answer(replace(ITEM, options=tuple(options), answer_index=index)), options)
    # None only where an option's own text is another option's rendering
    assert read == index or (read is None and any("(" in option for option in options))


@pytest.mark.parametrize(
    ("text", "right", "readable"),
    [
        ("Bulb onion", True, True), ("the BULB-onion.", True, True), ("An onion", True, True), ("**Onion**", True, True),
        ("Onion!", True, True), ("onions", False, True), ("It is an onion", False, True), ("onion, bulb onion", False, True),
        ("", False, False), (" . ", False, False), ("the", False, False),
    ],
)  # fmt: skip
def test_a_text_with_several_spellings_is_compared_as_trivia_is(text: str, right: bool, readable: bool) -> None:
    item = ExamItem(id="t1", question="?", options=(), answer_index=-1, answer="Onion", aliases=("Onion", "Bulb onion", "The"))
    reading = read_answer(item, Completion(thinking="", answer=text, finished=True, well_formed=True))
    assert (reading.right, reading.readable) == (right, readable)


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("So 72.\n#### 72", True, True), ("#### 7,2.", True, True), ("#### $72", False, True), ("####72", False, True),
        ("#### 72\n#### 5", True, False), ("72", False, True), ("It is 72 of 80", False, False), ("none", False, False),
        ("#### -72", False, False), ("#### 72 apples", True, True),
    ],
)  # fmt: skip
def test_a_solution_is_read_by_the_published_rules_too(text: str, strict: bool, flexible: bool) -> None:
    """As the filters of lm-evaluation-harness's task file and its exact match read it (``test_harness.py`` asks both)."""
    said = Completion(thinking="", answer=text, finished=True, well_formed=False)
    found = [published_reading(rule, SUM, said) for rule in ("strict-match", "flexible-extract")]
    assert [reading.right for reading in found] == [strict, flexible]
    assert found[1].readable == (text != "none")


def test_hostile_text_ends_at_once() -> None:
    """A pattern that tries every way to split a text would not end in a lifetime."""
    pieces = ["*", "* a ", "**a", "_", "`", "$", "(A)", "(B), ", "\\boxed{", "\\boxed{a{b}", "\\text{", "####", "=", "1,", "'a"]
    for text in [(piece * 1000)[:999] + end for piece in pieces for end in ("", "x")]:
        assert read_choice(text, DRUGS) in (None, 0, 1) and read_number(text) is None
