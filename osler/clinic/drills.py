"""The clinic's drills: texts that train the form of the exam and state no fact, by seed.

Matching cards are plain text: phrases with letters, some of which are then asked again. They teach a model to find the letter
beside a text. Option drills look like exam items whose question names the option to choose. They teach it to answer with what it
has just reasoned. Phrases are drawn at random from the whole clinic, held-out answers included, so a drill does not say which
condition has which fact.

Why: in exam items one token in eighty asks for a letter, on a card one in six. And a held-out answer is never the right option of
a training item. Without drills a small model learns the form late, or only for the answers that it was trained to give.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator
from functools import lru_cache

from osler.clinic.exam import NUM_OPTIONS, ClinicItem
from osler.clinic.facts import FACT_RELATIONS, load_conditions

CARD_SIZES = (4, 4, 4, 5, 6)  # mostly as many phrases as an exam item has options
DRILL_QUESTIONS = ("Which option says {x}?", "Find {x}.", "Choose {x}.", "Where is {x}?", "Point to {x}.")


def cards(seed: int, count: int) -> Iterator[str]:
    """Yield ``count`` matching cards, each of about 50 to 90 tokens."""
    rng = random.Random(f"clinic cards {seed}")
    for _ in range(count):
        yield card(rng)


def card(rng: random.Random) -> str:
    """Return one card, such as "Cards: fainting (A) tick bite (B). Again: tick bite (B) tick bite (B) fainting (A)."

    It has four to six phrases, and asks for two more than it has, drawn with replacement, so that no letter can be ruled out.
    """
    phrases = rng.sample(phrase_pool(), rng.choice(CARD_SIZES))
    lettered = [f"{phrase} ({letter})" for phrase, letter in zip(phrases, string.ascii_uppercase, strict=False)]
    asked = rng.choices(lettered, k=len(lettered) + 2)
    return f"Cards: {' '.join(lettered)}. Again: {' '.join(asked)}."


def drills(seed: int, count: int) -> Iterator[ClinicItem]:
    """Yield ``count`` option drills as items of the split "drill", without condition, relation or findings."""
    rng = random.Random(f"clinic drills {seed}")
    for number in range(count):
        options = tuple(rng.sample(phrase_pool(), NUM_OPTIONS))
        answer_index = rng.randrange(NUM_OPTIONS)
        phrase = options[answer_index]
        yield ClinicItem(
            id=f"drill-{seed}-{number}",
            question=rng.choice(DRILL_QUESTIONS).format(x=phrase),
            options=options,
            answer_index=answer_index,
            split="drill",
            condition="",
            relation="",
            thinking=f"Here the option is {phrase}.",
            findings=(),
        )


@lru_cache(maxsize=1)
def phrase_pool() -> tuple[str, ...]:
    """Return every finding, condition name and answer of the clinic once, sorted."""
    pool: set[str] = set()
    for condition in load_conditions():
        pool.update(condition.findings)
        pool.add(condition.name)
        pool.update(condition.answers[relation] for relation in FACT_RELATIONS)
    return tuple(sorted(pool))
