"""The shape of the clinic's facts: enough conditions, findings that discriminate, answers that are never arguable."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from itertools import combinations
from typing import Any

import pytest

from osler.clinic.facts import (
    DIAGNOSIS,
    FACT_RELATIONS,
    RELATIONS,
    check_conditions,
    conditions_by_name,
    load_conditions,
    parse_condition,
)

CONDITIONS = load_conditions()


def entry(**changes: Any) -> dict[str, Any]:
    """A well-formed YAML entry with some keys replaced."""
    base: dict[str, Any] = {
        "name": "test disease", "area": "tests", "age": [20, 40], "findings": [f"sign {i}" for i in range(8)],
        **{relation: f"some {relation}" for relation in FACT_RELATIONS},
    }
    return base | changes


def test_there_are_at_least_64_conditions_in_many_specialities() -> None:
    assert len(CONDITIONS) >= 64
    areas = {condition.area for condition in CONDITIONS}
    assert len(areas) >= 10
    assert {"infections", "cardiology", "endocrinology", "hematology", "neurology", "toxicology"} <= areas


def test_names_are_unique_and_sorted() -> None:
    names = [condition.name for condition in CONDITIONS]
    assert names == sorted(set(names))
    assert list(conditions_by_name()) == names


def test_every_condition_has_eight_short_findings_and_five_short_answers() -> None:
    for condition in CONDITIONS:
        assert len(set(condition.findings)) == 8
        assert set(condition.answers) == set(RELATIONS)
        assert condition.answers[DIAGNOSIS] == condition.name
        for text in (*condition.findings, *condition.answers.values()):
            assert 1 <= len(text.split()) <= 4, text
            assert "," not in text and " and " not in text.replace("fluids and", "fluids").replace("rest and", "rest")
            assert text == text.strip() and not text.endswith(".")


def test_no_two_conditions_share_three_findings() -> None:
    for one, other in combinations(CONDITIONS, 2):
        assert len(set(one.findings) & set(other.findings)) <= 2, (one.name, other.name)


def test_findings_give_no_answer_away() -> None:
    for condition in CONDITIONS:
        assert not set(condition.findings) & set(condition.answers.values()), condition.name
        assert not any(condition.name in finding for finding in condition.findings)


def test_answers_are_mostly_distinct_within_a_relation() -> None:
    for relation in FACT_RELATIONS:
        distinct = {condition.answers[relation] for condition in CONDITIONS}
        assert len(distinct) >= 0.8 * len(CONDITIONS), relation


def test_shared_answers_are_spelled_the_same() -> None:
    for relation in FACT_RELATIONS:
        answers = {condition.answers[relation] for condition in CONDITIONS}
        assert len({answer.lower() for answer in answers}) == len(answers)


def test_arguable_answers_name_answers_of_other_conditions() -> None:
    """A misspelled entry would silently fail to keep a distractor out."""
    for relation in FACT_RELATIONS:
        known = {condition.answers[relation].lower() for condition in CONDITIONS}
        for condition in CONDITIONS:
            accepted = condition.accepts.get(relation, frozenset())
            assert accepted <= known, (condition.name, relation, accepted - known)
            assert condition.answers[relation].lower() not in accepted
            assert condition.acceptable(relation) == accepted | {condition.answers[relation].lower()}


def test_some_facts_every_physician_knows() -> None:
    facts = {(c.name, relation): c.answers[relation] for c in CONDITIONS for relation in FACT_RELATIONS}
    assert facts["lobar pneumonia", "cause"] == "pneumococcus"
    assert facts["opioid overdose", "treatment"] == "naloxone"
    assert facts["ankylosing spondylitis", "risk"] == "HLA-B27"
    assert facts["rheumatic fever", "complication"] == "mitral stenosis"
    assert facts["cystic fibrosis", "test"] == "sweat chloride test"
    assert facts["Down syndrome", "cause"] == "trisomy 21"


def test_sex_limited_conditions() -> None:
    by_name = conditions_by_name()
    assert by_name["ectopic pregnancy"].sex == by_name["preeclampsia"].sex == "female"
    assert by_name["hemophilia A"].sex == "male"
    assert all(1 <= condition.age[0] <= condition.age[1] <= 99 for condition in CONDITIONS)


def test_every_relation_has_enough_wordings_in_both_directions() -> None:
    for name in FACT_RELATIONS:
        relation = RELATIONS[name]
        wordings = (relation.canonical, *relation.phrasings)
        assert len(set(wordings)) >= 6
        assert all("{x}" in wording and "{y}" in wording for wording in wordings)
        forward = [wording.index("{x}") < wording.index("{y}") for wording in wordings]
        assert any(forward) and not all(forward)
        assert len(set(relation.questions)) >= 4


def test_conditions_are_immutable() -> None:
    with pytest.raises(FrozenInstanceError):
        CONDITIONS[0].name = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        CONDITIONS[0].answers["cause"] = "other"  # type: ignore[index]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sex": "both"}, "sex 'both'"),
        ({"age": [40, 20]}, "not a range"),
        ({"accepts": {"prognosis": ["good"]}}, "unknown relations"),
        ({"treatmnt": "rest"}, "unknown keys"),
        ({"cause": 21}, "not a trimmed text"),
        ({"findings": ["fever "] * 8}, "not a trimmed text"),
    ],
)
def test_malformed_entries_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_condition(entry(**changes))


def test_a_missing_relation_is_refused() -> None:
    incomplete = entry()
    del incomplete["risk"]
    with pytest.raises(ValueError, match=r"lacks \['risk'\]"):
        parse_condition(incomplete)


def test_ambiguous_or_repeated_conditions_are_refused() -> None:
    one = parse_condition(entry())
    check_conditions([one])
    with pytest.raises(ValueError, match="repeat"):
        check_conditions([one, one])
    findings = [*(f"sign {i}" for i in range(3)), *(f"mark {i}" for i in range(5))]
    overlapping = entry(name="other disease", findings=findings)
    with pytest.raises(ValueError, match="three findings must name one"):
        check_conditions([one, parse_condition(overlapping)])
    with pytest.raises(ValueError, match="needs 8 different findings"):
        check_conditions([parse_condition(entry(findings=["fever"] * 8))])
