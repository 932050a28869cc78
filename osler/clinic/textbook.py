"""The clinic's textbook: short passages of prose about one condition each, by seed.

The clinic is a synthetic world, a test bench and not medical advice. A passage lists some findings of a condition and
states all five of its relations, held-out facts included: the textbook is where a model meets the facts it will never
be asked about in training. Wording varies (both directions: "the cause of X is Y", "Y can cause X"), but the canonical
wording, the one of the reasoning samples, is the most common. Sentences begin with a small set of words and never with
the name of a finding or a condition, so that a small vocabulary needs one spelling of each.

Exactly three findings in one sentence are always a train combination, so that *new findings* stay new.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from osler.clinic.facts import FACT_RELATIONS, RELATIONS, Condition, load_conditions
from osler.clinic.splits import Splits, make_splits

CANONICAL_SHARE = 0.4  # of the relation sentences and of the finding sentences

CANONICAL_FINDINGS = "Here {f} suggest {x}."
FINDING_PHRASINGS = (
    "Together {f} point to {x}.",
    "Think of {x} when you see {f}.",
    "Patients with {x} often have {f}.",
    "Typical findings of {x} are {f}.",
    "In {x}, expect {f}.",
    "Recall that {f} suggest {x}.",
)
TITLES = ("", "About {x}:", "Notes on {x}:", "Review of {x}:", "Today we study {x}.", "Next comes {x}.")


def textbook(seed: int, passages: int, *, split_seed: int = 0) -> Iterator[str]:
    """Yield `passages` passages, each of about 70 to 110 tokens; every condition comes once per round, shuffled."""
    rng = random.Random(f"clinic textbook {seed}")
    splits = make_splits(split_seed)
    conditions = list(load_conditions())
    for index in range(passages):
        turn = index % len(conditions)
        if turn == 0:
            rng.shuffle(conditions)
        yield passage(conditions[turn], splits, rng)


def passage(condition: Condition, splits: Splits, rng: random.Random) -> str:
    """Return one passage: perhaps a title, one or two sentences of findings, and the five relations in random order."""
    title = rng.choice(TITLES).format(x=condition.name)
    relations = list(FACT_RELATIONS)
    rng.shuffle(relations)
    sentences = [relation_sentence(condition, relation, rng) for relation in relations]
    findings = draw_findings(condition, splits, rng)
    sentences.insert(0, finding_sentence(condition, findings, rng))
    if len(findings) < 4 and rng.random() < 0.25:  # a second look at the findings, which may stand anywhere
        second = finding_sentence(condition, rng.sample(condition.findings, 2), rng)
        sentences.insert(rng.randrange(1, len(sentences) + 1), second)
    return " ".join([title, *sentences] if title else sentences)


def draw_findings(condition: Condition, splits: Splits, rng: random.Random) -> list[str]:
    """Draw mostly three findings (a train combination), else two or four, in random order."""
    count = rng.choices((2, 3, 4), weights=(1, 6, 2))[0]
    if count != 3:
        return rng.sample(condition.findings, count)
    return rng.sample(rng.choice(splits.combos[condition.name]["train"]), 3)


def finding_sentence(condition: Condition, findings: Sequence[str], rng: random.Random) -> str:
    """Return a sentence that ties these findings, in this order, to the condition."""
    phrasing = CANONICAL_FINDINGS if rng.random() < CANONICAL_SHARE else rng.choice(FINDING_PHRASINGS)
    return phrasing.format(f=join_findings(findings), x=condition.name)


def relation_sentence(condition: Condition, relation: str, rng: random.Random) -> str:
    """Return a sentence that states the fact (condition, relation)."""
    table = RELATIONS[relation]
    phrasing = table.canonical if rng.random() < CANONICAL_SHARE else rng.choice(table.phrasings)
    return phrasing.format(x=condition.name, y=condition.answers[relation])


def reasoning(condition: Condition, relation: str, findings: Sequence[str]) -> str:
    """Return the short reasoning of a sample in canonical wording: findings, therefore condition, therefore fact."""
    first = CANONICAL_FINDINGS.format(f=join_findings(findings), x=condition.name)
    second = RELATIONS[relation].canonical.format(x=condition.name, y=condition.answers[relation])
    return f"{first} {second}"


def join_findings(findings: Sequence[str]) -> str:
    """Return `a`, `a and b`, or `a, b and c`."""
    if len(findings) < 2:
        return "".join(findings)
    return f"{', '.join(findings[:-1])} and {findings[-1]}"
