"""The clinic's partitions: complete, disjoint, stratified, and pure functions of the seed."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest

from osler.clinic.facts import DIAGNOSIS, FACT_RELATIONS, load_conditions
from osler.clinic.splits import EXAM_SPLITS, PARTS, combo_hash, make_splits, split_combos, split_facts

CONDITIONS = load_conditions()
SEEDS = (0, 1, 2, 17)


@pytest.mark.parametrize("seed", SEEDS)
def test_facts_are_partitioned(seed: int) -> None:
    facts = make_splits(seed).facts
    everything = [fact for part in PARTS for fact in facts[part]]
    assert len(everything) == len(set(everything)) == len(CONDITIONS) * 6
    assert set(everything) == {(c.name, r) for c in CONDITIONS for r in (DIAGNOSIS, *FACT_RELATIONS)}


@pytest.mark.parametrize("seed", SEEDS)
def test_held_out_shares_and_strata(seed: int) -> None:
    facts = make_splits(seed).facts
    total = len(CONDITIONS) * 5
    assert len(facts["validation"]) / total == pytest.approx(0.12, abs=0.01)
    assert len(facts["test"]) / total == pytest.approx(0.18, abs=0.01)
    for part in PARTS:
        per_relation = Counter(relation for _, relation in facts[part] if relation != DIAGNOSIS)
        assert set(per_relation) == set(FACT_RELATIONS)
        assert max(per_relation.values()) == min(per_relation.values())
    exam_form = Counter(name for name, relation in facts["train"] if relation != DIAGNOSIS)
    assert min(exam_form[condition.name] for condition in CONDITIONS) >= 3


@pytest.mark.parametrize("seed", SEEDS)
def test_diagnosis_is_always_a_train_fact(seed: int) -> None:
    facts = make_splits(seed).facts
    assert {name for name, relation in facts["train"] if relation == DIAGNOSIS} == {c.name for c in CONDITIONS}


@pytest.mark.parametrize("seed", SEEDS)
def test_combinations_are_partitioned(seed: int) -> None:
    combos = make_splits(seed).combos
    for condition in CONDITIONS:
        parts = combos[condition.name]
        everything = [frozenset(combo) for part in PARTS for combo in parts[part]]
        assert len(everything) == len(set(everything)) == 56
        assert set(everything) == {frozenset(combo) for combo in combinations(condition.findings, 3)}
        assert (len(parts["train"]), len(parts["validation"]), len(parts["test"])) == (39, 6, 11)
        assert {finding for combo in parts["train"] for finding in combo} == set(condition.findings)


def test_exam_splits_are_disjoint_by_construction() -> None:
    """Two exam splits differ in the part of the facts or of the combinations, and parts do not overlap."""
    assert len(set(EXAM_SPLITS.values())) == len(EXAM_SPLITS)
    assert EXAM_SPLITS["train"] == ("train", "train")
    held_out_combos = [combos for split, (_, combos) in EXAM_SPLITS.items() if split != "train"]
    assert "train" not in held_out_combos
    assert EXAM_SPLITS["new_findings"][0] == "train"
    assert EXAM_SPLITS["new_questions"][0] == "test"
    assert EXAM_SPLITS["validation_questions"][0] == "validation"


def test_splits_are_a_pure_function_of_the_seed() -> None:
    assert split_facts(CONDITIONS, 3) == split_facts(CONDITIONS, 3)
    assert split_facts(CONDITIONS, 3) != split_facts(CONDITIONS, 4)
    assert split_combos(CONDITIONS[0], 3) == split_combos(CONDITIONS[0], 3)
    assert split_combos(CONDITIONS[0], 3) != split_combos(CONDITIONS[0], 4)


def test_the_hash_ignores_the_order_of_the_findings() -> None:
    assert combo_hash("gout", ("tophi", "night attacks", "hot big toe"), 0) == combo_hash(
        "gout", ("hot big toe", "tophi", "night attacks"), 0
    )
