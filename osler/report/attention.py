"""What deserves a reader's attention in a run, and what to do next.

What is wrong with a stage was judged as it trained, by the rules of ``osler/monitor``, and stands in its events. Here are added
what its exams show, pauses, and files that could not be read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from osler.monitor.lifetime import still_wrong, unresolved_at_end
from osler.report import format as fmt
from osler.report.events import grave_in_words
from osler.report.read import RunRecord, StageLog
from osler.report.words import baseline, headline_score, scores_on, stage_names, stage_title, unfit, unfit_explains

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
