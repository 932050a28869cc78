"""Sick curves are told in time, healthy ones never; what was said is not said again; a replay gives the same."""

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import pytest

from osler.monitor.alerts import PAUSE, Alert, Alerter, replay
from osler.monitor.history import STEP_TIMES, RunSettings

SETTINGS = RunSettings(lr=2.5e-3, clip_norm=1.0, warmup_tokens=40_000, vocab_size=2048, loader_workers=1, max_new_tokens=48)
TOKENS, STEPS = 4096, 10  # of a step; in a line
GIB = 2**30
LOSS, HELD_OUT, LR, GRAD_NORM, CLIPPED = "train/loss", "eval/loss", "train/lr", "train/grad_norm", "grad/clipped_frac"
UNLEARNED, STAGE, SPEED, OTHER_CPUS = "train/unlearned_steps", "train/stage", "perf/tokens_per_second", "perf/other_cpus"
DATA_TIME, RESIDENT, ALLOCATED = "perf/data_ms", "perf/memory_resident_bytes", "perf/memory_allocated_bytes"
DEAD_UNITS, LAYER_NORM = "model/dead_units_frac/", "grad/norm/"
CUT, ALL_EQUAL, GAP = "completions/clipped_ratio", "frac_reward_zero_std", "sampling/sampling_logp_difference/mean"
Line = dict[str, float]


def healthy(lines: int, *, noise: float = 0.02, floor: float = 1.0, decay: float = 1.0, seed: int = 0) -> Iterator[Line]:
    """A pretraining run: a power law over a floor, noise by line, a norm that settles, memory that is full after a while."""
    draw = random.Random(seed)
    for n in range(1, lines + 1):
        warmup = min(1.0, n / 4)
        yield {
            LOSS: (floor + (7.6 - floor) * n**-0.45) * (1 + noise * draw.gauss(0, 1)),
            LR: SETTINGS.lr * warmup * (1 - decay * n / lines),
            GRAD_NORM: (0.35 + 0.6 / n) * math.exp(0.25 * draw.gauss(0, 1)),
            CLIPPED: 0.3 if n < 10 else 0.05,
            **dict.fromkeys(STEP_TIMES, 30.0),
            DATA_TIME: 2.0,
            SPEED: 20_000 * math.exp(0.1 * draw.gauss(0, 1)),
            OTHER_CPUS: 0.1 * draw.random(),
            RESIDENT: 2 * GIB * (1 - 0.3 * math.exp(-n / 4)) + draw.gauss(0, 1e6),
            f"{DEAD_UNITS}0": 0.1 * draw.random(),
            f"{LAYER_NORM}0": 0.1,
        }


def alerts_of(alerter: Alerter, lines: Iterable[Line], first: int = 1) -> list[Alert]:
    """What is told of these lines, of which the first has this number."""
    found = []
    for number, line in enumerate(lines, start=first):
        for alert in alerter.observe(number * STEPS, number * STEPS * TOKENS, line):
            assert "\n" not in alert.message and alert.step == number * STEPS
            found.append(alert)
    return found


