"""The clinic's facts and splits: findings that discriminate, answers that are never arguable, complete and disjoint parts."""

from collections import Counter
from itertools import combinations

import pytest

from osler.clinic.facts import (
    DIAGNOSIS,
    EXAM_SPLITS,
    FACT_RELATIONS,
    FOLDER,
    PARTS,
    conditions_by_name,
    split_combos,
    split_facts,
    wordings,
)
from osler.config.recipe import load_yaml

CONDITIONS = list(conditions_by_name().values())
RELATIONS = wordings()["relations"]
FILES = sorted((FOLDER / "conditions").glob("*.yaml"))
ENTRIES = [entry for path in FILES for entry in load_yaml(path.read_text(encoding="utf-8"), path.name)]


def test_every_entry_has_the_right_keys_and_texts() -> None:
    required = {"name", "area", "age", "findings", *FACT_RELATIONS}
    for entry in ENTRIES:
        assert required <= set(entry) <= required | {"sex", "accepts"}, entry["name"]
        assert entry.get("sex", "any") in ("any", "male", "female")
        low, high = entry["age"]
        assert 1 <= low <= high <= 99
        assert set(entry.get("accepts", {})) <= set(RELATIONS)
        accepted = [text for texts in entry.get("accepts", {}).values() for text in texts]
        for text in (entry["name"], *entry["findings"], *accepted, *(entry[relation] for relation in FACT_RELATIONS)):
            assert isinstance(text, str) and text == text.strip() and text


def test_every_condition_has_eight_short_findings_and_five_short_answers() -> None:
    for condition in CONDITIONS:
        assert len(set(condition.findings)) == len(condition.findings) == 8
        assert set(condition.answers) == set(RELATIONS)
        assert condition.answers[DIAGNOSIS] == condition.name
        for text in (*condition.findings, *condition.answers.values()):
            assert 1 <= len(text.split()) <= 4, text
            assert "," not in text and " and " not in text.replace("fluids and", "fluids").replace("rest and", "rest")
            assert not text.endswith(".")


def test_three_findings_name_one_condition_and_no_answer() -> None:
    for one, other in combinations(CONDITIONS, 2):
        assert len(set(one.findings) & set(other.findings)) <= 2, (one.name, other.name)
    for condition in CONDITIONS:
        assert not set(condition.findings) & set(condition.answers.values()), condition.name
        assert not any(condition.name in finding for finding in condition.findings)


def test_answers_are_mostly_distinct_within_a_relation_and_else_spelled_the_same() -> None:
    for relation in FACT_RELATIONS:
        answers = {condition.answers[relation] for condition in CONDITIONS}
        assert len({answer.lower() for answer in answers}) == len(answers) >= 0.8 * len(CONDITIONS), relation


def test_arguable_answers_name_answers_of_other_conditions() -> None:
    """A misspelled entry would silently fail to keep a distractor out."""
    for relation in FACT_RELATIONS:
        known = {condition.answers[relation].lower() for condition in CONDITIONS}
        for condition in CONDITIONS:
            accepted = condition.accepts.get(relation, frozenset())
            assert accepted <= known, (condition.name, relation, accepted - known)
            assert condition.answers[relation].lower() not in accepted
            assert condition.acceptable(relation) == accepted | {condition.answers[relation].lower()}


# ---- what is held out


def test_facts_are_partitioned_in_their_shares() -> None:
    facts = split_facts()
    everything = [fact for part in PARTS for fact in facts[part]]
    assert len(everything) == len(set(everything))
    assert set(everything) == {(c.name, r) for c in CONDITIONS for r in (DIAGNOSIS, *FACT_RELATIONS)}
    total = len(CONDITIONS) * 5
    assert len(facts["validation"]) / total == pytest.approx(0.12, abs=0.01)
    assert len(facts["test"]) / total == pytest.approx(0.18, abs=0.01)
    for part in PARTS:
        per_relation = Counter(relation for _, relation in facts[part] if relation != DIAGNOSIS)
        assert set(per_relation) == set(FACT_RELATIONS)
        assert max(per_relation.values()) == min(per_relation.values())
    exam_form = Counter(name for name, relation in facts["train"] if relation != DIAGNOSIS)
    assert min(exam_form[condition.name] for condition in CONDITIONS) >= 3
    assert {name for name, relation in facts["train"] if relation == DIAGNOSIS} == {c.name for c in CONDITIONS}


def test_combinations_are_partitioned() -> None:
    for condition in CONDITIONS:
        parts = split_combos(condition.name)
        everything = [frozenset(combo) for part in PARTS for combo in parts[part]]
        assert len(everything) == len(set(everything)) == 56
        assert set(everything) == {frozenset(combo) for combo in combinations(condition.findings, 3)}
        assert (len(parts["train"]), len(parts["validation"]), len(parts["test"])) == (39, 6, 11)
        assert {finding for combo in parts["train"] for finding in combo} == set(condition.findings)


def test_exam_splits_cross_the_parts() -> None:
    """Two exam splits differ in the part of the facts or of the combinations, and parts do not overlap."""
    assert len(set(EXAM_SPLITS.values())) == len(EXAM_SPLITS) and EXAM_SPLITS["train"] == ("train", "train")
    assert [combos for _, combos in EXAM_SPLITS.values()].count("train") == 1
    assert [EXAM_SPLITS[split][0] for split in ("new_findings", "validation_questions", "new_questions")] == list(PARTS)
