"""What a careful reader would notice in a run's numbers: warnings, incidents, and what to do next.

Each rule is one function from the data to sentences. The thresholds are those at which runs of this kind were seen to
go wrong: completions that never end, rewards that never move, one letter that takes over, a held-out loss that turns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from osler.monitor.lifetime import still_wrong, unresolved_at_end
from osler.report import format as fmt
from osler.report.curves import Series
from osler.report.diary import grave_in_words
from osler.report.read import Run, StageRun
from osler.report.words import baseline, headline_score, scores_on, stage_names, stage_title, unfit, unfit_explains


def findings(run: Run) -> list[str]:
    """Everything that deserves attention, the gravest first; empty when nothing stands out."""
    out = list(_exam_findings(run))
    for stage in run.runs:
        where = stage_title(stage.name)
        out += [f"{where}: {text}" for rule in (_diary, _training, _reinforcement, _interruptions) for text in rule(stage)]
    return out + run.problems


def next_steps(run: Run) -> list[tuple[str, str]]:
    """(sentence, command or ""): what the run itself left as advice, else what follows from its numbers."""
    return run.next_steps or [(text, "") for text in _advice(run)]


def _exam_findings(run: Run) -> Iterator[str]:
    score = headline_score(run)
    if score and math.isfinite(score.low) and score.low <= baseline(score) <= score.high:
        yield (
            f"The final score on {score.split} ({fmt.percent(score.accuracy)}) cannot be told apart from the best "
            f"that a model without knowledge would get ({fmt.percent(baseline(score))})."
        )
    for score in (s for s in run.exams if s.label == run.exams[-1].label):
        where = f"{stage_title(score.label)} on {score.split}"
        if score.presentations > 0 and score.unparsed / score.presentations > 0.05:
            yield (
                f"{where}: {fmt.percent(score.unparsed / score.presentations)} of the answers had no readable letter "
                "and count as wrong."
            )
        if unfit(score):
            yield f"{where}: {unfit(score)}"
        total = sum(v for v in score.letters.values() if math.isfinite(v))
        if total >= 40 and len(score.letters) > 2:
            letter, n = max(score.letters.items(), key=lambda item: item[1])
            if n / total > 0.6:
                yield f"{where}: {fmt.percent(n / total)} of the answers are {letter}. That is a habit, not knowledge."


def _diary(stage: StageRun) -> list[str]:
    """What the diary says; first what was still wrong when the run was complete."""
    held = unresolved_at_end(stage.events)
    names = ", ".join(held).replace("-", " ")
    return [*([f"The run is complete, but {still_wrong(len(held))}: {names}."] if held else []), *grave_in_words(stage.events)]


def _training(stage: StageRun) -> Iterator[str]:
    for name in ("train/loss", "train/grad_norm", "loss"):
        curve = stage.curves.get(name, Series())
        bad = curve.steps[~np.isfinite(curve.values)]
        if len(bad):
            often = fmt.plural(len(bad), "logged step")
            yield f"{name} was not a finite number at {often}, first at step {fmt.count(bad[0])}."
    skipped = stage.finite("train/skipped_steps").values.sum()  # each line counts those since the one before
    if skipped > 0:
        yield f"{fmt.plural(int(skipped), 'update')} skipped because loss or gradient was not finite."
    held_out = stage.finite("eval/loss")
    if len(held_out) >= 4:
        lowest, end = int(held_out.values.argmin()), held_out.values[-1]
        best = held_out.values[lowest]
        if end > best * 1.02:
            yield (
                f"held-out loss was lowest at step {fmt.count(held_out.steps[lowest])} ({fmt.number(best)}) and ended at "
                f"{fmt.number(end)}: the model was memorising by then."
            )
    loss = stage.finite("train/loss").values
    if len(loss) >= 40:
        tenth = len(loss) // 10
        blocks = [loss[i : i + tenth].mean() for i in range(0, len(loss) - tenth + 1, tenth)]
        if blocks[-1] > 1.15 * min(blocks):
            yield f"the loss ended {fmt.percent(blocks[-1] / min(blocks) - 1, 0)} above its best stretch."


def _reinforcement(stage: StageRun) -> Iterator[str]:
    if _tail(stage, "completions/clipped_ratio") > 0.9:
        yield "more than 90% of the completions were cut at the length limit: the model does not end its answers."
    longest = streak = 0
    for reward in stage.finite("reward").values:
        streak = streak + 1 if reward == 0 else 0
        longest = max(longest, streak)
    if longest >= 5:
        yield f"the reward was exactly zero for {longest} logged steps in a row: nothing to learn from."
    if _tail(stage, "frac_reward_zero_std") > 0.8:
        yield "in the last quarter more than 80% of the groups had equal rewards and taught nothing."
    entropy = stage.finite("entropy").values
    if len(entropy) > 4 and entropy[0] > 0.2 and _tail(stage, "entropy") < 0.02:
        yield "entropy fell to nearly zero: the policy has stopped exploring."
    if _tail(stage, "sampling/sampling_logp_difference/mean") > 0.02:
        yield "sampler and trainer disagree about log-probabilities; the ratios of the loss are off by that much."
    letters = {n: _tail(stage, n) for n in stage.curves if n.startswith("answer/letter_")}
    for name, share in letters.items():
        if share > 0.7 and len(letters) > 2:
            letter = name.removeprefix("answer/letter_").removesuffix("_frac")
            yield f"{fmt.percent(share, 0)} of the late completions answered {letter}."


def _interruptions(stage: StageRun) -> Iterator[str]:
    pauses = stage.pauses
    if pauses:
        yield (
            f"{fmt.plural(len(pauses), 'pause')} in the log, the longest of {fmt.duration(max(pauses))}: "
            "the run was stopped and resumed, or the machine slept. Times on this page leave pauses out."
        )


def _advice(run: Run) -> Iterator[str]:
    score = headline_score(run)
    names = stage_names(run)
    stuck = any(_tail(stage, "frac_reward_zero_std") > 0.8 for stage in run.runs)
    if score is None:
        yield "Score the checkpoint on an exam: a loss says how well it reads, not what it knows."
    elif unfit_explains(score):
        yield "Give the exam's questions room: a smaller max_new_tokens, or a model with a larger model.max_seq_len."
    elif score.low <= baseline(score):
        yield "Train longer or larger before anything else: a model at chance has nothing for GRPO to reinforce."
    if any(text for stage in run.runs for text in _training(stage) if "memorising" in text):
        yield "Give it more, or more varied, data: the held-out loss turned before training ended."
    if stuck:
        yield "Most groups taught nothing: refill them (dynamic_sampling), or ask what it gets right half the time."
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


def _tail(stage: StageRun, name: str) -> float:
    """Mean of a curve's last quarter; NaN, which compares false with everything, when there is none."""
    known = stage.finite(name).values
    return float(known[-max(1, len(known) // 4) :].mean()) if len(known) else math.nan
