"""The sentences of a report: headline, verdict on a score, what happened, what deserves attention.

The page and the summary for the terminal share them. A claim is made only if an interval supports it. The rules of
``osler/monitor`` judged each stage while it trained, and their findings are in its events. This module adds what the exams
show, pauses, and files that could not be read.
"""

import math
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from osler.eval.score import describe_cut, describe_too_long
from osler.model.config import ModelConfig
from osler.records.jsonl import END, FAILED, FINISHED, START, Event, newest_lifetime_event
from osler.records.results import Comparison, ExamScore
from osler.report.curves import time_at_work
from osler.report.read import NAN, RunRecord, read_run
from osler.runtime import format as fmt
from osler.runtime.files import RunFolder

STAGES = {  # title and palette number
    "": ("Training", 0), "pretrain": ("Pretraining", 0), "midtrain": ("Mid-training", 3), "sft": ("Supervised fine-tuning", 1),
    "grpo": ("GRPO", 2), "rl": ("Reinforcement learning", 2), "data": ("Data preparation", 4), "tokenizer": ("Tokenizer", 6),
    "untrained": ("Untrained", 5),
}  # fmt: skip
HEADLINE_CURVES = {  # without an exam, the first of these that was measured is the headline
    "eval/bits_per_byte": "Held-out bits per byte", "eval/loss": "Held-out loss", "train/loss": "Loss", "reward": "Reward",
}  # fmt: skip
GRAVE = ("incident", "rollback", "alert")  # kinds of events that deserve attention, the gravest first; others are only listed
STEPS_NAMED = 6  # a group of events names at most this many steps; of more, it names the first two and the last two
UNPARSED_SHARE = 0.05  # a larger share of unreadable answers deserves attention
HABIT_SHARE, HABIT_ANSWERS = 0.6, 40  # one letter is a habit above this share, in at least this many answers


def stage_title(name: str) -> str:
    """Write a stage's or checkpoint's name as a reader would: `sft, earlier` -> `Supervised fine-tuning, earlier`."""
    stage, comma, more = name.partition(",")
    usual, _ = STAGES.get(stage.lower(), ("", 0))
    return (usual or (stage[:1].upper() + stage[1:]).replace("_", " ")) + comma + more


def stage_colour(name: str, position: int = 0) -> int:
    """Return the palette number that a stage keeps all over the page."""
    words = re.findall("[a-z]+", name.lower()) or [name]
    known = [colour for key, (_, colour) in STAGES.items() if key in words]
    return known[-1] if known else (3, 6, 4, 7)[position % 4]


def headline_score(run: RunRecord) -> ExamScore | None:
    """Return the score that the page leads with: the last checkpoint's, on the split called test or else on the first.

    Both checkpoints of a comparison that is a branch are left out: they do not show where the run ended.
    """
    aside = {label for c in run.comparisons if c.branch for label in (c.before_label, c.after_label)}
    scores = [score for score in run.exams if score.label not in aside]
    last = [score for score in scores if score.label == scores[-1].label]
    return next((score for score in last if "test" in score.split.lower()), last[0] if last else None)


def seconds_of(run: RunRecord, stage: str = "") -> float:
    """Return the seconds of stages whose name contains ``stage``: by ``stages.json``, else by their logs; NaN if not known."""
    recorded = [one.seconds for one in run.stages if stage in one.name.lower() and one.seconds >= 0]
    logged = [log.seconds for log in run.runs if stage in log.name.lower() and log.seconds >= 0]
    return sum(recorded or logged or [NAN])


def total_tokens(run: RunRecord) -> float:
    """Return the tokens of all stages that logged them."""
    return sum(stage.tokens for stage in run.runs if math.isfinite(stage.tokens)) or NAN


def model_of(run: RunRecord) -> ModelConfig | None:
    """Return the model of the run, or of the first of its stages that has one."""
    return next((stage.model for stage in (run.own, *run.runs) if stage.model), None)


def headline(run: RunRecord) -> tuple[str, str, str]:
    """Return the page's first sentence in three parts, of which the page sets the middle one apart; parts may be empty."""
    score, seconds = headline_score(run), seconds_of(run)
    took = f", in {fmt.duration(seconds)}" if math.isfinite(seconds) else ""
    if score is not None:
        start = "From random weights to " if any("pretrain" in stage.name for stage in run.runs) else "Right on "
        return start, fmt.percent(score.accuracy), f" on {score.split}{took}"
    for stage in reversed(run.runs):
        for name, title in HEADLINE_CURVES.items():
            known = stage.finite(name).values
            if len(known):
                since = f"from {fmt.number(known[0])} to" if len(known) > 1 else "of"
                return f"{title} {since} ", fmt.number(known[-1]), took
    return "Nothing measured yet", "", ""


