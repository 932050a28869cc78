"""What the numbers say, in sentences: the headline, the verdict on a score, what deserves attention, what to do next.

The page and the summary for the terminal share them. A claim is made only where an interval carries it. What is wrong with a
stage was judged as it trained, by the rules of ``osler/monitor``, and stands in its events; what its exams show, pauses and
files that could not be read are added here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from osler.eval.score import describe_too_long, length_explains
from osler.records.jsonl import still_wrong, unresolved_at_end
from osler.records.results import Comparison, ExamScore
from osler.report import format as fmt
from osler.report.events import grave_in_words
from osler.report.read import NAN, RunRecord, StageLog, count_parameters, find_model, read_run
from osler.runtime.files import RunFolder

TITLES = {
    "": "Training",
    "pretrain": "Pretraining",
    "midtrain": "Mid-training",
    "sft": "Supervised fine-tuning",
    "grpo": "GRPO",
    "rl": "Reinforcement learning",
    "data": "Data preparation",
    "tokenizer": "Tokenizer",
    "untrained": "Untrained",
}
HEADLINE_CURVES = (  # without an exam the first that was measured leads; the words before and after its values
    ("eval/bits_per_byte", "", " bits per byte of held-out text"),
    ("eval/loss", "held-out loss", ""),
    ("train/loss", "loss", ""),
    ("reward", "reward", ""),
)
COLOURS = {"": 0, "pretrain": 0, "sft": 1, "grpo": 2, "rl": 2, "midtrain": 3, "untrained": 5, "data": 4, "tokenizer": 6}


def stage_title(name: str) -> str:
    """Write a stage's or checkpoint's name as a reader would: `sft, earlier` -> `Supervised fine-tuning, earlier`."""
    stage, comma, more = name.partition(",")
    return (TITLES.get(stage.lower()) or (stage[:1].upper() + stage[1:]).replace("_", " ")) + comma + more


def in_sentence(title: str) -> str:
    """Write a title inside a sentence: `Pretraining` -> `pretraining`, but `GRPO` stays."""
    return title[:1].lower() + title[1:] if title[1:2].islower() else title


def stage_colour(name: str, position: int = 0) -> int:
    """Return the palette number that a stage keeps all over the page."""
    words = re.findall("[a-z]+", name.lower())
    known = [colour for key, colour in COLOURS.items() if key in words]
    return known[-1] if known else (COLOURS[""] if not name else (3, 6, 4, 7)[position % 4])


def headline_score(run: RunRecord) -> ExamScore | None:
    """Return the score that the page leads with: the last checkpoint's, on the split called test or else on the first.

    Both ends of a branch are left out: it shows what a step can do from an earlier checkpoint, not where the run ended.
    """
    aside = {label for c in run.comparisons if c.branch for label in (c.before_label, c.after_label)}
    scores = [score for score in run.exams if score.label not in aside]
    last = [score for score in scores if score.label == scores[-1].label] if scores else []
    return next((score for score in last if "test" in score.split.lower()), last[0] if last else None)


def scores_on(run: RunRecord, split: str) -> list[ExamScore]:
    """Return the scores of all checkpoints on one split, in order of training."""
    return [score for score in run.exams if score.split == split]


def total_seconds(run: RunRecord) -> float:
    """Return the time of the whole run: the stages' sum, or the span of the logs."""
    known = [s.seconds for s in run.stages if s.seconds >= 0] or [r.seconds for r in run.runs if r.seconds >= 0]
    return sum(known) if known else NAN


def total_tokens(run: RunRecord) -> float:
    """Return the tokens of all stages that logged them."""
    known = [r.tokens for r in run.runs if math.isfinite(r.tokens)]
    return sum(known) if known else NAN


def stage_names(run: RunRecord) -> str:
    """Return the names of all stages as one lower-case text to look for words in."""
    return " ".join([*(s.name for s in run.stages), *(r.name for r in run.runs)]).lower()


def stage_seconds(run: RunRecord, word: str) -> float:
    """Return the time of the stage whose name contains a word, NaN when there is none."""
    timed = [s.seconds for s in run.stages if word in s.name.lower()]
    logged = [r.seconds for r in run.runs if word in r.name.lower()]
    return sum(timed) if timed else sum(logged) if logged else NAN


