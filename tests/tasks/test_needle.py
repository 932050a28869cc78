"""Needle tests: rows as long as asked, the telling visit where asked, and no answer without it."""

import hashlib
import random
import re
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import islice

import pytest

from osler.clinic.facts import conditions_by_name
from osler.clinic.history import HISTORY_SPLITS, Case, cases
from osler.clinic.textbook import textbook
from osler.data.named import load_task
from osler.eval.exams import score_by_likelihood
from osler.eval.score import ScoredExam
from osler.records.answers import AnswerLog
from osler.runtime.errors import UserError
from osler.tasks.item import ExamItem, render_answer, render_plain, render_question
from osler.tasks.needle import Context, cells_in, lengths_within
from osler.tasks.registry import NeedleTask
from osler.tokenizer import superbpe
from osler.tokenizer.bpe import Tokenizer
from osler.tokenizer.chat import Turn, encode_examples
from tests.models import tiny_model

LENGTHS, DEPTHS, CASES = (400, 900), (0, 25, 50, 75, 100), 4
TASK = NeedleTask(lengths=LENGTHS, limit=CASES, seed=3)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(list(textbook(0, 200)), 600)


@pytest.fixture(scope="module")
def items(tokenizer: Tokenizer) -> list[ExamItem]:
    return load_task(TASK, context=Context(tokenizer, 1024))


@cache
def case_of(item: ExamItem) -> Case:
    return next(case for case in cases(int(item.id.split("-")[1]), item.split, CASES) if case.id == item.cluster)


def told(item: ExamItem) -> tuple[list[str], int]:
    """The visits of an item without the question, and the number of the telling one."""
    visits = re.split(r" (?=On \d{4}-)", item.question.removesuffix(f" {case_of(item).question}"))
    telling = re.compile(re.escape(case_of(item).telling).replace(r"\{date\}", r"\d{4}-\d\d-\d\d"))
    [place] = [number for number, visit in enumerate(visits) if telling.fullmatch(visit)]
    return visits, place


def row_tokens(tokenizer: Tokenizer, item: ExamItem) -> int:
    """Of a row with the longest of the answers."""
    answers = [render_answer(replace(item, answer_index=index)) for index in range(4)]
    rows = encode_examples(tokenizer, [Turn(render_question(item), None, answer) for answer in answers])
    return max(len(ids) for ids, _ in rows)


def read(item: ExamItem, text: str) -> list[float]:
    """What speaks for each option in a text, to someone who knows the clinic: its words, or findings of this condition."""
    findings = {name: condition.findings for name, condition in conditions_by_name().items()}
    return [sum(text.count(phrase) for phrase in (option, *findings.get(option, ()))) for option in item.options]


def test_rows_are_as_long_as_asked_and_the_telling_visit_is_as_deep(items: list[ExamItem], tokenizer: Tokenizer) -> None:
    """Within a visit; in the template, and as plain text."""
    plain = load_task(TASK, context=Context(tokenizer, 1024, template=False))
    assert len(items) == len(plain) == 2 * len(LENGTHS) * len(DEPTHS) * CASES
    for item, other in zip(items, plain, strict=True):
        found = re.fullmatch(r"(\d+) tokens, (\d+)% deep", item.group)
        assert found and item.id == f"{item.cluster}-{found[1]}-{found[2]}"
        length, depth = int(found[1]), int(found[2])
        visits, place = told(item)
        sizes = [len(tokenizer.encode(f" {visit}")) for visit in visits]
        assert length - max(sizes) < row_tokens(tokenizer, item) <= length
        before, others = sum(sizes[:place]), sum(sizes) - sizes[place]
        assert abs(before - depth / 100 * others) <= max(sizes) / 2
        assert visits == sorted(visits, key=lambda visit: visit[3:13]) and len(set(visits)) == len(visits) >= 5
        longest = max(len(tokenizer.encode(f" {text} (A)")) for text in item.options)
        assert length - max(sizes) < len(tokenizer.encode(render_plain(other, "letters"))) + longest + 1 <= length


def test_superwords_that_span_visits_make_no_row_shorter() -> None:
    texts = [" ".join(map(str, islice(case.visits(), 12))) for case in cases(9, "needle", 30)]
    tokenizer = superbpe.train(texts, 800, 600)
    for item in load_task(NeedleTask(lengths=LENGTHS, depths=(50,), limit=2), context=Context(tokenizer, 1024)):
        length, longest = int(item.group.split()[0]), max(len(tokenizer.encode(f" {visit}")) for visit in told(item)[0])
        assert length - longest < row_tokens(tokenizer, item) <= length


