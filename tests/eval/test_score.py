"""What a score reports, how two scores compare, and intervals against published values and simulation."""

import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from osler.eval.score import (
    ANSWERED,
    CUT,
    TOO_LONG,
    UNPARSED,
    Result,
    ScoredExam,
    compare,
    describe_too_long,
    majority,
    mcnemar,
    mean_interval,
    paired_difference,
    pass_at_k,
    summarise,
    wilson,
)
from osler.records.results import ExamScore, add_exams, read_exams
from osler.runtime.errors import UserError
from osler.tasks.item import ExamItem


def exam(answers: str, groups: Sequence[str] = "", clusters: Sequence[str] = "") -> list[ExamItem]:
    options, groups, clusters = ("w", "x", "y", "z"), groups or [""] * len(answers), clusters or [""] * len(answers)
    return [
        ExamItem(f"i{k}", "?", options, "ABCD".index(letter), group=group, cluster=cluster)
        for k, (letter, group, cluster) in enumerate(zip(answers, groups, clusters, strict=True))
    ]


def answered(items: list[ExamItem], given: str) -> ScoredExam:
    results = []
    for item, letter in zip(items, given, strict=True):
        predicted = "ABCD".find(letter)
        status = {"?": UNPARSED, "…": CUT, "#": TOO_LONG}.get(letter, ANSWERED)
        results.append(Result(item, status, predicted == item.answer_index, None if predicted < 0 else predicted))
    return summarise(results)


def test_a_score_reports_what_it_must_be_compared_with() -> None:
    score = answered(exam("AABBBCDD"), "AACCB?…#")
    assert (score.n, score.correct, score.accuracy) == (8, 3, 0.375)
    assert score.interval == pytest.approx(wilson(3, 8))
    assert (score.unparsed, score.cut, score.too_long) == (1, 1, 1)
    assert score.letters == {"A": 2, "B": 1, "C": 2, "D": 0}
    assert (score.constant_letter, score.constant_letter_baseline, score.chance) == ("B", 0.375, 0.25)


def test_what_did_not_fit_is_described_with_its_room() -> None:
    assert "45 of 1,050 questions" in describe_too_long(ExamScore(too_long=45, presentations=1050, max_seq_len=256))
    assert describe_too_long(ExamScore(too_long=0, presentations=8)) == describe_too_long(ExamScore()) == ""


def test_groups_are_scored_apart() -> None:
    items = [
        ExamItem(id=f"g{k}", question="?", options=("w", "x"), answer_index=0, group=group)
        for k, group in enumerate(["test"] * 4 + ["cause"] * 2)
    ]
    score = answered(items, "AABBAA")
    counts = {name: (group["n"], group["correct"]) for name, group in score.groups.items()}
    assert counts == {"cause": (2, 2), "test": (4, 2)}
    assert score.groups["test"]["interval"] == pytest.approx(wilson(2, 4))


def test_chance_and_constant_letter_of_mixed_and_free_items() -> None:
    three = ExamItem(id="y", question="?", options=("yes", "no", "maybe"), answer_index=0)
    free = ExamItem(id="n", question="?", options=(), answer_index=-1, answer="72")
    score = summarise([Result(three, ANSWERED, True, 0), Result(free, ANSWERED, True)])
    assert score.chance == pytest.approx(1 / 6) and score.constant_letter_baseline == 0.5 and score.correct == 2
    numbers = summarise([Result(free, ANSWERED, False)])
    assert (numbers.chance, numbers.constant_letter, numbers.letters) == (0.0, "", {})


def test_orders_samples_and_votes_are_measured_apart() -> None:
    item = exam("A")[0]
    turned = ExamItem(item.id, "?", item.options[::-1], 3)
    measures = summarise([Result(item, ANSWERED, True, 0), Result(turned, ANSWERED, False, 0)]).measures
    assert measures["right in all orders"]["value"] == 0 and "majority of 2" not in measures
    sampled = [Result(item, ANSWERED, given == 0, given) for given in (0, 1, 0, 2)]
    measures = summarise([*sampled, *([Result(exam("AB")[1], UNPARSED, False)] * 4)]).measures
    assert {name: found["value"] for name, found in measures.items()} == pytest.approx(
        {"pass@2": 5 / 12, "pass@4": 0.5, "majority of 4": 0.5}
    )
    assert measures["pass@2"]["n"] == 2 and measures["pass@2"]["interval"][0] < 5 / 12 < measures["pass@2"]["interval"][1]


@pytest.mark.parametrize(("samples", "right", "k"), [(6, 2, 1), (6, 2, 3), (6, 5, 2), (6, 0, 6)])
def test_pass_at_k_is_the_share_of_all_choices_of_k_samples(samples: int, right: int, k: int) -> None:
    chosen = list(itertools.combinations([True] * right + [False] * (samples - right), k))
    assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))


