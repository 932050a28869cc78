"""Filters: every verdict, every action, and that none of them looks at whether an answer is right."""

from __future__ import annotations

import pytest

from osler.rl.config import AlgorithmConfig, QualityConfig
from osler.rl.rollout import all_equal, apply_filters, check_sample, letter_fractions, repeated_ngram_frac

QUALITY = QualityConfig(ngram=2, max_repeated_frac=0.5, min_tokens=6)


@pytest.mark.parametrize(
    ("ids", "text_is_empty", "has_answer", "verdict"),
    [
        ([], True, False, "empty"),
        ([5, 6], True, True, "empty"),
        ([1, 2] * 10, False, True, "degenerate"),
        ([1, 2, 1, 2], False, True, "ok"),  # too short to call it running in circles
        (list(range(20)), False, False, "no_answer"),
        (list(range(20)), False, True, "ok"),
    ],
)
def test_verdicts(ids, text_is_empty, has_answer, verdict):
    assert check_sample(ids, text_is_empty=text_is_empty, has_answer=has_answer, quality=QUALITY) == verdict


def test_an_answer_may_be_optional():
    quality = QualityConfig(require_answer=False)
    assert check_sample([1, 2, 3], text_is_empty=False, has_answer=False, quality=quality) == "ok"


def test_repeated_ngram_frac_counts_by_hand():
    assert repeated_ngram_frac([1, 2, 3, 4], 2) == 0.0
    assert repeated_ngram_frac([1, 1, 1, 1, 1], 2) == pytest.approx(3 / 4)
    assert repeated_ngram_frac([1, 2, 1, 2, 1], 2) == pytest.approx(2 / 4)
    assert repeated_ngram_frac([1], 2) == 0.0


@pytest.mark.parametrize(
    ("action", "verdict", "filtered"),
    [
        ("zero", "ok", (0.7, True, True)),
        ("zero", "no_answer", (0.0, True, True)),
        ("drop", "ok", (0.7, True, True)),
        ("drop", "degenerate", (0.0, False, False)),
        ("off", "empty", (0.7, True, True)),
    ],
)
def test_quality_actions(action, verdict, filtered):
    assert apply_filters(0.7, verdict, True, AlgorithmConfig(quality=QualityConfig(action=action))) == filtered


@pytest.mark.parametrize(
    ("overlong", "finished", "filtered"),
    [
        ("keep", False, (1.0, True, True)),
        ("mask", False, (1.0, True, False)),
        ("mask", True, (1.0, True, True)),
        ("penalise", False, (0.5, True, True)),
        ("penalise", True, (1.0, True, True)),
    ],
)
def test_overlong_actions(overlong, finished, filtered):
    assert apply_filters(1.0, "ok", finished, AlgorithmConfig(overlong=overlong, overlong_penalty=0.5)) == filtered


def test_a_bad_sample_that_was_cut_is_penalised_from_zero():
    assert apply_filters(1.0, "no_answer", False, AlgorithmConfig(overlong="penalise", overlong_penalty=0.5)).reward == -0.5


def test_dead_groups():
    assert all_equal([1.0, 1.0, 1.0])
    assert all_equal([0.3])
    assert all_equal([])
    assert not all_equal([0.0, 1.0, 0.0])


def test_letter_fractions_count_only_answers_that_were_read():
    fractions = letter_fractions([2, 2, None, 0, 2], 4)
    assert fractions == {
        "answer/letter_A_frac": 0.25,
        "answer/letter_B_frac": 0.0,
        "answer/letter_C_frac": 0.75,
        "answer/letter_D_frac": 0.0,
    }
    assert letter_fractions([None], 2) == {"answer/letter_A_frac": 0.0, "answer/letter_B_frac": 0.0}
