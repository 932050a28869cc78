"""Words and sequences of them, and the items of exams that documents contain, against plain ways of finding them."""

import math
import pickle
import random
import re
import tracemalloc
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from osler.config.schema import decode
from osler.data.clean import Cleaner
from osler.data.config import CleanConfig
from osler.data.contamination import FILTER_BITS, ExamIndex
from osler.data.named import load_task
from osler.data.ngrams import PIECE, Words
from osler.tasks.config import MedqaTask
from osler.tasks.item import ExamItem, render_question
from tests.data.prose import prose

STOCK = "Which of the following is the most likely diagnosis of the condition in this patient at this time"


def item(number: int, words: int = 40, stem: str = "") -> ExamItem:
    question = f"{' '.join(prose(number, words))}. {stem}?"
    return ExamItem(f"medqa-{number}", question, tuple(f"{w} sign" for w in prose(-number - 1, 4)), 0)


def found(index: ExamIndex, text: str) -> list[str]:
    return index.find(Words([text])).get(0, [])


# -- words -------------------------------------------------------------------------------------------------------------


def plain_words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())


STRANGE = [
    "",
    "a",
    "Straße, STRASSE_und x2\0y",
    "\ud800 half",
    "\u0661\u0662 \u2167 \ufb01ne e\u0301 中文。",
    " - ",
    "\U0001d400b",
]


def test_words_are_those_that_a_plain_way_finds() -> None:
    texts = [*STRANGE, " ".join(prose(1, 30_000)), "x" * (PIECE - 3) + " y z", "; ".join(STRANGE)]
    words = Words(texts)
    assert [words.between(first, last) for first, last in pairwise(words.firsts.tolist())] == list(map(plain_words, texts))
    assert words.letters.tolist() == [sum(map(len, plain_words(text))) for text in texts]
    assert len(words) > 30_000 and words.firsts[0] == 0


def test_sequences_are_equal_where_their_words_are() -> None:
    draw = random.Random(0)
    texts = [" ".join(draw.choices(("ab", "ba", "a", "b", "c"), k=draw.randrange(9))) for _ in range(300)]
    words = Words(texts)
    for length in (1, 3, 5):
        numbers: dict[int, set[str]] = {}
        for number, text in enumerate(map(plain_words, texts)):
            size = min(length, len(text))
            own = [" ".join(text[place : place + size]) for place in range(len(text) + 1 - size)] if text else []
            assert len(words.sequences_of(number, length)) == len(own)
            for value, sequence in zip(words.sequences_of(number, length).tolist(), own, strict=True):
                numbers.setdefault(value, set()).add(sequence)
        assert all(len(same) == 1 for same in numbers.values())
        assert len(numbers) == len({sequence for same in numbers.values() for sequence in same})


def test_documents_are_judged_by_themselves() -> None:
    """A batch gives what each document gives alone, and its end is no part of the next."""
    leaked = item(1)
    index, halves = ExamIndex([leaked]), leaked.question.split()
    texts = [" ".join(halves[:15]), " ".join(halves[15:]), leaked.question, "", " ".join(prose(2, 90))]
    assert index.find(Words(texts)) == {number: ids for number, text in enumerate(texts) if (ids := found(index, text))}
    cleaner = Cleaner(CleanConfig(duplicates="near", languages=("en",)))
    for one, look in zip(texts, cleaner.looks([(text,) for text in texts]), strict=True):
        [alone] = cleaner.looks([(one,)])
        assert (alone.reason, str(alone.signature)) == (look.reason, str(look.signature))


# -- exams -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "is_found"),
    [
        (lambda text: text, True),
        (str.upper, True),
        (lambda text: text.replace(" ", " - ").replace(".", "!?"), True),
        (lambda text: text.replace(" ", "\n\u00a0"), True),
        (lambda text: f"{' '.join(prose(7, 20_000))} {text} {' '.join(prose(8, 20_000))}", True),
        (lambda text: " ".join(text.split()[: 12 + round(0.7 * 28)]), True),
        (lambda text: " ".join(text.split()[: 12 + round(0.5 * 28)]), False),
        (lambda text: " ".join(reversed(text.split())), False),
    ],
    ids=["verbatim", "upper case", "other punctuation", "other spaces", "in a long document", "70 %", "50 %", "other order"],
)
def test_planted_leaks_are_found(change, is_found: bool) -> None:  # type: ignore[no-untyped-def]
    leaked, other = item(1), item(2)
    index = ExamIndex([other, leaked])
    assert found(index, change(" ".join(prose(1, 40)))) == ["medqa-1"] * is_found