def told(lines: Iterable[Line], settings: RunSettings = SETTINGS) -> dict[str, int]:
    """Names of the alerts of a curve, each with the line at which it was said first."""
    return {alert.name: alert.step // STEPS for alert in reversed(alerts_of(Alerter(settings), lines))}


def sick_lines(change: Callable[[int, Line], Line], lines: int = 200) -> list[Line]:
    """A healthy curve to which ``change(lines since line 60, line)`` is done from line 61 on."""
    return [line if n < 60 else line | change(n - 59, line) for n, line in enumerate(healthy(lines))]


CURVE = list(healthy(40))
LOOKS = [{name: value for name, value in line.items() if not name.startswith(DEAD_UNITS)} for line in CURVE]  # without a probe
CLIPPING = [line | {CLIPPED: 1.0} for line in CURVE]
DEAD = CURVE[-1] | {f"{DEAD_UNITS}0": 0.9}
RIGHT = {"reward": 1.0, "reward_std": 0.0, "answer/correct_frac": 1.0, ALL_EQUAL: 1.0}


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([*LOOKS, DEAD, *LOOKS[-3:], {HELD_OUT: 1.0}], ["critical dead-layers"]),  # what the newest probe saw
        ([*LOOKS, DEAD, *LOOKS[-3:], CURVE[-1], {HELD_OUT: 1.0}], []),
        ([*CURVE, *CLIPPING], ["warning always-clipped"]),
        ([*CURVE, *CLIPPING, DEAD | {CLIPPED: 1.0}], ["critical dead-layers", "warning always-clipped"]),
        ([*CLIPPING, *CURVE], []),
        ([{LOSS: math.log(2048) - 0.01}], []),
        ([{LOSS: math.log(2048) + 0.01}, {HELD_OUT: 1.0}], ["critical worse-than-guessing"]),
        ([{LOSS: 3.0}, {LOSS: math.nan}], ["critical no-finite-loss"]),
        ([{UNLEARNED: 10.0}], ["critical nothing-to-learn"]),
        ([{UNLEARNED: 3.0, LOSS: 3.0}], ["warning nothing-to-learn"]),
        ([{UNLEARNED: 3.0, LOSS: math.nan}], ["critical no-finite-loss", "warning nothing-to-learn"]),
        ([{UNLEARNED: 3.0, LOSS: 3.0}, {UNLEARNED: 0.0, LOSS: 3.0}], []),
        ([RIGHT] * 3, ["warning equal-rewards"]),
        ([RIGHT, RIGHT | {ALL_EQUAL: 0.5}, RIGHT], []),
    ],
)
def test_what_holds_at_the_end_is_told_however_short_the_run(lines, expected):
    alerter = Alerter(SETTINGS)
    alerts_of(alerter, lines)
    assert [f"{alert.severity} {alert.name}" for alert in alerter.unresolved()] == expected


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "shape",  # a quickstart, noisy fine-tuning, a very long run, a constant learning rate
    [(40, {}), (150, {"noise": 0.09, "floor": 0.15}), (1000, {"noise": 0.01, "floor": 2.8}), (500, {"decay": 0.0})],
)
def test_healthy_runs_are_left_alone(shape, seed):
    assert told(healthy(shape[0], **shape[1], seed=seed)) == {}


@pytest.mark.parametrize(
    ("change", "name", "within"),
    [
        (lambda n, line: {GRAD_NORM: 8.0}, "exploding-gradient", 3),
        (lambda n, line: {GRAD_NORM: 500.0} if n == 1 else {}, "exploding-gradient", 1),
        (lambda n, line: {GRAD_NORM: line[GRAD_NORM] * 1.08**n}, "exploding-gradient", 40),
        (lambda n, line: {GRAD_NORM: line[GRAD_NORM] * 1e-3}, "vanishing-gradient", 3),
        (lambda n, line: {GRAD_NORM: line[GRAD_NORM] * 0.5**n}, "vanishing-gradient", 12),
        (lambda n, line: {LOSS: line[LOSS] * 1.02**n}, "learning-rate", 20),
        (lambda n, line: {LOSS: line[LOSS] + 3.0}, "learning-rate", 4),
        (lambda n, line: {LOSS: line[LOSS] + 0.5 * (-1) ** n}, "swinging-loss", 15),
        (lambda n, line: {CLIPPED: 1.0}, "always-clipped", 30),
        (lambda n, line: {f"{DEAD_UNITS}0": 0.7}, "dead-layers", 1),
        (lambda n, line: {f"{LAYER_NORM}0": 0.0}, "dead-layer-gradient", 1),
        (lambda n, line: {RESIDENT: line[RESIDENT] + n * 10 * 2**20}, "memory-growth", 40),
        (lambda n, line: {ALLOCATED: 4 * GIB + n * 2**20 * 5}, "memory-growth", 130),
        (lambda n, line: {DATA_TIME: 60.0}, "starved-loader", 5),
        (lambda n, line: {SPEED: 1_700.0, OTHER_CPUS: 1.0}, "slow-run", 3),
        (lambda n, line: {SPEED: 9_000.0}, "slow-run", 14),
        (lambda n, line: {CUT: 0.95}, "cut-completions", 1),
        (lambda n, line: {"reward": 0.0}, "no-reward", 5),
        (lambda n, line: {HELD_OUT: 3.0 if n < 3 else 3.1}, "memorising", 4),
        (lambda n, line: {ALL_EQUAL: 0.85}, "equal-rewards", 20),
        (lambda n, line: {"entropy": 0.3 if n < 3 else 0.01}, "no-exploration", 20),
        (lambda n, line: {GAP: 0.03}, "sampler-apart", 20),
        (lambda n, line: {f"answer/letter_{x}_frac": 0.8 if x == "A" else 0.1 for x in "ABC"}, "one-letter", 20),
    ],
)  # fmt: skip
def test_a_sick_curve_is_told_within_so_many_lines(change, name, within):
    found = told(sick_lines(change))
    assert found.keys() <= {name, "stalled-loss"} and 60 < found[name] <= 60 + within, found


