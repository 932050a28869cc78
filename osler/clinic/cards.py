"""The clinic's matching cards: a few phrases with their letters, then the same again in another order, by seed.

A card states no fact: its phrases are drawn from all of the clinic at random, held-out answers included. It teaches the
form of the exam, to find the letter that stands beside a text. A model learns that from exam items too, but there one
token in eighty asks for it, here one in six: with cards this ability comes within a few hundred steps instead of
after most of the training.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator
from functools import lru_cache

from osler.clinic.facts import FACT_RELATIONS, load_conditions

SIZES = (4, 4, 4, 5, 6)  # mostly as many phrases as an exam item has options


def cards(seed: int, count: int) -> Iterator[str]:
    """Yield ``count`` cards, each of about 40 to 70 tokens."""
    rng = random.Random(f"clinic cards {seed}")
    for _ in range(count):
        yield card(rng)


def card(rng: random.Random) -> str:
    """One card: "Cards: fainting (A) tick bite (B). Again: tick bite (B) fainting (A)." with four to six phrases."""
    phrases = rng.sample(phrase_pool(), rng.choice(SIZES))
    lettered = [f"{phrase} ({letter})" for phrase, letter in zip(phrases, string.ascii_uppercase, strict=False)]
    shuffled = rng.sample(lettered, len(lettered))
    return f"Cards: {' '.join(lettered)}. Again: {' '.join(shuffled)}."


@lru_cache(maxsize=1)
def phrase_pool() -> tuple[str, ...]:
    """Every finding, condition name and answer of the clinic once, sorted."""
    pool: set[str] = set()
    for condition in load_conditions():
        pool.update(condition.findings)
        pool.add(condition.name)
        pool.update(condition.answers[relation] for relation in FACT_RELATIONS)
    return tuple(sorted(pool))
