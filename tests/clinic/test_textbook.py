"""The clinic's textbook: complete, varied, deterministic, and silent about held-out combinations."""

import re
from collections import Counter

from osler.clinic.facts import FACT_RELATIONS, conditions_by_name, phrase_pool, split_combos, wordings
from osler.clinic.textbook import cards, textbook

CONDITIONS = list(conditions_by_name().values())
RELATIONS = wordings()["relations"]
FINDING_PATTERNS = [
    re.compile(re.escape(phrasing).replace(r"\{f\}", "(?P<f>.+)").replace(r"\{x\}", "(?P<x>.+)"))
    for phrasing in (wordings()["findings"]["canonical"], *wordings()["findings"]["phrasings"])
]


def listed_findings(passage: str) -> list[tuple[str, list[str]]]:
    """(condition, findings) of every sentence of the passage that lists findings."""
    found = []
    for sentence in re.split(r"(?<=[.:]) ", passage):
        for pattern in FINDING_PATTERNS:
            match = pattern.fullmatch(sentence)
            if match and match["x"] in conditions_by_name():
                findings = re.split(", | and ", match["f"])
                if set(findings) <= set(conditions_by_name()[match["x"]].findings):
                    found.append((match["x"], findings))
    return found


def test_every_passage_states_findings_and_all_five_relations() -> None:
    names: Counter[str] = Counter()
    for passage in textbook(0, 3 * len(CONDITIONS)):
        [name] = {name for name, _ in listed_findings(passage)}
        names[name] += 1
        for relation in FACT_RELATIONS:
            wordings = (RELATIONS[relation]["canonical"], *RELATIONS[relation]["phrasings"])
            answer = conditions_by_name()[name].answers[relation]
            assert any(wording.format(x=name, y=answer) in passage for wording in wordings), passage
    assert names == dict.fromkeys(conditions_by_name(), 3)


def test_three_findings_are_always_a_train_combination() -> None:
    train = {name: {frozenset(combo) for combo in split_combos(name)["train"]} for name in conditions_by_name()}
    triples = 0
    for passage in textbook(3, 5000):
        for name, findings in listed_findings(passage):
            if len(findings) == 3:
                triples += 1
                assert frozenset(findings) in train[name], passage
    assert triples > 2500


def test_what_is_asked_again_has_the_letter_it_had() -> None:
    letters, lettered = set(), re.compile(r"(.+?) (\([A-F]\)) ?")
    for text in cards(0, 300):
        first, second = text.removeprefix("Cards: ").removesuffix(".").split(". Again: ")
        pairs, asked = lettered.findall(first), lettered.findall(second)
        assert 4 <= len(pairs) <= 6 and len(asked) == len(pairs) + 2
        assert set(asked) <= set(pairs)
        assert [letter for _, letter in pairs] == [f"({letter})" for letter in "ABCDEF"[: len(pairs)]]
        assert all(phrase in phrase_pool() for phrase, _ in pairs)
        letters.update(letter for _, letter in asked)
    assert letters == {f"({letter})" for letter in "ABCDEF"}