# Scores and differences.


def score_in_words(score: ExamScore) -> str:
    """Say how many answers were right, the interval, and how it compares to the two baselines."""
    each = f" ({fmt.count(score.n)} different ones, each asked several times)" if score.presentations > score.n else ""
    out = f"It answered {fmt.count(score.correct)} of {fmt.plural(score.presentations, 'question')}{each} right."
    if math.isfinite(score.low) and math.isfinite(score.high):
        out += f" With so many questions, its true score most likely lies between {interval(score, ' and ')} (95% interval)."
    return f"{out} {verdict(score)}".strip()


def interval(score: ExamScore, to: str = " to ") -> str:
    """Return a score's interval in percent."""
    known = math.isfinite(score.low) and math.isfinite(score.high)
    return f"{fmt.percent(score.low)}{to}{fmt.percent(score.high)}" if known else "no interval"


def baseline(score: ExamScore) -> float:
    """Return the better of guessing and of always giving one letter, NaN when neither is known."""
    return max((b for b in (score.chance, score.constant_letter_baseline) if math.isfinite(b)), default=NAN)


def verdict(score: ExamScore) -> str:
    """Say whether the interval clears guessing and the best constant letter, and why questions have no answer."""
    ways = (("guessing", score.chance), ("always giving the same letter", score.constant_letter_baseline))
    known = [f"{what} ({fmt.percent(rate)})" for what, rate in ways if math.isfinite(rate)]
    said = ""
    missing = no_answer(score)
    if score.too_long == score.presentations:  # no question was asked
        return missing
    if score.low > baseline(score):
        said = f"That is clearly above {' and above '.join(known)}."
    elif score.high < baseline(score):
        said = f"That is below {' or '.join(known)}{'' if missing else ': something is systematically wrong'}."
    elif known and math.isfinite(score.low):
        said = f"That cannot be told apart from {' or '.join(known)}."
    return f"{said} {missing}".strip()


def no_answer(score: ExamScore) -> str:
    """Say how many questions did not fit, and how many answers were cut; empty when these are none or few."""
    return " ".join(filter(None, (describe_too_long(score), describe_cut(score))))


def letter_shares(score: ExamScore) -> dict[str, float]:
    """Return the share of the answers that each letter has; empty without an answer."""
    counts = {letter: n if n > 0 else 0.0 for letter, n in score.letters.items()}
    total = sum(counts.values())
    return {letter: n / total for letter, n in counts.items()} if total else {}


def difference_in_words(c: Comparison) -> str:
    """Return the verdict that a paired difference allows."""
    if not (math.isfinite(c.low) and math.isfinite(c.high)):
        return "No interval was computed, so this difference proves nothing."
    if c.low > 0:
        return "A real gain: the interval lies wholly above zero."
    if c.high < 0:
        return "A real loss: the interval lies wholly below zero."
    return "No measurable change: the interval includes zero."


# What happened.


class EventGroup(NamedTuple):
    """Events of one kind and name, in words; time and message are those of the newest event."""

    weight: str  # how much it matters, as a css class: a kind in `GRAVE`, other, or edge for a usual start or end
    title: str
    when: str  # `step 120`, or `3 times, at steps 120, 130 and 840`
    clock: str
    message: str
    steps: list[int]  # each once

    @property
    def in_words(self) -> str:
        return f"{self.title}, {self.when}: {self.message}"


def group_events(events: Sequence[Event]) -> list[EventGroup]:
    """Group events, which come oldest first; the newest group comes first."""
    found: dict[tuple[str, str], list[Event]] = {}
    for event in reversed(events):
        found.setdefault((event.kind, event.name), []).append(event)
    return [_group(*key, alike) for key, alike in found.items()]