def test_items_are_found_where_a_plain_rule_finds_them() -> None:
    draw = random.Random(3)
    items = [item(number, draw.randrange(13, 60), STOCK * (number % 3 == 0)) for number in range(30)]
    owners: dict[tuple[str, ...], set[int]] = {}
    for number, one in enumerate(items):
        for sequence in sequences_13(one.question):
            owners.setdefault(sequence, set()).add(number)
    texts = []
    for _ in range(100):
        words = draw.choice(items).question.split()
        texts.append(" ".join([*prose(draw.randrange(99), 20), *words[draw.randrange(9) : draw.randrange(10, 70)], STOCK]))
    expected = {}
    for place, text in enumerate(texts):
        own = sequences_13(text)
        for one in items:
            telling = {sequence for sequence in sequences_13(one.question) if len(owners[sequence]) <= 3}
            if telling and len(telling & own) >= math.ceil(0.6 * len(telling)):
                expected.setdefault(place, []).append(one.id)
    assert ExamIndex(items).find(Words(texts)) == expected
    assert 10 < len(expected) < 90


def sequences_13(text: str) -> set[tuple[str, ...]]:
    words = plain_words(text)
    return {tuple(words[place : place + 13]) for place in range(len(words) - 12)}


def test_phrases_of_an_exam_are_no_leak() -> None:
    items = [item(number, 3, STOCK) for number in range(8)]
    index = ExamIndex(items)
    assert found(index, f"{STOCK}? Nobody knows. {STOCK}!") == []
    assert found(index, items[3].question) == ["medqa-3"]


def test_a_passage_counts_like_a_question() -> None:
    with_passage = ExamItem("pubmedqa-1", "Does it help?", ("yes", "no", "maybe"), 0, context=" ".join(prose(1, 60)))
    assert found(ExamIndex([with_passage]), " ".join(prose(1, 60)[:50])) == ["pubmedqa-1"]


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        ("Vitamin B12 is absorbed in (A) Ileum (B) Colon (C) Stomach", True),
        ("vitamin b12 is absorbed in: stomach; ileum. ", True),
        ("Vitamin B12 is absorbed in the ileum.", False),
        ("Vitamin B12 is absorbed in ileum.", False),
        (f"Vitamin B12 is absorbed in {'x ' * 100} ileum, colon, stomach", False),
        ("Iron is absorbed in ileum, colon, stomach", False),
    ],
)
def test_short_questions_need_their_options(text: str, is_found: bool) -> None:
    index = ExamIndex([ExamItem("a", "Vitamin B12 is absorbed in", ("Ileum", "Colon", "Stomach", "All of the above"), 0)])
    assert bool(found(index, text)) == is_found


def test_questions_that_say_too_little_are_not_looked_for() -> None:
    index = ExamIndex([ExamItem("a", "Which is true?", ("x", "y"), 0), item(1)])
    assert index.too_short == ["a"]
    assert found(index, "Which is true? x y") == []
    assert found(ExamIndex([]), STOCK) == []


def test_the_same_question_in_two_exams_is_found_as_both() -> None:
    assert found(ExamIndex([item(1), replace(item(1), id="other")]), item(1).question) == ["medqa-1", "other"]


def test_the_large_filters_are_made_where_they_are_used_and_go_to_no_other_process() -> None:
    short = [ExamItem(str(words), " ".join(prose(words, words)), ("sign",), 0) for words in range(4, 13)]
    tracemalloc.start()
    index = ExamIndex([*short, item(1)])
    assert found(index, item(1).question) == ["medqa-1"]
    memory_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    sent = pickle.dumps(index)
    assert memory_bytes < 3 << FILTER_BITS and len(sent) < 1 << 20
    assert found(pickle.loads(sent), f"{short[0].question} sign") == ["4"]


def test_halves_of_a_real_exam_do_not_contain_each_other(shared_data: Callable[[str], Path]) -> None:
    items = load_task(MedqaTask(path=str(shared_data("exams/medqa-dev.jsonl"))))
    index = ExamIndex(items[::2])
    assert sum(bool(found(index, render_question(other))) for other in items[1::2]) <= 3
    assert all(found(index, render_question(own)) for own in items[::2])


@pytest.mark.parametrize(("kind", "file"), [("humaneval", "humaneval.jsonl.gz"), ("trivia_qa", "triviaqa-3000.jsonl")])
def test_real_exams_are_found_in_themselves(shared_data: Callable[[str], Path], kind: str, file: str) -> None:
    [task] = decode(CleanConfig, {"exams": [{"type": kind, "path": str(shared_data(f"exams/{file}"))}]}).exams
    items = load_task(task)
    found = ExamIndex(items).find(Words([f"{item.question} {item.answer}" for item in items]))
    assert all(item.id in found[number] for number, item in enumerate(items))
    assert sum(len(ids) > 1 for ids in found.values()) < 0.02 * len(items)