@pytest.mark.parametrize(
    "change",
    [
        lambda n, line: {LOSS: 0.01, GRAD_NORM: 1e-4, LR: 1e-3},  # memorised
        lambda n, line: {LOSS: math.nan, GRAD_NORM: math.inf, LR: -math.inf},  # no numbers are no values
        lambda n, line: {SPEED: 1_700.0} if n in (1, 2, 20, 21) else {},  # less than a slow minute
        lambda n, line: {DATA_TIME: 10.0, **dict.fromkeys(STEP_TIMES[1:], 5.0)},  # half a second of waiting in five lines
        lambda n, line: {STAGE: 2.0, SPEED: 1_700.0, LOSS: line[LOSS] + 2.0, GRAD_NORM: line[GRAD_NORM] * 6},
        lambda n, line: {RESIDENT: line[RESIDENT] + GIB},  # a jump
    ],
)
def test_what_passes_or_is_meant_is_no_alert(change):
    assert told({STAGE: 1.0} | line for line in sick_lines(change, 120)) == {}


@pytest.mark.parametrize(("busy_cpus", "cause"), [(1.0, "keep 1.0 CPUs of this machine busy"), (0.0, "No other process")])
def test_a_slow_run_says_whether_a_neighbour_is_the_cause_unless_it_goes_on_elsewhere(busy_cpus, cause):
    lines, moved = sick_lines(lambda n, line: {SPEED: 1_700.0, OTHER_CPUS: busy_cpus}, 70), Alerter(SETTINGS)
    (alert,) = alerts_of(Alerter(SETTINGS), lines)
    assert alert.name == "slow-run" and cause in alert.message
    assert alerts_of(moved, lines[:60]) == []
    moved.history.forget_speed()
    assert alerts_of(moved, lines[60:], first=61) == []


def test_questions_that_are_asked_often_are_no_worn_data():
    lines = [line | {"data/epoch": 20.0} for line in healthy(20)]
    assert "repeated-data" in told(lines, replace(SETTINGS, max_new_tokens=0))
    assert "repeated-data" not in told(lines), "with max_new_tokens it is GRPO"


def test_a_run_that_learns_nothing_is_told_when_the_warmup_is_over_and_one_worse_than_guessing_at_once():
    lines = [line | {LOSS: 7.62 + 0.01 * (n % 3)} for n, line in enumerate(healthy(30))]
    assert told(lines) == {"learning-rate": 5}
    assert told(lines, RunSettings(lr=1e-3, clip_norm=1.0)) == {}, "without a vocabulary there is nothing to compare with"
    assert told(line | {LOSS: 9.9} for line in healthy(30))["learning-rate"] == 3
    assert told(line | {LOSS: max(line[LOSS], 8.2)} for line in healthy(4)) == {}, "as a tied head starts with: variance 1"


@pytest.mark.parametrize(
    ("lr", "is_frozen", "expected"),
    [(SETTINGS.lr, False, {"stalled-loss"}), (SETTINGS.lr / 20, False, set()), (SETTINGS.lr, True, set())],
)
def test_a_plateau_is_told_before_the_run_has_doubled_and_never_when_it_must_be(lr, is_frozen, expected):
    flat = {n: {LOSS: 1.8 + 0.01 * ((7 * n) % 5 - 2), LR: lr} for n in range(100, 240)}
    lines = (line | flat.get(n, {}) for n, line in enumerate(healthy(240)))
    found = told(lines, replace(SETTINGS, is_frozen=is_frozen))
    assert found.keys() == expected and all(line < 200 for line in found.values())


