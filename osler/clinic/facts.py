"""The facts of the clinic, and which of them are held out: real conditions, their findings, one short answer per relation.

The clinic is a synthetic world, a test bench for training a small language model and not medical advice: facts are true but cut
down to a few words. They are in YAML files written by hand, one per group of specialities in `conditions/`; `wordings.yaml` has
the sentences around them. A condition has:

- `findings`: eight short ones per condition. Two conditions share at most two, so any three name one condition.
- `cause`, `test`, `treatment`, `complication`, `risk`: one answer each (for `cause` an organism or a mechanism).
- `accepts`: further answers that would also be right or arguable, per relation. They are never offered as distractors.

The clinic asks two questions of a model. *New findings*: does it recognise a condition by three findings never seen together? The
56 combinations of three findings of a condition are ranked by a hash and cut into train, validation and test. *New questions*:
can it use a fact that it read only in prose? Of the facts (condition, relation), about 12 % for validation and 18 % for test
never take exam form in training; they occur in the textbook alone. A diagnosis is always a train fact. The five exam splits cross
the two partitions, so they are disjoint by construction.
"""

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from itertools import combinations
from pathlib import Path
from typing import Any

from osler.config.recipe import load_yaml

FOLDER = Path(__file__).parent
DIAGNOSIS = "diagnosis"
PARTS = ("train", "validation", "test")
FACT_SHARES = {"validation": 0.12, "test": 0.18}
COMBO_SHARES = {"validation": 0.10, "test": 0.20}

# exam split -> (part of the facts, part of the combinations)
EXAM_SPLITS = {
    "train": ("train", "train"),
    "validation": ("train", "validation"),
    "validation_questions": ("validation", "validation"),
    "new_findings": ("train", "test"),
    "new_questions": ("test", "test"),
}

Fact = tuple[str, str]  # (name of the condition, relation)
Combo = tuple[str, str, str]  # a set of three findings, in the order of the condition's list


@dataclass(frozen=True)
class Condition:
    """One condition: `age` is the typical range in years, `answers` has one answer per relation, diagnosis included."""

    name: str
    area: str
    sex: str  # any, male or female
    age: tuple[int, int]
    findings: tuple[str, ...]
    answers: Mapping[str, str] = field(hash=False)
    accepts: Mapping[str, frozenset[str]] = field(hash=False)

    def acceptable(self, relation: str) -> frozenset[str]:
        """Return all answers that count as right for `relation`, in lower case: the answer itself and the arguable ones."""
        return self.accepts.get(relation, frozenset()) | {self.answers[relation].lower()}


FACT_RELATIONS = ("cause", "test", "treatment", "complication", "risk")


@cache
def wordings() -> dict[str, Any]:
    """Return the clinic's wordings, from `wordings.yaml`."""
    found: dict[str, Any] = load_yaml((FOLDER / "wordings.yaml").read_text(encoding="utf-8"), "wordings.yaml")
    return found


@cache
def conditions_by_name() -> dict[str, Condition]:
    """Return all conditions by name, sorted; `tests/clinic` checks that the files keep the promises above."""
    files = sorted((FOLDER / "conditions").glob("*.yaml"))
    entries = [entry for path in files for entry in load_yaml(path.read_text(encoding="utf-8"), path.name)]
    return {entry["name"]: _condition(entry) for entry in sorted(entries, key=lambda entry: str(entry["name"]))}


def _condition(entry: Mapping[str, Any]) -> Condition:
    low, high = entry["age"]
    return Condition(
        name=entry["name"],
        area=entry["area"],
        sex=entry.get("sex", "any"),
        age=(low, high),
        findings=tuple(entry["findings"]),
        answers={DIAGNOSIS: entry["name"], **{relation: entry[relation] for relation in FACT_RELATIONS}},
        accepts={name: frozenset(text.lower() for text in texts) for name, texts in entry.get("accepts", {}).items()},
    )


@cache
def phrase_pool() -> tuple[str, ...]:
    """Return every finding, condition name and answer of the clinic once, sorted."""
    return tuple(sorted({text for one in conditions_by_name().values() for text in (*one.findings, *one.answers.values())}))


@cache
def split_facts() -> dict[str, list[Fact]]:
    """Return the facts of each of `PARTS`; each part holds its share of every relation."""
    rng = random.Random("clinic facts 0")
    held_out: Counter[str] = Counter()
    facts: dict[str, list[Fact]] = {part: [] for part in PARTS}
    facts["train"] += [(name, DIAGNOSIS) for name in conditions_by_name()]
    for relation in FACT_RELATIONS:
        names = list(conditions_by_name())
        rng.shuffle(names)
        names.sort(key=lambda name: held_out[name])  # least held out first; the sort is stable, the rest stays shuffled
        num_validation, num_test = (round(FACT_SHARES[part] * len(names)) for part in ("validation", "test"))
        chosen = names[: num_validation + num_test]
        rng.shuffle(chosen)
        part_of = {name: "validation" if i < num_validation else "test" for i, name in enumerate(chosen)}
        for name in conditions_by_name():
            facts[part_of.get(name, "train")].append((name, relation))
        held_out.update(chosen)
    return facts


@cache
def split_combos(name: str) -> dict[str, list[Combo]]:
    """Return the combinations of three findings of a condition for each of `PARTS`, by the rank of their hash."""

    def draw(combo: Combo) -> bytes:
        return blake2b("|".join(["0", name, *sorted(combo)]).encode(), digest_size=8).digest()

    combos = sorted(combinations(conditions_by_name()[name].findings, 3), key=draw)
    num_validation, num_test = (round(COMBO_SHARES[part] * len(combos)) for part in ("validation", "test"))
    held_out = num_validation + num_test
    return {"validation": combos[:num_validation], "test": combos[num_validation:held_out], "train": combos[held_out:]}
