"""The facts of the clinic: real conditions, their findings, and one short answer per relation.

The clinic is Osler's built-in synthetic world of medicine. It is a test bench for training a small language model, not
medical advice: facts are true but cut down to a few words, and real patients do not come with exactly three findings.

The data are the YAML files beside this module, written by hand for this project, one per group of specialities:

- `findings`: eight short ones per condition. Two conditions share at most two, so any three name one condition.
- `cause`, `test`, `treatment`, `complication`, `risk`: one answer each (for `cause` an organism or a mechanism).
- `accepts`: per relation, further answers that would also be right or arguable for this condition. They are never
  offered as distractors.

Everything here is immutable and read once per process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import Any

from osler.config.yaml12 import load_yaml

CONDITIONS_FOLDER = Path(__file__).parent
NUM_FINDINGS = 8
SEXES = ("any", "male", "female")
DIAGNOSIS = "diagnosis"


@dataclass(frozen=True)
class Relation:
    """One kind of fact; templates hold `{x}` for the condition and `{y}` for the answer.

    `canonical` is the wording of every reasoning sample and the most common one in the textbook, so that a fact read
    only in prose can be recalled in the reasoning. `phrasings` are the other wordings of the textbook.
    """

    name: str
    canonical: str
    phrasings: tuple[str, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Condition:
    """One condition: `age` is the typical range in years, `answers` has one answer per relation, diagnosis included."""

    name: str
    area: str
    sex: str
    age: tuple[int, int]
    findings: tuple[str, ...]
    answers: Mapping[str, str] = field(hash=False)
    accepts: Mapping[str, frozenset[str]] = field(hash=False)

    def acceptable(self, relation: str) -> frozenset[str]:
        """Return all answers that count as right for `relation`, in lower case: the answer itself and the arguable ones."""
        return self.accepts.get(relation, frozenset()) | {self.answers[relation].lower()}


# The diagnosis has no sentence of its own in the textbook: every sentence that lists findings states it.
RELATIONS: Mapping[str, Relation] = MappingProxyType({
    relation.name: relation
    for relation in (
        Relation(
            DIAGNOSIS,
            "The diagnosis is {x}.",
            (),
            ("What is the diagnosis?", "What is the most likely diagnosis?", "Which condition is most likely?",
             "Which condition fits best?"),
        ),
        Relation(
            "cause",
            "The cause of {x} is {y}.",
            ("The underlying cause of {x} is {y}.", "In {x}, the cause is {y}.", "We know that {x} is caused by {y}.",
             "Recall that {y} can cause {x}.", "Given {y}, think of {x}.", "Patients develop {x} because of {y}."),
            ("What is the cause?", "What is the most likely cause?", "What is the underlying cause?",
             "Which cause is most likely?"),
        ),
        Relation(
            "test",
            "The best test for {x} is {y}.",
            ("The test that confirms {x} is {y}.", "In {x}, the best test is {y}.", "Doctors confirm {x} with {y}.",
             "Recall that {y} can confirm {x}.", "To confirm {x}, order {y}.", "Order {y} when you suspect {x}."),
            ("What is the best test?", "Which test is best?", "Which test confirms this?",
             "Which test should doctors order?"),
        ),
        Relation(
            "treatment",
            "First-line treatment of {x} is {y}.",
            ("The best first treatment of {x} is {y}.", "In {x}, first-line treatment is {y}.",
             "Doctors treat {x} with {y}.", "Recall that {y} can treat {x}.", "To treat {x}, begin with {y}.",
             "Use {y} when you treat {x}."),
            ("What is the first-line treatment?", "What is the best first treatment?", "Which treatment comes first?",
             "Which treatment is best?"),
        ),
        Relation(
            "complication",
            "A classic complication of {x} is {y}.",
            ("A feared complication of {x} is {y}.", "In {x}, a classic complication is {y}.",
             "Untreated {x} can lead to {y}.", "Recall that {y} can complicate {x}.", "Watch for {y} in {x}.",
             "Patients with {x} may develop {y}."),
            ("What is a classic complication?", "Which complication is classic?", "Which complication is feared?",
             "What complication may develop?"),
        ),
        Relation(
            "risk",
            "A classic risk factor for {x} is {y}.",
            ("A known risk factor for {x} is {y}.", "In {x}, a classic risk factor is {y}.",
             "The risk of {x} rises with {y}.", "Recall that {y} can predispose to {x}.",
             "Ask about {y} when you suspect {x}.", "Doctors link {x} to {y}."),
            ("What is a classic risk factor?", "Which risk factor is classic?", "Which risk factor is known?",
             "What predisposes to this?"),
        ),
    )
})

FACT_RELATIONS: tuple[str, ...] = tuple(name for name in RELATIONS if name != DIAGNOSIS)


@lru_cache(maxsize=1)
def load_conditions() -> tuple[Condition, ...]:
    """Return all conditions, sorted by name. Raises ValueError, naming the condition, when the data break an invariant."""
    conditions: list[Condition] = []
    for path in sorted(CONDITIONS_FOLDER.glob("*.yaml")):
        entries = load_yaml(path.read_text(encoding="utf-8"), path.name)
        conditions.extend(parse_condition(entry) for entry in entries)
    conditions.sort(key=lambda condition: condition.name)
    check_conditions(conditions)
    return tuple(conditions)


@lru_cache(maxsize=1)
def conditions_by_name() -> Mapping[str, Condition]:
    """Return `load_conditions()` by name."""
    return MappingProxyType({condition.name: condition for condition in load_conditions()})


def parse_condition(entry: Mapping[str, Any]) -> Condition:
    """Return a YAML entry as a Condition. Raises ValueError for a missing or unknown key or a malformed value."""
    name = entry.get("name", "?")
    required = {"name", "area", "age", "findings", *FACT_RELATIONS}
    if missing := required - set(entry):
        raise ValueError(f"condition {name!r} lacks {sorted(missing)}")
    if unknown := set(entry) - required - {"sex", "accepts"}:
        raise ValueError(f"condition {name!r} has unknown keys {sorted(unknown)}")
    sex = entry.get("sex", "any")
    if sex not in SEXES:
        raise ValueError(f"condition {name!r}: sex {sex!r} is not one of {SEXES}")
    low, high = entry["age"]
    if not 1 <= low <= high <= 99:
        raise ValueError(f"condition {name!r}: age {entry['age']} is not a range within 1 to 99")
    accepts = entry.get("accepts", {})
    if unknown := set(accepts) - set(RELATIONS):
        raise ValueError(f"condition {name!r}: accepts has unknown relations {sorted(unknown)}")
    answers = {DIAGNOSIS: name, **{relation: entry[relation] for relation in FACT_RELATIONS}}
    texts = [*answers.values(), *entry["findings"], *(text for group in accepts.values() for text in group)]
    for text in texts:
        if not isinstance(text, str) or text != text.strip() or not text:
            raise ValueError(f"condition {name!r}: {text!r} is not a trimmed text")
    return Condition(
        name=name,
        area=entry["area"],
        sex=sex,
        age=(low, high),
        findings=tuple(entry["findings"]),
        answers=MappingProxyType(answers),
        accepts=MappingProxyType({key: frozenset(text.lower() for text in group) for key, group in accepts.items()}),
    )


def check_conditions(conditions: list[Condition]) -> None:
    """Raise ValueError when names repeat, a condition lacks findings, or three findings would fit two conditions."""
    names = [condition.name for condition in conditions]
    if len(set(names)) != len(names):
        raise ValueError(f"condition names repeat: {sorted(name for name in names if names.count(name) > 1)}")
    for condition in conditions:
        if len(condition.findings) != NUM_FINDINGS or len(set(condition.findings)) != NUM_FINDINGS:
            raise ValueError(f"condition {condition.name!r} needs {NUM_FINDINGS} different findings")
    for one, other in combinations(conditions, 2):
        shared = set(one.findings) & set(other.findings)
        if len(shared) > 2:
            raise ValueError(f"{one.name!r} and {other.name!r} share {sorted(shared)}: three findings must name one")