def test_a_policy_that_rarely_has_a_gradient_or_a_few_rewards_among_penalties_is_left_alone():
    rare = [{GRAD_NORM: 1.3 if n % 9 == 0 else 0.0, "reward": 0.01, CUT: 0.1} for n in range(120)]
    # by the KL term alone
    pulled = [line | ({ALL_EQUAL: 0.0} if line[GRAD_NORM] else {GRAD_NORM: 2e-5, ALL_EQUAL: 1.0}) for line in rare]
    penalised = [{"reward": -0.2, "reward_std": 0.3, "answer/correct_frac": 0.1} for _ in range(40)]
    assert told(rare) == told(penalised) == {} and told(pulled).keys() == {"equal-rewards"}
    often = [pulled[n % 2] for n in range(60)] + [{GRAD_NORM: 80.0, "reward": 0.01, "reward_std": 0.1}]
    assert told(often) == {"exploding-gradient": 61}


@pytest.mark.parametrize("began_well", [True, False])
def test_a_policy_that_got_worse_was_trained_too_fast_and_one_that_began_so_was_not(began_well):
    fine, bad = ({CUT: share, "reward": reward, "reward_std": reward} for share, reward in ((0.02, 0.3), (1.0, 0.0)))
    said = {alert.name: alert.message for alert in alerts_of(Alerter(SETTINGS), [fine if began_well else bad] * 2 + [bad] * 9)}
    assert said.keys() == {"cut-completions", "no-reward"}
    assert all(("learning rate" in text and SETTINGS.slower in text) == began_well for text in said.values())
    assert ("chat template" in said["cut-completions"]) == ("samples.jsonl" in said["no-reward"]) == (not began_well)
    assert not began_well or ("2%" in said["cut-completions"] and "0.3" in said["no-reward"])


def test_a_head_that_begins_at_zero_lets_no_gradient_through_in_the_first_step():
    line = {GRAD_NORM: 0.3, f"{LAYER_NORM}embed": 0.0, f"{LAYER_NORM}0": 0.0, f"{LAYER_NORM}head": 0.3}
    alerter, values = Alerter(SETTINGS), {GRAD_NORM: 0.3, f"{LAYER_NORM}values": 0.0}
    assert alerter.observe(1, TOKENS, line) == Alerter(SETTINGS).observe(2, TOKENS, values) == []
    assert [alert.name for alert in Alerter(SETTINGS).observe(3, TOKENS, values)] == ["dead-layer-gradient"]
    assert [alert.name for alert in alerter.observe(2, 2 * TOKENS, line)] == ["dead-layer-gradient"]


def test_a_message_names_number_cause_and_remedy_and_is_said_again_after_a_pause_that_doubles():
    alerter = Alerter(SETTINGS)
    (alert,) = Alerter(SETTINGS).observe(10, 1000, {f"{DEAD_UNITS}3": 0.634})
    assert alert.severity == "critical" and "63% of the feed-forward units in layer 3" in alert.message
    assert "optim.lr=0.00083 (now 0.0025)" in alert.message
    assert [n for n in range(1, 401) if alerter.observe(n, n, {f"{DEAD_UNITS}0": 0.6})] == [1, 1 + PAUSE, 1 + 3 * PAUSE]


def test_a_replay_of_the_file_goes_on_as_if_nothing_had_happened(tmp_path):
    lines = list(healthy(200))
    for n, line in enumerate(lines):
        line.update({GRAD_NORM: 9.0} if n > 80 else {}, **({LOSS: 2.5} if n > 50 else {}))
    lines[90][LOSS] = math.nan
    whole, path = Alerter(SETTINGS), tmp_path / "metrics.jsonl"
    alerts_of(whole, lines[:120], first=0)
    written = [{"step": n * STEPS, "tokens": n * TOKENS * STEPS, "time": 1.0, **line} for n, line in enumerate(lines[:120])]
    path.write_text("".join(json.dumps(line).replace("NaN", "null") + "\n" for line in written), encoding="utf-8")
    resumed = replay(SETTINGS, path)
    expected = alerts_of(whole, lines[120:], first=120)
    assert expected and alerts_of(resumed, lines[120:], first=120) == expected
