"""The clinic's exam: balanced, deterministic, disjoint between splits, with fair distractors, and short."""

import hashlib
from collections import Counter

import pytest

from osler.clinic.exam import drills, exam, render_vignette
from osler.clinic.facts import DIAGNOSIS, EXAM_SPLITS, conditions_by_name, split_combos, split_facts, wordings
from osler.clinic.textbook import cards, textbook
from osler.runtime.errors import UserError
from osler.tasks.item import render_answer, render_question
from osler.tasks.registry import exam_item
from osler.tokenizer.bpe import Tokenizer
from osler.tokenizer.chat import Turn, encode_examples

BY_NAME = conditions_by_name()
RELATIONS = wordings()["relations"]
ITEMS = {split: exam(0, split, 1500) for split in EXAM_SPLITS}


def test_a_seed_gives_these_texts_in_every_version() -> None:
    """Trained models and stored scores belong to them: if these hashes change, both mean something else."""
    texts = [*textbook(5, 300), *cards(5, 300), *(item.question for item in drills(5, 300))]
    items = [item for split in EXAM_SPLITS for item in exam(5, split, 300)]
    texts += [f"{item.id} {item.question} {item.options} {item.thinking}" for item in items]
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16] == "da25eca4e31eaa0e"
    assert exam(7, "train", 100) == exam(7, "train", 900)[:100] != exam(8, "train", 100)
    assert list(textbook(5, 50)) == list(textbook(5, 200))[:50] != list(textbook(6, 50))
    assert list(cards(1, 20)) != list(cards(2, 20)) and list(drills(1, 20)) != list(drills(2, 20))
    ids = [item.id for seed in (7, 8) for split in EXAM_SPLITS for item in exam(seed, split, 20)]
    assert len(ids) == len(set(ids)) and exam(0, "train", 0) == list(textbook(5, 0)) == []


@pytest.mark.parametrize("split", list(EXAM_SPLITS))
def test_items_are_well_formed(split: str) -> None:
    items = ITEMS[split]
    assert len(items) == len({item.id for item in items}) == 1500
    for item in items:
        condition, answer = BY_NAME[item.condition], item.options[item.answer_index]
        assert item.split == split and answer == condition.answers[item.relation]
        assert len(item.options) == len({option.lower() for option in item.options}) == 4
        assert any(item.question.endswith(question) for question in RELATIONS[item.relation]["questions"])
        assert all(finding in item.question for finding in item.findings)
        assert condition.name not in item.question
        assert item.thinking.startswith("Here ") and answer in item.thinking and condition.name in item.thinking


def test_items_stay_inside_their_facts_and_combinations() -> None:
    for split, (fact_part, combo_part) in EXAM_SPLITS.items():
        facts = set(split_facts()[fact_part])
        for item in ITEMS[split]:
            assert (item.condition, item.relation) in facts
            allowed = {frozenset(combo) for combo in split_combos(item.condition)[combo_part]}
            assert frozenset(item.findings) in allowed


def test_facts_are_balanced_and_combinations_do_not_repeat_early() -> None:
    items = ITEMS["new_questions"]
    counts = Counter((item.condition, item.relation) for item in items)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len(counts) == len(split_facts()["test"])
    first = items[: 11 * len(counts)]  # eleven test combinations per condition
    assert len({(item.condition, item.relation, frozenset(item.findings)) for item in first}) == len(first)


@pytest.mark.parametrize("split", list(EXAM_SPLITS))
def test_letters_are_uniform(split: str) -> None:
    assert Counter(item.answer_index for item in ITEMS[split]) == dict.fromkeys(range(4), 375)


@pytest.mark.parametrize("split", list(EXAM_SPLITS))
def test_distractors_are_wrong_but_of_the_same_kind(split: str) -> None:
    near = 0
    for item in ITEMS[split]:
        condition = BY_NAME[item.condition]
        distractors = [option for option in item.options if option != item.options[item.answer_index]]
        assert len(distractors) == 3 and set(distractors) <= {c.answers[item.relation] for c in BY_NAME.values()}
        assert not {distractor.lower() for distractor in distractors} & condition.acceptable(item.relation)
        areas = {c.answers[item.relation] for c in BY_NAME.values() if c.area == condition.area}
        near += any(distractor in areas for distractor in distractors)
    assert near / len(ITEMS[split]) > 0.6


def test_distractors_respect_the_sex_of_the_patient() -> None:
    for item in ITEMS["train"]:
        man = any(f" {word} " in item.question for word in ("man", "boy"))
        if item.relation == DIAGNOSIS:
            assert all(BY_NAME[option].sex != ("female" if man else "male") for option in item.options)
        assert BY_NAME[item.condition].sex != ("female" if man else "male")


def test_no_answer_is_always_wrong_in_training() -> None:
    right = {(item.relation, item.options[item.answer_index]) for item in ITEMS["train"]}
    offered = {(item.relation, option) for item in ITEMS["train"] for option in item.options}
    assert offered == right


@pytest.mark.parametrize("split", ["validation_questions", "new_questions"])
def test_novelty_does_not_give_held_out_answers_away(split: str) -> None:
    """Two distractors are no answer of a train fact either, so picking an option never seen is a guess among three."""
    trained = {(r, BY_NAME[name].answers[r]) for name, r in split_facts()["train"]}
    for item in ITEMS[split]:
        novel = [o for o in item.options if o != item.options[item.answer_index] and (item.relation, o) not in trained]
        assert len(novel) >= 2


def test_ages_and_articles() -> None:
    patients = [(8, "male", "An 8 boy"), (18, "female", "An 18 woman"), (85, "male", "An 85 man"), (17, "female", "A 17 girl")]
    for age, sex, who in patients:
        assert render_vignette("{a} {age} {who} has {f}.", age, sex, ["x", "y", "z"]) == f"{who} has x, y and z."


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(UserError, match=r"no exam split 'test'.*new_findings"):
        exam(0, "test", 10)


@pytest.mark.slow
def test_whole_samples_fit_a_row() -> None:
    """With an own vocabulary of 2,048 a whole sample fits a row of 128 tokens, 99.9 % of them 120."""
    passages, items = list(textbook(0, 6000)), list(map(exam_item, exam(0, "train", 6000)))
    items += [exam_item(item) for exams in ITEMS.values() for item in exams]
    turns = [Turn(render_question(item), item.thinking, render_answer(item)) for item in items]
    texts = [text for turn in turns[:6000] for text in (turn.question, turn.thinking or "", turn.answer)]
    tokenizer = Tokenizer.train([*passages, *texts], 2048)
    lengths = sorted(len(ids) for ids, _ in encode_examples(tokenizer, turns))
    assert lengths[int(0.999 * len(lengths))] <= 120 and lengths[-1] <= 128
    passage_lengths = sorted(map(len, tokenizer.encode_batch(passages)))
    assert passage_lengths[len(passage_lengths) // 2] <= 100 and passage_lengths[-1] <= 128


def test_a_drill_names_its_right_option_and_no_fact() -> None:
    items = list(drills(0, 400))
    for item in items:
        answer = item.options[item.answer_index]
        assert len(set(item.options)) == 4 and answer in item.question and answer in item.thinking
        assert item.condition == item.relation == "" and item.findings == ()
    counts = [sum(item.answer_index == index for item in items) for index in range(4)]
    assert min(counts) > 70 and len({item.id for item in items}) == 400
