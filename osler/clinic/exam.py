"""The clinic's exam, by seed and split: multiple-choice vignettes with four options and a short reasoning, and drills.

An item shows a patient (age, sex, three findings) and asks for one relation of the condition behind them; the reasoning names the
condition first, then the fact. Distractors are answers of other conditions to the same question; mostly one or two come from the
same speciality, none is arguable for this condition, none repeats, and none belongs to a condition of the other sex. Two rules
keep questions about the held-out facts (see `facts.py`) fair:

- In items about train facts a distractor is always the right answer of some train fact. Otherwise training would teach that the
  held-out answers are wrong whenever they are offered.
- In items about held-out facts at least two of the three distractors are answers of held-out facts too, so that "the option never
  seen in training" does not give the answer away.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from osler.clinic.facts import EXAM_SPLITS, Condition, Fact, conditions_by_name, phrase_pool, split_combos, split_facts, wordings
from osler.clinic.textbook import join_findings, reasoning
from osler.runtime.errors import UserError

NUM_OPTIONS = 4


@dataclass(frozen=True)
class ClinicItem:
    """One exam item; `question` excludes the options, `options[answer_index]` is the right one."""

    id: str
    question: str
    options: tuple[str, ...]
    answer_index: int
    split: str
    thinking: str
    condition: str = ""
    relation: str = ""
    findings: tuple[str, ...] = ()


def exam(seed: int, split: str, n: int) -> list[ClinicItem]:
    """Return `n` items of one of `EXAM_SPLITS`, the same for the same arguments; raises UserError for an unknown split.

    Every fact comes once per round, and each round is shuffled. No combination of findings comes with a fact for a second time
    before the fact has come with every combination of the split's part.
    """
    if split not in EXAM_SPLITS:
        raise UserError(f"The clinic has no exam split {split!r}. Choose one of: {', '.join(EXAM_SPLITS)}.")
    rng = random.Random(f"clinic exam {seed} {split}")
    fact_part, combo_part = EXAM_SPLITS[split]
    facts = list(split_facts()[fact_part])
    parts = {fact: split_combos(fact[0])[combo_part] for fact in facts}
    combos = {fact: rng.sample(part, len(part)) for fact, part in parts.items()}
    letters = list(range(NUM_OPTIONS))
    items: list[ClinicItem] = []
    for index in range(n):
        if index % len(facts) == 0:
            rng.shuffle(facts)
        if index % NUM_OPTIONS == 0:
            rng.shuffle(letters)
        fact = facts[index % len(facts)]
        condition, relation = conditions_by_name()[fact[0]], fact[1]
        findings = tuple(rng.sample(combos[fact][index // len(facts) % len(combos[fact])], 3))
        sex = condition.sex if condition.sex != "any" else rng.choice(("male", "female"))
        vignette = render_vignette(rng.choice(wordings()["frames"]), rng.randint(*condition.age), sex, findings)
        options = draw_distractors(fact, fact_part, sex, rng)
        answer_index = letters[index % NUM_OPTIONS]
        options.insert(answer_index, condition.answers[relation])
        items.append(
            ClinicItem(
                id=f"clinic-{split}-0-{seed}-{index:06d}",  # never change its form, because it seeds permutations
                question=f"{vignette} {rng.choice(wordings()['relations'][relation]['questions'])}",
                options=tuple(options),
                answer_index=answer_index,
                split=split,
                thinking=reasoning(condition, relation, findings),
                condition=condition.name,
                relation=relation,
                findings=findings,
            )
        )
    return items


def render_vignette(frame: str, age: int, sex: str, findings: Sequence[str]) -> str:
    """Return the sentence about the patient, who is a boy or a girl below 18 years."""
    who = ("boy" if age < 18 else "man") if sex == "male" else ("girl" if age < 18 else "woman")
    article = "An" if age in (8, 11, 18) or 80 <= age < 90 else "A"
    return frame.format(a=article, age=age, who=who, f=join_findings(findings))


def draw_distractors(fact: Fact, fact_part: str, sex: str, rng: random.Random) -> list[str]:
    """Draw three different wrong answers, in random order."""
    same_area, other, held_out = distractor_pools(fact, fact_part, sex)
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
def distractor_pools(fact: Fact, fact_part: str, sex: str) -> tuple[list[str], list[str], list[str]]:
    """Return three lists of wrong answers: from the fact's speciality, from all, and those that answer no train fact.

    The third list is empty for a train fact. Conditions of the other sex give no answers.
    """
    condition, relation = conditions_by_name()[fact[0]], fact[1]
    acceptable = condition.acceptable(relation)
    train_facts = set(split_facts()["train"])

    def answers(candidates: Sequence[Condition]) -> list[str]:
        unique = dict.fromkeys(candidate.answers[relation] for candidate in candidates)
        return [answer for answer in unique if answer.lower() not in acceptable]

    candidates = [other for other in conditions_by_name().values() if other.sex in ("any", sex)]
    trained = [other for other in candidates if (other.name, relation) in train_facts]
    chosen = trained if fact_part == "train" else candidates
    seen = set(answers(trained))
    held_out = [answer for answer in answers(chosen) if answer not in seen]
    return answers([other for other in chosen if other.area == condition.area]), answers(chosen), held_out


def drills(seed: int, count: int) -> Iterator[ClinicItem]:
    """Yield items of the split "drill", whose question names the option to choose. They teach a model to answer as it reasoned.

    Their options are drawn from the whole clinic and state no fact. A held-out answer is never the right option of a
    training item: without drills a small model gives only the answers that it was trained to give.
    """
    rng = random.Random(f"clinic drills {seed}")
    for number in range(count):
        options = tuple(rng.sample(phrase_pool(), NUM_OPTIONS))
        answer_index = rng.randrange(NUM_OPTIONS)
        phrase = options[answer_index]
        yield ClinicItem(
            id=f"drill-{seed}-{number}",
            question=rng.choice(wordings()["drills"]).format(x=phrase),
            options=options,
            answer_index=answer_index,
            split="drill",
            thinking=f"Here the option is {phrase}.",
        )