@pytest.mark.parametrize(
    ("answers", "expected"), [(["72", "72.0", "5"], 1.0), (["5", "72"], 0.5), (["5", "5", "72"], 0.0), (["?", "?", "72"], 1.0)]
)
def test_a_majority_counts_numbers_by_their_value_and_shares_ties(answers: list[str], expected: float) -> None:
    free = ExamItem("n", "?", (), -1, answer="72")
    status = {"?": UNPARSED}
    given = [Result(free, status.get(text, ANSWERED), text.startswith("72"), text=text) for text in answers]
    assert majority(given) == expected
    city = ExamItem("t", "?", (), -1, answer="The Hague", aliases=("The Hague", "Den Haag"))
    assert majority([Result(city, ANSWERED, text != "Paris", text=text) for text in ("the Hague", "Paris", "Hague.")]) == 1


def test_calibration_and_accuracy_at_coverage() -> None:
    items, confidences = exam("AAAAAAAA"), [0.95, 0.95, 0.9, 0.9, 0.35, 0.35, 0.31, None]
    right = [True, True, True, False, True, False, False, False]
    results = [
        Result(item, ANSWERED if sure else TOO_LONG, hit, 0, confidence=sure)
        for item, sure, hit in zip(items, confidences, right, strict=True)
    ]
    measures = summarise(results).measures
    top, low = measures["right when 90–100% sure"], measures["right when 30–40% sure"]
    assert (top["n"], top["value"], top["confidence"]) == (4, 0.75, pytest.approx(0.925))
    assert (low["n"], low["value"]) == (3, pytest.approx(1 / 3))
    error = measures["expected calibration error"]
    assert error["value"] == pytest.approx((4 * 0.175 + abs(1 - 1.01)) / 7) and error["n"] == 7
    found = {name[12:]: (each["n"], each["value"]) for name, each in measures.items() if "coverage" in name}
    assert found == {"25% coverage": (2, 1.0), "50% coverage": (4, 0.75), "75% coverage": (6, pytest.approx(2 / 3))}
    assert summarise([Result(items[0], ANSWERED, True, 0)]).measures == {}


@pytest.mark.parametrize(("gained", "lost", "p"), [(0, 0, 1.0), (5, 5, 1.0), (0, 6, 0.03125), (12, 4, 0.076813)])
def test_mcnemar_is_the_exact_binomial_test(gained: int, lost: int, p: float) -> None:
    assert mcnemar(gained, lost) == mcnemar(lost, gained) == pytest.approx(p, abs=1e-6)


def test_scores_come_back_from_their_file(tmp_path: Path) -> None:
    score, path = answered(exam("AB", groups="gh"), "AA"), tmp_path / "exams.json"
    add_exams(path, "sft", {"test": score})
    add_exams(path, "sft, step 8", {"test": score}, last="sft")
    add_exams(path, "sft", {"other": score}, last="sft")
    found = read_exams(path)
    assert [(one.label, one.split) for one in found] == [("sft, step 8", "test"), ("sft", "test"), ("sft", "other")]
    for name in ExamScore.__dataclass_fields__.keys() - {"label", "split", "groups"}:
        assert getattr(found[0], name) == getattr(score, name)
    assert found[0].groups["g"]["interval"] == list(score.groups["g"]["interval"])
    assert "results" not in path.read_text()


