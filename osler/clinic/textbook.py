"""The clinic's texts, by seed: passages of prose about one condition each, and cards that teach to find a letter.

A passage lists some findings of a condition and states all five of its relations, held-out facts included. Here a model meets the
facts that it will never be asked about in training. Wording varies, but that of the reasoning samples is the most common.
Sentences never begin with a finding or a condition, so that a small vocabulary needs one spelling of each. A sentence with
exactly three findings always has a train combination, so that *new findings* stay new.
"""

import random
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from osler.clinic.facts import FACT_RELATIONS, Condition, conditions_by_name, phrase_pool, split_combos, wordings

CANONICAL_SHARE = 0.4  # share of the sentences of relations and findings that have the canonical wording

CARD_SIZES = (4, 4, 4, 5, 6)  # mostly as many phrases as an exam item has options


def textbook(seed: int, passages: int) -> Iterator[str]:
    """Yield `passages` passages, each of about 70 to 110 tokens; every condition comes once per round, shuffled."""
    rng = random.Random(f"clinic textbook {seed}")
    conditions = list(conditions_by_name().values())
    for index in range(passages):
        turn = index % len(conditions)
        if turn == 0:
            rng.shuffle(conditions)
        yield passage(conditions[turn], rng)


def passage(condition: Condition, rng: random.Random) -> str:
    """Return one passage: perhaps a title, one or two sentences of findings, and the five relations in random order."""

    def sentence(wording: Mapping[str, Any], **parts: str) -> str:
        phrasing = wording["canonical"] if rng.random() < CANONICAL_SHARE else rng.choice(wording["phrasings"])
        return phrasing.format(x=condition.name, **parts)

    title = rng.choice(wordings()["titles"]).format(x=condition.name)
    relations = list(FACT_RELATIONS)
    rng.shuffle(relations)
    sentences = [sentence(wordings()["relations"][relation], y=condition.answers[relation]) for relation in relations]
    count = rng.choices((2, 3, 4), weights=(1, 6, 2))[0]
    pool = condition.findings if count != 3 else rng.choice(split_combos(condition.name)["train"])
    findings = join_findings(rng.sample(pool, count))
    sentences.insert(0, sentence(wordings()["findings"], f=findings))
    if count < 4 and rng.random() < 0.25:  # a second sentence of findings, which may stand anywhere
        findings = join_findings(rng.sample(condition.findings, 2))
        second = sentence(wordings()["findings"], f=findings)
        sentences.insert(rng.randrange(1, len(sentences) + 1), second)
    return " ".join([title, *sentences] if title else sentences)


def reasoning(condition: Condition, relation: str, findings: Sequence[str]) -> str:
    """Return the short reasoning of a sample in canonical wording: findings, therefore condition, therefore fact."""
    first = wordings()["findings"]["canonical"].format(f=join_findings(findings), x=condition.name)
    second = wordings()["relations"][relation]["canonical"].format(x=condition.name, y=condition.answers[relation])
    return f"{first} {second}"


def join_findings(findings: Sequence[str]) -> str:
    """Return `a and b`, or `a, b and c`."""
    return f"{', '.join(findings[:-1])} and {findings[-1]}"


def cards(seed: int, count: int) -> Iterator[str]:
    """Yield cards, such as "Cards: fainting (A) tick bite (B). Again: tick bite (B) tick bite (B) fainting (A)."

    A card has four to six phrases of the whole clinic and asks for two more than it has, drawn with replacement, so that no
    letter can be ruled out. In exam items one token in eighty asks for a letter, on a card one in six. Without cards a small
    model learns late to find the letter beside a text.
    """
    rng = random.Random(f"clinic cards {seed}")
    for _ in range(count):
        phrases = rng.sample(phrase_pool(), rng.choice(CARD_SIZES))
        lettered = [f"{phrase} ({letter})" for phrase, letter in zip(phrases, string.ascii_uppercase, strict=False)]
        asked = rng.choices(lettered, k=len(lettered) + 2)
        yield f"Cards: {' '.join(lettered)}. Again: {' '.join(asked)}."