def model_of(run: RunRecord) -> tuple[dict[str, Any], float]:
    """Return the model's configuration and its number of parameters (NaN when it cannot be counted)."""
    saved = [run.own.saved_model, *(stage.saved_model for stage in run.runs)]
    written = map(find_model, [run.own.config, *(stage.config for stage in run.runs)])
    models = [model for model in (*saved, *written) if model]
    for model in models:
        parameters = count_parameters(model)
        if parameters is not None:
            return model, float(parameters)
    return models[0] if models else {}, NAN


def headline(run: RunRecord) -> tuple[str, str, str]:
    """Return the page's first sentence in three parts, the middle one to be set apart; parts may be empty."""
    score = headline_score(run)
    took = fmt.duration(total_seconds(run))
    scratch = "pretrain" in stage_names(run)
    if score is not None:
        start = "From random weights to " if scratch else "Right on "
        on = f" on {score.split}" + (f", in {took}" if took != fmt.MISSING else "")
        return start, fmt.percent(score.accuracy), on
    for stage in reversed(run.runs):
        for name, before, after in HEADLINE_CURVES:
            known = stage.finite(name).values
            if len(known):
                since = f"from {fmt.number(known[0])} to " if len(known) > 1 else "of " if before else ""
                start = f"{before} {since}".lstrip()
                end = after + (f", in {took}" if took != fmt.MISSING else "")
                return f"{start[:1].upper()}{start[1:]}", fmt.number(known[-1]), end
    return "Nothing measured yet", "", ""


def score_in_words(score: ExamScore) -> str:
    """Say how many answers were right, the interval, and how it compares to the two baselines."""
    each = f" ({fmt.count(score.n)} different ones, shown in several orders)" if score.presentations > score.n else ""
    out = f"It answered {fmt.count(score.correct)} of {fmt.plural(score.presentations, 'question')}{each} right."
    if math.isfinite(score.low) and math.isfinite(score.high):
        out += (
            f" With so many questions, its true score most likely lies between {fmt.percent(score.low)} and "
            f"{fmt.percent(score.high)} (95% interval)."
        )
    return f"{out} {verdict(score)}".strip()


def interval(score: ExamScore) -> str:
    """Return a score's interval in percent."""
    known = math.isfinite(score.low) and math.isfinite(score.high)
    return f"{fmt.percent(score.low)} to {fmt.percent(score.high)}" if known else "no interval"


def baseline(score: ExamScore) -> float:
    """Return the better of guessing and of always giving one letter, NaN when neither is known."""
    return max((b for b in (score.chance, score.constant_letter_baseline) if math.isfinite(b)), default=NAN)


def verdict(score: ExamScore) -> str:
    """Say whether the interval clears guessing and the best constant letter, and how many questions did not fit."""
    if unfit_explains(score):
        return f"That is below {' or '.join(_baselines(score))}: {unfit(score)}"
    return " ".join(filter(None, (_against_baselines(score), unfit(score))))


def unfit(score: ExamScore) -> str:
    """Say how many questions did not fit into the model's context; empty when all did or that is not known."""
    if not (score.too_long > 0 and score.presentations >= score.too_long):
        return ""
    return f"{describe_too_long(score)}."


def unfit_explains(score: ExamScore) -> bool:
    """Return whether a score below the baseline may be due to questions that did not fit."""
    return bool(unfit(score)) and length_explains(score.high, baseline(score), score.too_long, score.presentations)


def _baselines(score: ExamScore) -> list[str]:
    """Return what a model without knowledge would score, as far as it is known."""
    known = []
    if math.isfinite(score.chance):
        known.append(f"guessing ({fmt.percent(score.chance)})")
    if math.isfinite(score.constant_letter_baseline):
        known.append(f"always giving the same letter ({fmt.percent(score.constant_letter_baseline)})")
    return known


def _against_baselines(score: ExamScore) -> str:
    known, bar = _baselines(score), baseline(score)
    if not known or not math.isfinite(score.low):
        return ""
    if score.low > bar:
        return f"That is clearly above {' and above '.join(known)}."
    if score.high < bar:
        return f"That is below {' or '.join(known)}: something is systematically wrong."
    return f"That cannot be told apart from {' or '.join(known)}."