def _group(kind: str, name: str, alike: Sequence[Event]) -> EventGroup:
    """Return events of one kind and name, the newest first, as a group; a failure weighs as much as an incident."""
    special = {(END, FAILED): "incident", (END, FINISHED): "edge", (START, "begun"): "edge"}
    weight = special.get((kind, name), kind if kind in GRAVE else "other")
    what, more = (re.sub("[_-]", " ", text) for text in (kind, name))
    title = what[:1].upper() + what[1:] + (f": {more}" if more and more.lower() != what.lower() else "")
    steps = sorted({event.step for event in alike})
    named = [f"{step:,}" for step in steps]
    when = f"step {named[0]}"
    if len(steps) > 1:
        named = [*named[:2], "…", *named[-2:]] if len(named) > STEPS_NAMED else named
        when = f"{fmt.count(len(steps))} times, at steps {', '.join(named[:-1])} and {named[-1]}"
    newest = alike[0]
    time = datetime.fromtimestamp(newest.time).astimezone() if math.isfinite(newest.time) else None
    return EventGroup(weight, title, when, f"{time:%Y-%m-%d %H:%M}" if time else "", newest.message, steps)


def marks_of(groups: Sequence[EventGroup]) -> list[tuple[float, str, str]]:
    """Return each step of each group as a mark (step, css class, words) for a chart, which shows start and end by itself."""
    inside = [group for group in groups if group.weight != "edge"]
    return [(step, group.weight, f"{group.title} at step {step:,}") for group in inside for step in group.steps]


def attention(run: RunRecord) -> list[str]:
    """Return everything that deserves attention: exams, each stage's events with the gravest first, and unreadable files."""
    found = list(_about_exams(run))
    for stage in run.runs:
        newest = newest_lifetime_event(stage.events)
        remarks = [newest.message] if newest and newest.details.get("unresolved") else []
        grave = [group for group in group_events(stage.events) if group.weight in GRAVE]
        remarks += [group.in_words for group in sorted(grave, key=lambda group: GRAVE.index(group.weight))]
        if pauses := time_at_work(stage.log.times)[1]:
            remarks.append(
                f"{fmt.plural(len(pauses), 'pause')} in the log, the longest of {fmt.duration(max(pauses))}: the run was stopped "
                "and resumed, or the machine slept. Times on this page leave pauses out."
            )
        found += [f"{stage_title(stage.name)}: {text}" for text in remarks]
    return found + run.problems


def _about_exams(run: RunRecord) -> Iterator[str]:
    score = headline_score(run)
    if score and score.low <= baseline(score) <= score.high:
        yield (
            f"The final score on {score.split} ({fmt.percent(score.accuracy)}) cannot be told apart from the best "
            f"that a model without knowledge would get ({fmt.percent(baseline(score))})."
        )
    for score in (s for s in run.exams if s.label == run.exams[-1].label):
        where = f"{stage_title(score.label)} on {score.split}"
        if score.presentations > 0 and score.unparsed / score.presentations > UNPARSED_SHARE:
            share = fmt.percent(score.unparsed / score.presentations)
            yield f"{where}: {share} of the answers had no readable letter and count as wrong."
        if missing := no_answer(score):
            yield f"{where}: {missing}"
        shares = letter_shares(score)
        letter = max(shares, key=shares.__getitem__, default="")
        if len(shares) > 2 and score.presentations >= HABIT_ANSWERS and shares[letter] > HABIT_SHARE:
            yield f"{where}: {fmt.percent(shares[letter])} of the answers are {letter}. That is a habit, not knowledge."


def summary_text(run_folder: str | Path | RunRecord, page: Path | None = None) -> str:
    """Return a summary for the terminal, without colour or a last newline; raises UserError when it is not a run folder.

    page: where the report was written when it is not in the run folder.
    """
    run = read_run(run_folder)
    score, found = headline_score(run), attention(run)
    page = page or RunFolder(run.path).report
    lines = ["".join(headline(run)), *([score_in_words(score)] if score else [])]
    where = [f"  {stage_title(s.label)} on {s.split}" for s in run.exams]
    scores = [(fmt.percent(s.accuracy), f"({interval(s)}, n = {fmt.count(s.n)})") for s in run.exams]
    lines += fmt.table([(name, *score) for name, score in zip(where, scores, strict=True)]).splitlines()
    for c in run.comparisons:
        gain = f"{fmt.points(c.difference)} points ({fmt.points(c.low)} to {fmt.points(c.high)})"
        lines.append(f"{stage_title(c.after_label)} on {c.split}: {gain}. {difference_in_words(c)}")
    if run.stages:
        stages = ", ".join(f"{stage_title(s.name)} {fmt.duration(s.seconds)}" for s in run.stages)
        lines.append(f"Time: {fmt.duration(seconds_of(run))} ({stages})")
    lines += [f"Watch: {text}" for text in found[:3]]
    lines += [f"Watch: {len(found) - 3} more on the page"] if len(found) > 3 else []
    lines += [f"Report: {page}"] if page.is_file() else []
    return "\n".join(lines)
