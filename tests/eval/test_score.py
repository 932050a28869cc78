"""What a score reports, and how two scores compare."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path

import pytest

from osler.eval.score import (
    ANSWERED,
    CUT,
    TOO_LONG,
    UNPARSED,
    Result,
    ScoredExam,
    compare,
    describe_too_long,
    length_explains,
    summarise,
    wilson,
)
from osler.records.results import ExamScore, add_exams, read_exams
from osler.runtime.errors import UserError
from osler.tasks.item import ExamItem


def exam(answers: str, groups: str = "") -> list[ExamItem]:
    return [
        ExamItem(
            id=f"i{k}",
            question="?",
            options=("w", "x", "y", "z"),
            answer_index="ABCD".index(letter),
            group=groups[k] if groups else "",
        )
        for k, letter in enumerate(answers)
    ]


def answered(items: list[ExamItem], given: str) -> ScoredExam:
    results = []
    for item, letter in zip(items, given, strict=True):
        predicted = "ABCD".find(letter)
        status = {"?": UNPARSED, "…": CUT, "#": TOO_LONG}.get(letter, ANSWERED)
        results.append(Result(item, status, predicted == item.answer_index, None if predicted < 0 else predicted))
    return summarise(results)


def test_a_score_reports_what_it_must_be_compared_with() -> None:
    score = answered(exam("AABBBCDD"), "AACCB?…#")
    assert (score.n, score.correct, score.accuracy) == (8, 3, 0.375)
    assert score.interval == pytest.approx(wilson(3, 8))
    assert (score.unparsed, score.cut, score.too_long) == (1, 1, 1)
    assert score.letters == {"A": 2, "B": 1, "C": 2, "D": 0}
    assert (score.constant_letter, score.constant_letter_baseline, score.chance) == ("B", 0.375, 0.25)


def test_only_enough_long_questions_explain_a_score_below_the_baseline() -> None:
    assert length_explains(0.2, 0.25, 25, 100) and length_explains(0.1, 0.25, 100, 100)
    assert not length_explains(0.2, 0.25, 10, 100), "had they been guessed, the score would still be below"
    assert not length_explains(0.2, 0.25, 0, 100) and not length_explains(0.3, 0.25, 50, 100)
    assert not length_explains(0.2, 0.25, math.nan, 100)


def test_what_did_not_fit_is_described_with_its_room() -> None:
    score = ExamScore(too_long=45, presentations=1050, correct=2, max_seq_len=256, max_new_tokens=128)
    written = describe_too_long(score)
    assert all(number in written for number in ("45 of 1,050", "max_seq_len 256", "keeps 128", "other 1,005", "answered 2"))
    assert "max_seq_len" not in describe_too_long(ExamScore(too_long=8, presentations=8))


def test_groups_are_scored_apart_by_their_first_part() -> None:
    items = [
        ExamItem(id=f"g{k}", question="?", options=("w", "x"), answer_index=0, group=f"{group}/{k}")
        for k, group in enumerate(["test"] * 4 + ["cause"] * 2)
    ]
    score = answered(items, "AABBAA")
    counts = {name: (group["n"], group["correct"]) for name, group in score.groups.items()}
    assert counts == {"cause": (2, 2), "test": (4, 2)}
    assert score.groups["test"]["interval"] == pytest.approx(list(wilson(2, 4)))


def test_chance_and_constant_letter_of_mixed_and_free_items() -> None:
    three = ExamItem(id="y", question="?", options=("yes", "no", "maybe"), answer_index=0)
    free = ExamItem(id="n", question="?", options=(), answer_index=-1, answer="72")
    score = summarise([Result(three, ANSWERED, True, 0), Result(free, ANSWERED, True)])
    assert score.chance == pytest.approx(1 / 6) and score.constant_letter_baseline == 0.5 and score.correct == 2
    numbers = summarise([Result(free, ANSWERED, False)])
    assert (numbers.chance, numbers.constant_letter, numbers.letters) == (0.0, "", {})


def test_scores_come_back_from_their_file(tmp_path: Path) -> None:
    score, path = answered(exam("AB", groups="gh"), "AA"), tmp_path / "exams.json"
    add_exams(path, "sft", {"test": score})
    add_exams(path, "sft, step 8", {"test": score}, last="sft")
    add_exams(path, "sft", {"other": score}, last="sft")
    found = read_exams(path)
    assert [(one.label, one.split) for one in found] == [("sft, step 8", "test"), ("sft", "test"), ("sft", "other")]
    assert found[0] == ExamScore(**{**{f.name: getattr(score, f.name) for f in fields(ExamScore)}, "label": "sft, step 8",
                                    "split": "test"})  # fmt: skip
    assert "results" not in path.read_text()


def test_a_gain_is_paired_on_the_same_items() -> None:
    items = exam("ABCD" * 10, groups="pqrs" * 10)
    before, after = answered(items, "A" * 40), answered(items[::-1], "DCBA" * 9 + "AAAA")
    gain = compare(before, after)
    assert (gain.mean, gain.gained, gain.lost, gain.n) == (0.675, 27, 0, 40)
    assert 0 < gain.interval[0] < 0.675 < gain.interval[1] < 1
    clustered = compare(before, after, cluster_by_group=True)
    assert clustered.clusters == 4 and clustered.interval[0] < gain.interval[0]
    with pytest.raises(UserError, match="different items"):
        compare(before, answered(items[:39], "A" * 39))
    with pytest.raises(UserError, match="empty"):
        summarise([])


def test_presentations_of_an_item_are_one_cluster() -> None:
    items = exam("ABCD")
    once = answered(items, "ABAA")
    four = summarise([result for result in once.results for _ in range(4)])
    assert (four.n, four.presentations, four.accuracy) == (4, 16, once.accuracy)
    assert four.interval[1] - four.interval[0] > 0.9 * (once.interval[1] - once.interval[0])
