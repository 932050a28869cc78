"""Long histories of a patient, in which one visit tells what the question asks for: a needle in a haystack, by seed and split.

- "needle": one visit shows a finding that one of four conditions has, and the question asks for the diagnosis.
- "copy": at one visit the patient says one of four phrases, and the question asks for it. This needs no knowledge.

No other visit shows a finding of the four conditions, or one of the four phrases. The four are drawn alike, and any of them may
be the right one, so without the telling visit no option is likelier than another. A case is the same in every history that is
made of it, however long the history is and wherever the telling visit stands.
"""

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache

from osler.clinic.exam import NUM_OPTIONS
from osler.clinic.facts import DIAGNOSIS, conditions_by_name, phrase_pool, wordings
from osler.clinic.textbook import join_findings
from osler.runtime.errors import UserError

HISTORY_SPLITS = ("needle", "copy")
FINDINGS_SHOWN = 3  # at a visit, as in the vignettes of the exam


@dataclass(frozen=True)
class Visit:
    """A visit on a day, as a sentence with a place for the date."""

    day: date
    text: str

    def __str__(self) -> str:
        return self.text.format(date=self.day.isoformat())


@dataclass(frozen=True)
class Case:
    """A question, and as ``telling`` the visit with its answer, not dated yet; no other visit shows the ``hidden`` phrases."""

    id: str
    question: str
    options: tuple[str, ...]
    answer_index: int
    telling: str
    who: str
    hidden: tuple[str, ...]

    def visits(self) -> Iterator[Visit]:
        """Yield the other visits, endlessly, in order of time; there is at least a day between two of them."""
        rng = random.Random(f"clinic visits {self.id}")
        findings = findings_apart_from(self.hidden)
        day = date(2000, 1, 1)
        while True:
            day += timedelta(days=rng.randint(2, 8))
            yield Visit(day, _visit(self.who, rng.sample(findings, FINDINGS_SHOWN), rng))

    def history(self, visits: Sequence[Visit], place: int) -> str:
        """Return a history in which the telling visit comes after ``place`` of the other visits."""
        before = visits[place - 1].day if place else visits[0].day - timedelta(days=2)
        told = [*visits[:place], Visit(before + timedelta(days=1), self.telling), *visits[place:]]
        return " ".join(map(str, told))


def cases(seed: int, split: str, n: int) -> list[Case]:
    """Return ``n`` cases of one of ``HISTORY_SPLITS``, the same for the same arguments; raises UserError for an unknown split."""
    if split not in HISTORY_SPLITS:
        raise UserError(f"A needle test has no split {split!r}. Choose one of: {', '.join(HISTORY_SPLITS)}.")
    rng = random.Random(f"clinic histories {seed} {split}")
    letters = list(range(NUM_OPTIONS))
    made = []
    make = _needle if split == "needle" else _copy
    for number in range(n):
        if number % NUM_OPTIONS == 0:
            rng.shuffle(letters)
        made.append(make(f"{split}-{seed}-{number:06d}", letters[number % NUM_OPTIONS], rng))
    return made


def findings_apart_from(phrases: Collection[str]) -> list[str]:
    """Return the findings of the whole clinic that neither contain one of the phrases nor are contained in one, sorted."""
    near = frozenset[str]().union(*map(_findings_near, phrases))
    return [finding for finding in _findings() if finding not in near]


def _needle(name: str, answer_index: int, rng: random.Random) -> Case:
    sex = rng.choice(("male", "female"))
    offered = rng.sample([one for one in conditions_by_name().values() if one.sex in ("any", sex)], NUM_OPTIONS)
    hidden = tuple(phrase for one in offered for phrase in (one.name, *one.findings))
    others = {finding for one in offered for finding in one.findings if one is not offered[answer_index]}
    decisive = rng.choice([finding for finding in offered[answer_index].findings if finding not in others])
    shown = [decisive, *rng.sample(findings_apart_from(hidden), FINDINGS_SHOWN - 1)]
    rng.shuffle(shown)
    who = "man" if sex == "male" else "woman"
    question = rng.choice(wordings()["relations"][DIAGNOSIS]["questions"])
    return Case(name, question, tuple(one.name for one in offered), answer_index, _visit(who, shown, rng), who, hidden)


def _copy(name: str, answer_index: int, rng: random.Random) -> Case:
    offered: list[str] = []
    while len(offered) < NUM_OPTIONS:
        phrase = rng.choice(phrase_pool())
        if not any(_overlap(phrase, other) for other in offered):
            offered.append(phrase)
    who = rng.choice(("man", "woman"))
    told = rng.choice(wordings()["histories"]["said"]).replace("{who}", who).replace("{x}", offered[answer_index])
    question = rng.choice(wordings()["histories"]["questions"])
    return Case(name, question, tuple(offered), answer_index, told, who, tuple(offered))


def _visit(who: str, findings: Sequence[str], rng: random.Random) -> str:
    wording: str = rng.choice(wordings()["histories"]["visits"])
    return wording.replace("{who}", who).replace("{f}", join_findings(findings))


@cache
def _findings() -> tuple[str, ...]:
    return tuple(sorted({finding for condition in conditions_by_name().values() for finding in condition.findings}))


@cache
def _findings_near(phrase: str) -> frozenset[str]:
    return frozenset(finding for finding in _findings() if _overlap(finding, phrase))


def _overlap(one: str, other: str) -> bool:
    return one.lower() in other.lower() or other.lower() in one.lower()