def test_nothing_but_the_telling_visit_speaks_for_an_option(items: list[ExamItem]) -> None:
    for item in items:
        visits, place = told(item)
        assert read(item, " ".join(visits[:place] + visits[place + 1 :])) == [0] * 4
        evidence = read(item, visits[place])
        assert evidence.pop(item.answer_index) > 0 == max(evidence)
        assert len({option.lower() for option in item.options}) == 4 and item.split in HISTORY_SPLITS


def test_the_same_cases_are_asked_in_every_cell_and_letters_are_balanced(items: list[ExamItem], tokenizer: Tokenizer) -> None:
    assert items == load_task(TASK, context=Context(tokenizer, 2048)) and len({item.id for item in items}) == len(items)
    for cell in dict.fromkeys(item.group for item in items):
        asked = [item for item in items if item.group == cell]
        assert [(item.cluster, item.options, item.answer_index) for item in asked] == [
            (case.id, case.options, case.answer_index) for split in HISTORY_SPLITS for case in cases(3, split, CASES)
        ]
        assert Counter(item.answer_index for item in asked) == dict.fromkeys(range(4), 2)


def test_a_seed_gives_these_cases_in_every_version() -> None:
    """Stored answers belong to them."""
    texts = [f"{case} {next(case.visits())}" for split in HISTORY_SPLITS for case in cases(5, split, 50)]
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16] == "d603a9897b80ad6a"
    assert cases(5, "copy", 9) == cases(5, "copy", 50)[:9] != cases(6, "copy", 9)
    first, second = (next(case.visits()) for case in cases(5, "copy", 2))
    assert first != second


def scored(items: list[ExamItem], scores: list[list[float]]) -> ScoredExam:
    answers = AnswerLog()
    answers.outputs = {number: [[one, 1, 1] for one in own] for number, own in enumerate(scores)}
    tokenizer = Tokenizer.train(["no question is asked"], 300)
    return score_by_likelihood(tiny_model(), tokenizer, items, normalise="none", answers=answers)


def test_who_reads_finds_every_needle_and_who_guesses_is_at_chance(items: list[ExamItem]) -> None:
    found = scored(items, [read(item, " ".join(told(item)[0])) for item in items])
    assert found.accuracy == 1.0 and found.chance == 0.25
    cells = cells_in(found.groups)
    assert list(cells) == [(length, depth) for length in LENGTHS for depth in DEPTHS]
    assert all(cell["accuracy"] == 1.0 and cell["n"] == 2 * CASES for cell in cells.values())
    rng = random.Random(0)
    guessed = scored(items, [[rng.random() for _ in item.options] for item in items])
    assert guessed.low < 0.25 < guessed.high < 0.75
    assert cells_in({"anatomy": {}}) == {}


@pytest.mark.parametrize(
    ("fields", "context", "said"),
    [
        ({"lengths": (400, 40)}, {}, r"exam: lengths has 40, which is too short: needle-0-000000 takes \d\d\d tokens"),
        ({"lengths": (1025,)}, {}, r"exam: lengths has 1,025, and the model reads 1,024 tokens \(max_seq_len\): ask for"),
        ({"lengths": (1024,)}, {"new_tokens": 100}, r"\(max_seq_len\) less 100 new tokens: ask for lengths up to 924"),
        ({"split": "needle,cpy"}, {}, "no split 'cpy'. Choose one of: needle, copy"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(tokenizer, fields, context, said) -> None:
    with pytest.raises(UserError, match=said):
        load_task(NeedleTask(**{"limit": 1, "lengths": (400,), **fields}), "exam", context=Context(tokenizer, 1024, **context))


def test_without_lengths_they_double_up_to_the_context() -> None:
    assert [lengths_within(room) for room in (200, 256, 2047, 2048)] == [(200,), (256,), (256, 512, 1024), (256, 512, 1024, 2048)]
    letters = Tokenizer.train(["no history was read"], 300)  # of about a letter a token, so no history takes only 256 tokens
    for room, asked in ((2048, {1024, 2048}), (1030, {1024})):
        items = load_task(NeedleTask(limit=1, depths=(50,)), context=Context(letters, room))
        assert {int(item.group.split()[0]) for item in items} == asked
    with pytest.raises(UserError, match="lengths has 512, which is too short"):
        load_task(NeedleTask(limit=1), context=Context(letters, 600))
    assert load_task(NeedleTask()) == []  # it depends on a model that is not there yet
    for fields in ({"lengths": (300, 300)}, {"depths": (0, 0)}, {"depths": ()}):
        with pytest.raises(ValueError, match=r"twice|empty"):
            NeedleTask(**fields)