def difference_in_words(c: Comparison) -> str:
    """Say what a paired difference allows one to say."""
    if not (math.isfinite(c.low) and math.isfinite(c.high)):
        return "No interval was computed, so this difference proves nothing."
    if c.low > 0:
        return "A real gain: the interval lies wholly above zero."
    if c.high < 0:
        return "A real loss: the interval lies wholly below zero."
    return "No measurable change: the interval includes zero."


def teachers(run: RunRecord) -> str:
    """Compare supervised demonstrations with GRPO in points and seconds, from this run's own numbers; or empty text."""
    sft, grpo = stage_seconds(run, "sft"), stage_seconds(run, "grpo")
    if not (math.isfinite(sft) and math.isfinite(grpo)):
        return ""
    score = headline_score(run)
    rows = scores_on(run, score.split) if score else []
    sft_gain, grpo_gain = _gain(rows, "sft"), _gain(rows, "grpo")
    paired = [c for c in run.comparisons if "grpo" in c.after_label.lower() and score and c.split == score.split]
    noise = ""
    if paired:
        grpo_gain = paired[0].difference
        noise = " (within noise)" if paired[0].low <= 0 <= paired[0].high else ""
    general = (
        "Where one has demonstrations, they are usually the cheaper teacher; GRPO is for when only the answer can be checked."
    )
    if not (math.isfinite(sft_gain) and math.isfinite(grpo_gain)):
        return f"Supervised fine-tuning took {fmt.duration(sft)}, GRPO {fmt.duration(grpo)}. {general}"
    both = (
        f"Supervised demonstrations brought {fmt.points(sft_gain)} points in {fmt.duration(sft)}; "
        f"GRPO brought {fmt.points(grpo_gain)} points{noise} in {fmt.duration(grpo)}."
    )
    if sft_gain <= 0:
        return f"{both} {general}"
    if grpo_gain <= 0:
        return f"{both} Where one has demonstrations, they are the cheaper teacher: GRPO added nothing measurable here."
    per_sft, per_grpo = sft / (100 * sft_gain), grpo / (100 * grpo_gain)
    rates = f"{fmt.duration(per_sft)} a point against {fmt.duration(per_grpo)} a point"
    if per_sft < per_grpo:
        return (
            f"{both} Where one has demonstrations, they are the cheaper teacher: {rates}. GRPO is for when only the "
            "answer can be checked. (The first points are also the easiest ones.)"
        )
    return f"{both} In this run GRPO was the cheaper of the two: {rates} for the demonstrations first. {general}"


def _gain(rows: list[ExamScore], word: str) -> float:
    """Return the accuracy of the checkpoint whose label holds a word, minus that of the checkpoint before it."""
    at = next((i for i, row in enumerate(rows) if word in row.label.lower()), 0)
    return rows[at].accuracy - rows[at - 1].accuracy if at > 0 else NAN


UNPARSED_SHARE = 0.05  # of the answers
HABIT_SHARE, HABIT_ANSWERS = 0.6, 40  # of the answers that are one letter, and answers in all


def attention(run: RunRecord) -> list[str]:
    """Return everything that deserves attention, the gravest first; empty when nothing stands out."""
    out = list(_about_exams(run))
    for stage in run.runs:
        out += [f"{stage_title(stage.name)}: {text}" for text in (*_about_training(stage), *_about_pauses(stage))]
    return out + run.problems


def _about_exams(run: RunRecord) -> Iterator[str]:
    score = headline_score(run)
    if score and math.isfinite(score.low) and score.low <= baseline(score) <= score.high:
        yield (
            f"The final score on {score.split} ({fmt.percent(score.accuracy)}) cannot be told apart from the best "
            f"that a model without knowledge would get ({fmt.percent(baseline(score))})."
        )
    for score in (s for s in run.exams if s.label == run.exams[-1].label):
        where = f"{stage_title(score.label)} on {score.split}"
        if score.presentations > 0 and score.unparsed / score.presentations > UNPARSED_SHARE:
            yield (
                f"{where}: {fmt.percent(score.unparsed / score.presentations)} of the answers had no readable letter "
                "and count as wrong."
            )
        if unfit(score):
            yield f"{where}: {unfit(score)}"
        total = sum(v for v in score.letters.values() if math.isfinite(v))
        if total >= HABIT_ANSWERS and len(score.letters) > 2:
            letter, n = max(score.letters.items(), key=lambda item: item[1])
            if n / total > HABIT_SHARE:
                yield f"{where}: {fmt.percent(n / total)} of the answers are {letter}. That is a habit, not knowledge."


