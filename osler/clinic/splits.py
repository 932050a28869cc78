"""Which facts and which combinations of findings belong to training and which are held out: pure functions of a seed.

The clinic is a synthetic world, a test bench and not medical advice. It asks two questions of a model:

- *new findings*: does it recognise a condition from three findings it never saw together? For every condition the 56
  combinations of three of its eight findings are ranked by a hash and cut into train, validation and test.
- *new questions*: can it use a fact it only ever read in prose? About 12 % and 18 % of the facts (condition, relation)
  never take exam form in training; they occur in the textbook alone. Diagnosis is always a train fact.

The five exam splits cross the two partitions, see `EXAM_SPLITS`; they are disjoint by construction. The textbook names
three findings together only when they are a train combination. The split seed is separate from the seeds of the
renderers, so that training text and held-out exams of different seeds can never overlap.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from itertools import combinations
from types import MappingProxyType

from osler.clinic.facts import DIAGNOSIS, FACT_RELATIONS, Condition, load_conditions

Fact = tuple[str, str]  # (name of the condition, relation)
Combo = tuple[str, str, str]  # three findings, in the order of the condition's list: a set, written one way

PARTS = ("train", "validation", "test")
FACT_SHARES = {"validation": 0.12, "test": 0.18}
COMBO_SHARES = {"validation": 0.10, "test": 0.20}
MAX_HELD_OUT_PER_CONDITION = 2  # of five relations: three keep their exam form

# exam split -> (part of the facts, part of the combinations)
EXAM_SPLITS: Mapping[str, tuple[str, str]] = MappingProxyType({
    "train": ("train", "train"),
    "validation": ("train", "validation"),
    "validation_questions": ("validation", "validation"),
    "new_findings": ("train", "test"),
    "new_questions": ("test", "test"),
})


@dataclass(frozen=True)
class Splits:
    """One partition of the clinic: `facts[part]`, and `combos[condition name][part]`, with the parts of `PARTS`."""

    seed: int
    facts: Mapping[str, tuple[Fact, ...]] = field(hash=False)
    combos: Mapping[str, Mapping[str, tuple[Combo, ...]]] = field(hash=False)


@lru_cache(maxsize=16)
def make_splits(seed: int = 0) -> Splits:
    """Return the partition of all facts and combinations that belongs to this split seed."""
    conditions = load_conditions()
    return Splits(
        seed=seed,
        facts=MappingProxyType(split_facts(conditions, seed)),
        combos=MappingProxyType({condition.name: split_combos(condition, seed) for condition in conditions}),
    )


def split_facts(conditions: tuple[Condition, ...], seed: int) -> dict[str, tuple[Fact, ...]]:
    """Partition the facts, relation by relation, so that each part holds its share of every relation."""
    rng = random.Random(f"clinic facts {seed}")
    held_out: Counter[str] = Counter()
    facts: dict[str, list[Fact]] = {part: [] for part in PARTS}
    facts["train"] += [(condition.name, DIAGNOSIS) for condition in conditions]
    for relation in FACT_RELATIONS:
        names = [condition.name for condition in conditions]
        rng.shuffle(names)
        names.sort(key=lambda name: held_out[name])  # least held out first; the sort is stable, the rest stays shuffled
        num_validation = round(FACT_SHARES["validation"] * len(names))
        num_test = round(FACT_SHARES["test"] * len(names))
        chosen = names[: num_validation + num_test]
        rng.shuffle(chosen)
        part_of = {name: "validation" if i < num_validation else "test" for i, name in enumerate(chosen)}
        for condition in conditions:
            facts[part_of.get(condition.name, "train")].append((condition.name, relation))
        held_out.update(chosen)
    crowded = sorted(name for name, count in held_out.items() if count > MAX_HELD_OUT_PER_CONDITION)
    if crowded:
        raise ValueError(f"too few conditions to hold out the shares {FACT_SHARES}: {crowded} lose too many relations")
    return {part: tuple(members) for part, members in facts.items()}


def split_combos(condition: Condition, seed: int) -> Mapping[str, tuple[Combo, ...]]:
    """Partition the combinations of three findings of one condition by the rank of their hash."""
    combos: list[Combo] = [(a, b, c) for a, b, c in combinations(condition.findings, 3)]
    combos.sort(key=lambda combo: combo_hash(condition.name, combo, seed))
    num_validation = max(1, round(COMBO_SHARES["validation"] * len(combos)))
    num_test = max(1, round(COMBO_SHARES["test"] * len(combos)))
    return MappingProxyType({
        "validation": tuple(combos[:num_validation]),
        "test": tuple(combos[num_validation : num_validation + num_test]),
        "train": tuple(combos[num_validation + num_test :]),
    })


def combo_hash(name: str, combo: Combo, seed: int) -> bytes:
    """Return eight bytes that depend on the seed, the condition and the set of findings, not on their order."""
    text = "|".join([str(seed), name, *sorted(combo)])
    return blake2b(text.encode(), digest_size=8).digest()
