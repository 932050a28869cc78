"""The clinic's exam: multiple-choice vignettes with four options and a short reasoning, by seed and split.

The clinic is a synthetic world, a test bench and not medical advice. An item shows a patient (age, sex, three findings)
and asks for one relation of the condition behind them; the reasoning names the condition first, then the fact. See
`osler.clinic.splits` for what the five splits hold out.

Distractors are answers of other conditions to the same question; one or two come from the same speciality, none is
arguable for this condition, none repeats, and none belongs to a condition of the other sex. Two rules keep the
held-out facts fair:

- In items about train facts a distractor is always the right answer of some train fact. Otherwise training would teach
  that the held-out answers are wrong whenever they are offered.
- In items about held-out facts two of the three distractors are answers of held-out facts too, so that "the option
  never seen in training" does not give the answer away.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from osler.clinic.facts import RELATIONS, Condition, conditions_by_name, load_conditions
from osler.clinic.splits import EXAM_SPLITS, Combo, Fact, make_splits
from osler.clinic.textbook import join_findings, reasoning
from osler.runtime.errors import UserError

NUM_OPTIONS = 4

FRAMES = (
    "{a} {age}-year-old {who} has {f}.",
    "{a} {age}-year-old {who} shows {f}.",
    "A {who} aged {age} has {f}.",
    "A {who} aged {age} presents with {f}.",
    "This {who} of {age} has {f}.",
    "This {who} aged {age} shows {f}.",
)


@dataclass(frozen=True)
class ClinicItem:
    """One exam item; `question` excludes the options, `options[answer_index]` is the right one."""

    id: str
    question: str
    options: tuple[str, ...]
    answer_index: int
    split: str
    condition: str
    relation: str
    thinking: str
    findings: tuple[str, ...]

    @property
    def answer(self) -> str:
        """The text of the right option."""
        return self.options[self.answer_index]


def exam(seed: int, split: str, n: int, *, split_seed: int = 0) -> list[ClinicItem]:
    """Return `n` items of one of `EXAM_SPLITS`, balanced over facts and letters, the same for the same arguments.

    Every fact comes once per round, and each round is shuffled; a fact meets every combination of its part before one returns.
    Raises UserError when the split is unknown or `n` is negative.
    """
    if split not in EXAM_SPLITS:
        raise UserError(f"The clinic has no exam split {split!r}. Choose one of: {', '.join(EXAM_SPLITS)}.")
    if n < 0:
        raise UserError(f"An exam cannot have {n} items. Give a number of items that is 0 or more.")
    rng = random.Random(f"clinic exam {seed} {split}")
    splits = make_splits(split_seed)
    fact_part, combo_part = EXAM_SPLITS[split]
    facts = list(splits.facts[fact_part])
    combos = {fact: rng.sample(splits.combos[fact[0]][combo_part], len(splits.combos[fact[0]][combo_part]))
              for fact in facts}
    letters = list(range(NUM_OPTIONS))
    items: list[ClinicItem] = []
    for index in range(n):
        turn = index % len(facts)
        if turn == 0:
            rng.shuffle(facts)
        if index % NUM_OPTIONS == 0:
            rng.shuffle(letters)
        fact = facts[turn]
        findings = combos[fact][index // len(facts) % len(combos[fact])]
        item_id = f"clinic-{split}-{split_seed}-{seed}-{index:06d}"
        items.append(render_item(item_id, fact, findings, letters[index % NUM_OPTIONS], split, split_seed, rng))
    return items


def render_item(
    item_id: str, fact: Fact, combo: Combo, answer_index: int, split: str, split_seed: int, rng: random.Random
) -> ClinicItem:
    """Return one item about `fact`, with the findings of `combo` in random order and the right option at `answer_index`."""
    name, relation = fact
    condition = conditions_by_name()[name]
    findings: Combo = tuple(rng.sample(combo, 3))  # type: ignore[assignment]
    sex = condition.sex if condition.sex != "any" else rng.choice(("male", "female"))
    vignette = render_vignette(rng.choice(FRAMES), rng.randint(*condition.age), sex, findings)
    options = draw_distractors(fact, EXAM_SPLITS[split][0], sex, split_seed, rng)
    options.insert(answer_index, condition.answers[relation])
    return ClinicItem(
        id=item_id,
        question=f"{vignette} {rng.choice(RELATIONS[relation].questions)}",
        options=tuple(options),
        answer_index=answer_index,
        split=split,
        condition=name,
        relation=relation,
        thinking=reasoning(condition, relation, findings),
        findings=findings,
    )


def render_vignette(frame: str, age: int, sex: str, findings: Sequence[str]) -> str:
    """Return the sentence about the patient, who is a boy or a girl below 18 years."""
    who = ("boy" if age < 18 else "man") if sex == "male" else ("girl" if age < 18 else "woman")
    article = "An" if age in (8, 11, 18) or 80 <= age < 90 else "A"
    return frame.format(a=article, age=age, who=who, f=join_findings(findings))


def draw_distractors(fact: Fact, fact_part: str, sex: str, split_seed: int, rng: random.Random) -> list[str]:
    """Draw three different wrong answers, in random order."""
    same_area, other, held_out = distractor_pools(fact, fact_part, sex, split_seed)
    chosen: list[str] = []
    if held_out:
        chosen += rng.sample(held_out, min(2, len(held_out)))
    near = [answer for answer in same_area if answer not in chosen]
    num_near = 1 if held_out else rng.randint(1, 2)
    chosen += rng.sample(near, min(num_near, len(near), NUM_OPTIONS - 1 - len(chosen)))
    while len(chosen) < NUM_OPTIONS - 1:
        answer = rng.choice(other)
        if answer not in chosen:
            chosen.append(answer)
    rng.shuffle(chosen)
    return chosen


@cache
def distractor_pools(
    fact: Fact, fact_part: str, sex: str, split_seed: int
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Return wrong answers for a fact and a sex: of the same speciality, of any, and (for held-out facts) of those."""
    name, relation = fact
    condition = conditions_by_name()[name]
    acceptable = condition.acceptable(relation)
    splits = make_splits(split_seed)
    train_facts = set(splits.facts["train"])

    def answers(candidates: Sequence[Condition]) -> tuple[str, ...]:
        unique = dict.fromkeys(candidate.answers[relation] for candidate in candidates)
        return tuple(answer for answer in unique if answer.lower() not in acceptable)

    candidates = [other for other in load_conditions() if other.sex in ("any", sex)]
    trained = [other for other in candidates if (other.name, relation) in train_facts]
    if fact_part == "train":
        return answers([other for other in trained if other.area == condition.area]), answers(trained), ()
    seen = set(answers(trained))
    held_out = tuple(answer for answer in answers(candidates) if answer not in seen)
    return answers([other for other in candidates if other.area == condition.area]), answers(candidates), held_out