def _about_training(stage: StageLog) -> list[str]:
    """Return what the events say, first what was still wrong when the run was complete."""
    held = unresolved_at_end(stage.events)
    names = ", ".join(held).replace("-", " ")
    return [*([f"The run is complete, but {still_wrong(len(held))}: {names}."] if held else []), *grave_in_words(stage.events)]


def _about_pauses(stage: StageLog) -> Iterator[str]:
    if stage.pauses:
        yield (
            f"{fmt.plural(len(stage.pauses), 'pause')} in the log, the longest of {fmt.duration(max(stage.pauses))}: "
            "the run was stopped and resumed, or the machine slept. Times on this page leave pauses out."
        )


def next_steps(run: RunRecord) -> Iterator[str]:
    """Yield what to do next, the most pressing first."""
    score, names = headline_score(run), stage_names(run)
    if score is None:
        yield "Score the checkpoint on an exam: a loss says how well it reads, not what it knows."
    elif unfit_explains(score):
        yield "Give the exam's questions room: a smaller max_new_tokens, or a model with a larger model.max_seq_len."
    elif score.low <= baseline(score):
        yield "Train longer or larger before anything else: a model at chance has nothing for GRPO to reinforce."
    if "grpo" not in names and "sft" not in names:
        yield "Teach it to answer: supervised fine-tuning on worked examples, then GRPO where answers can be checked."
    if score and score.high - score.low > 0.1:
        yield (
            f"Ask more questions: with {fmt.count(score.n)} of them a difference under "
            f"{50 * (score.high - score.low):.0f} points cannot be seen."
        )
    if score and len(scores_on(run, score.split)) > 1 and score.low > baseline(score):
        yield "Run it again with another seed: one run shows that it can work, not how often."
    yield "Talk to the model: a dozen questions of your own tell more about its habits than any single number."
    yield "Then take the next larger recipe: the same code, more tokens, a larger model."


def summary_text(run_folder: str | Path | RunRecord, page: Path | None = None) -> str:
    """Return a summary for the terminal, without colour or a last newline; raises UserError when it is not a run folder.

    page: where the report was written when it is not in the run folder.
    """
    run = read_run(run_folder)
    lines = ["".join(headline(run))]
    score = headline_score(run)
    if score:
        lines.append(score_in_words(score))
    if run.exams:
        width = max(len(stage_title(s.label)) for s in run.exams)
        wide = max(len(s.split) for s in run.exams)
        for s in run.exams:
            name = f"{stage_title(s.label):<{width}}  {s.split:<{wide}}"
            lines.append(f"  {name}  {fmt.percent(s.accuracy):>6}  ({interval(s)}, n = {fmt.count(s.n)})")
    for c in run.comparisons:
        gain = f"{fmt.points(c.difference)} points ({fmt.points(c.low)} to {fmt.points(c.high)})"
        lines.append(f"{stage_title(c.after_label)} on {c.split}: {gain}. {difference_in_words(c)}")
    if teachers(run):
        lines.append(teachers(run))
    if run.stages:
        stages = ", ".join(f"{stage_title(s.name)} {fmt.duration(s.seconds)}" for s in run.stages)
        lines.append(f"Time: {fmt.duration(total_seconds(run))} ({stages})")
    found = attention(run)
    lines += [f"Watch: {text}" for text in found[:3]]
    if len(found) > 3:
        lines.append(f"Watch: {len(found) - 3} more on the page")
    page = page or RunFolder(run.path).report
    if page.is_file():
        lines.append(f"Report: {page}")
    return "\n".join(lines)