def test_a_gain_is_paired_on_the_same_items() -> None:
    items = exam("ABCD" * 10, groups="pqrs" * 10)
    before, after = answered(items, "A" * 40), answered(items[::-1], "DCBA" * 9 + "AAAA")
    gain = compare(before, after)
    assert (gain.mean, gain.n) == (0.675, 40)
    assert 0 < gain.interval[0] < 0.675 < gain.interval[1] < 1
    facts = ["drug/" + letter for letter in "pqrs" * 10]
    by_fact = (answered(exam("ABCD" * 10, clusters=facts), given) for given in ("A" * 40, "ABCD" * 9 + "AAAA"))
    assert compare(*by_fact).interval[0] < gain.interval[0]
    with pytest.raises(UserError, match="different items"):
        compare(before, answered(items[:39], "A" * 39))
    with pytest.raises(UserError, match="empty"):
        summarise([])


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson_gives_the_published_values(correct: int, n: int, low: float, high: float) -> None:
    assert wilson(correct, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_ends_contain_the_score_and_refuse_nonsense() -> None:
    assert wilson(0, 7)[0] == 0.0 and wilson(7, 7)[1] == 1.0
    for correct, n in [(1, 0), (3, 2), (-1, 2)]:
        with pytest.raises(ValueError):
            wilson(correct, n)


def test_copies_of_an_item_are_worth_one_item() -> None:
    values = [1.0] * 37 + [0.0] * 63
    assert mean_interval(values) == mean_interval(values, list(range(100))) == pytest.approx(wilson(37, 100))
    copied = [value for value in values for _ in range(4)]
    items = [index for index in range(100) for _ in range(4)]
    assert mean_interval(copied, items) == pytest.approx(wilson(37, 100), abs=0.001)
    assert mean_interval([1.0] * 40, [i // 4 for i in range(40)]) == wilson(10, 10)
    with pytest.raises(ValueError):
        mean_interval([])


def coverage(truth: float, rounds: int, draw: Callable[[], Sequence[tuple[float, float]]]) -> list[float]:
    """How often each of the intervals that ``draw`` returns holds the truth."""
    drawn = [draw() for _ in range(rounds)]
    return [sum(low <= truth <= high for low, high in column) / rounds for column in zip(*drawn, strict=True)]


def test_clustered_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = random.Random(5)

    def draw() -> Sequence[tuple[float, float]]:
        values, clusters = [], []
        for cluster in range(60):
            ability = rng.betavariate(1.2, 0.8)  # mean 0.6, strongly shared inside a cluster
            for _ in range(5):
                values.append(float(rng.random() < ability))
                clusters.append(cluster)
        return mean_interval(values, clusters), mean_interval(values)

    aware, plain = coverage(0.6, 400, draw)
    assert 0.92 <= aware <= 0.985 and plain < 0.88  # ignoring the clusters would be wrong


def test_paired_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = random.Random(6)

    def draw() -> Sequence[tuple[float, float]]:
        draws = [rng.random() for _ in range(120)]  # both right 0.5, gained 0.2, lost 0.1, both wrong 0.2: true gain 0.1
        before = [float(draw < 0.5 or 0.7 <= draw < 0.8) for draw in draws]
        return (paired_difference(before, [float(draw < 0.7) for draw in draws]).interval,)

    assert 0.93 <= coverage(0.1, 600, draw)[0] <= 0.975


def test_paired_clustered_interval_covers_the_truth() -> None:
    rng = random.Random(7)
    before, clusters = [0.0] * 300, [number // 6 for number in range(300)]

    def draw() -> Sequence[tuple[float, float]]:
        learned = [rng.random() < 0.3 for _ in range(50)]  # a fact is learned as a whole: 30 % of the facts go from 0 to 1
        after = [float(learned[cluster]) for cluster in clusters]
        return paired_difference(before, after, clusters).interval, paired_difference(before, after).interval

    aware, plain = coverage(0.3, 400, draw)
    assert 0.90 <= aware <= 0.985 and plain < 0.75


def test_paired_difference_counts_what_changed() -> None:
    result = paired_difference([1, 1, 0, 0, 0], [1, 0, 1, 1, 0])
    assert (result.mean, result.n) == (0.2, 5)
    assert result.interval[0] < 0 < 0.2 < result.interval[1]
    same = paired_difference([1.0] * 50, [1.0] * 50)
    assert same.mean == 0 and same.interval[0] < 0 < same.interval[1]  # no disagreement is not certainty
    with pytest.raises(ValueError, match="longer than"):
        paired_difference([1.0], [1.0, 0.0])


def bootstrap(values: list[float], clusters: list[int], resamples: int = 2000) -> tuple[float, float]:
    """The slower route to the same interval: draw whole clusters with replacement and take percentiles of the mean."""
    rng = random.Random(0)
    groups = [[value for value, mine in zip(values, clusters, strict=True) if mine == one] for one in dict.fromkeys(clusters)]
    means = []
    for _ in range(resamples):
        drawn = [value for group in rng.choices(groups, k=len(groups)) for value in group]
        means.append(sum(drawn) / len(drawn))
    means.sort()
    return means[resamples // 40], means[resamples - 1 - resamples // 40]


def test_bootstrap_agrees_with_the_formula() -> None:
    rng = random.Random(8)
    values = [float(rng.random() < 0.4) for _ in range(400)]
    clusters = [index // 4 for index in range(400)]
    assert bootstrap(values, list(range(400))) == pytest.approx(mean_interval(values), abs=0.012)
    assert bootstrap(values, clusters) == pytest.approx(mean_interval(values, clusters), abs=0.012)
    changes = [float(rng.random() < 0.3) - float(rng.random() < 0.15) for _ in range(400)]
    formula = paired_difference([0.0] * 400, changes, clusters).interval
    assert bootstrap(changes, clusters) == pytest.approx(formula, abs=0.015)
