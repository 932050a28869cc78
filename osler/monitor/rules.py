"""The alert rules: each reads the newest line of a run's history and yields what is wrong.

A rule compares a number with the run's own past by medians, which a single odd line cannot move, and names the number, the likely
cause and what to change. The thresholds leave room for what healthy runs do: lines that differ by a tenth, norms that double, a
restart. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from osler.monitor.history import (
    ALL_EQUAL,
    CLIPPED,
    DATA_TIME,
    DEAD_UNITS,
    EPOCH,
    GRAD_NORM,
    HELD_OUT,
    KEPT,
    LAYER_NORM,
    LOSS,
    LR,
    MEMORY,
    OTHER_CPUS,
    SMOOTHED_LOSSES,
    SPEED,
    UNLEARNED,
    History,
)

USUAL = 50  # lines that say what is usual
CALM = 10  # lines before there is a usual
EXPLODING, CREEPING, BURSTING = 4.0, 10.0, 50.0  # norms: three lines of the usual's, of the calmest time's, a single line
VANISHING, NOTHING = 0.01, 1e-7  # norms: of the usual, and for themselves
LEARNED = 0.05  # nats per token below which there is nothing left to learn
GUESSING, GUESSING_STEPS = 0.97, 50  # of ln(vocabulary): a loss above it knows nothing; and steps to begin with
WORSE = 1.2  # of ln(vocabulary): a model that is sure of what is wrong; no start is as bad
TINY_LR = 1e-5  # a learning rate below it is rather too low
RISEN, RISEN_NATS = 0.25, 0.1  # of the best loss, and at least so many nats: above the noise of small losses
SWINGING, SWINGING_NATS = 0.2, 0.3  # of the loss, and nats: a rise and fall in one line
ALWAYS_CLIPPED, CLIPPED_LINES = 0.99, 30
DEAD = 0.5  # of a layer's units
STARVED, STARVED_LINES = 0.2, 5  # of the step's time spent on waiting for data
STARVED_SECONDS = 1.0  # in those lines
GROWING, GROWING_BYTES = 0.05, 64 * 2**20  # of memory, over one of the windows below
GROWTH_WINDOWS = (30, 120, 480)
SLOW_SECONDS, BUSY_CPUS = 60.0, 0.25  # at less than half of the best speed; other work that may be the cause
STALLED, STALLED_LINES = 0.005, 60  # of the loss; fewer lines cannot tell a plateau from noise
ANNEALED = 0.1  # of the highest learning rate: below it a loss may rest
WORN_EPOCHS = 16  # passes over the data
TURNED, TURNED_EVALUATIONS = 0.02, 4  # of the lowest held-out loss; evaluations of which the last two are above that


class Finding(NamedTuple):
    """What a rule finds in a line; findings of one name are the same trouble, and a greater badness is more of it."""

    name: str
    message: str
    badness: float = 1.0
    severity: str = "warning"  # or critical


def exploding(past: History) -> Iterator[Finding]:
    """The norm is above its history for three lines, creeps up over many, or is out of all proportion in one."""
    norms, clip = past.last(GRAD_NORM, USUAL + 3), past.settings.clip_norm
    now, before = min(norms[-3:]), [norm for norm in norms[:-3] if norm > 0.0]  # 0: nothing to learn from in GRPO
    if len(before) < CALM:
        return
    usual, calmest = median(before), past.calmest
    if norms[-1] > max(BURSTING * usual, clip):
        now = norms[-1]
    elif now <= clip or (now <= EXPLODING * usual and now <= CREEPING * calmest):
        return
    usual = min(usual, calmest)
    yield Finding(
        "exploding-gradient",
        f"the gradient's norm is {now:.3g}, {now / usual:.0f} times the {usual:.3g} that it was. The learning rate is probably "
        f"too high: try {past.settings.slower} with a longer schedule.warmup_tokens. If it came at once, look at the data of "
        "these steps.",
        now / usual,
        "critical",
    )


def vanishing(past: History) -> Iterator[Finding]:
    """The norm is next to nothing for three lines, with something to learn. (GRPO without different rewards has no loss.)"""
    norms = past.last(GRAD_NORM, USUAL + 3)
    if past.line.get(LOSS, 0.0) < LEARNED or len(norms) < 3:
        return
    now, before = max(norms[-3:]), norms[:-3]
    usual = median(before) if len(before) >= CALM else 0.0
    if now < max(VANISHING * usual, NOTHING):
        was = f", where {usual:.2g} was usual" if usual > now else ""
        yield Finding(
            "vanishing-gradient",
            f"the gradient's norm is {now:.2g}{was}, while the loss is {past.line[LOSS]:.3g}: nothing is being learned. "
            "Activations have probably saturated or died: go back to an earlier checkpoint with "
            f"{past.settings.slower}; in a new model look at the initialisation.",
            1.0 / max(now, 1e-30),
            "critical",
        )


def guessing(past: History) -> Iterator[Finding]:
    """The loss is worse than guessing for three lines, or no better after the warm-up: the rate is too high, or too low."""
    settings, losses = past.settings, past.last(LOSS, 5)
    if not settings.vocab_size or len(losses) < 3:
        return
    chance = math.log(settings.vocab_size)
    is_worse = min(losses[-3:]) > WORSE * chance
    had_time = past.tokens > settings.warmup_tokens and past.step >= GUESSING_STEPS and len(losses) == 5
    if is_worse or (had_time and min(losses) > GUESSING * chance):
        too_high = is_worse or settings.lr > TINY_LR
        advice = f"high: try {settings.slower}" if too_high else f"low: try {settings.faster}"
        yield Finding(
            "learning-rate",
            f"the loss is {median(losses):.3f}, and guessing among {settings.vocab_size:,} tokens gives {chance:.3f}: the model "
            f"{'does worse than that' if is_worse else 'has learned nothing'}. The learning rate is probably too {advice}.",
            median(losses) / chance,
            "critical",
        )


def unlearned(past: History) -> Iterator[Finding]:
    """The rows of some steps had no token to learn, so that the steps were for nothing."""
    count = past.line[UNLEARNED]
    if count:
        is_all = not past.has_loss
        yield Finding(
            "nothing-to-learn",
            f"{'all' if is_all else 'some'} steps since the line before ({count:.0f}) had no token to learn in any row, and "
            "count nowhere. Fine-tuning learns what the loss masks say, which is the answers: set a larger seq_len, so that "
            "an answer stays in the row of its question, or a larger batch_tokens.",
            count,
            "critical" if is_all else "warning",
        )


def ended_badly(past: History) -> Iterator[Finding]:
    """The last loss of a run, however few its lines, is not finite, or worse than guessing; or GRPO never had a gradient."""
    vocab_size, loss, equal = past.settings.vocab_size, past.loss, past.values[ALL_EQUAL]
    if equal and not past.had_gradient and past.without_reward < past.settings.zero_reward_patience:
        yield Finding(
            "equal-rewards",
            "the samples of each question were rewarded equally in every step, so the model learned nothing. Ask what it gets "
            "right about half the time.",
        )
    if loss is None:
        return
    if math.isnan(loss):
        yield Finding(
            "no-finite-loss",
            "no step of the last line had a finite loss, so none of them changed the model. Try "
            f"{past.settings.slower}, and look at the data.",
            severity="critical",
        )
    elif vocab_size and loss > math.log(vocab_size):
        yield Finding(
            "worse-than-guessing",
            f"the run ends with a loss of {loss:.3f}, and guessing among {vocab_size:,} tokens gives {math.log(vocab_size):.3f}: "
            f"the model has learned nothing. Train longer (total_tokens), with a warm-up that ends early in the run; if the loss "
            f"rose, try {past.settings.slower}.",
            loss,
            "critical",
        )


def repeated(past: History) -> Iterator[Finding]:
    """The data were read so often that one more time teaches next to nothing (Muennighoff et al. 2023, arXiv 2305.16264)."""
    epochs = past.line[EPOCH]
    if epochs > WORN_EPOCHS and not past.settings.max_new_tokens:  # GRPO answers its questions anew each time
        yield Finding(
            "repeated-data",
            f"the run has read its data {epochs:.0f} times. After about {WORN_EPOCHS} times once more teaches next to nothing, "
            "and the model learns them by heart: keep the checkpoint with the lowest eval/loss, and give more data or a smaller "
            "total_tokens.",
            epochs,
        )


def rising(past: History) -> Iterator[Finding]:
    """The loss goes up again by more than the noise of its lines, or that noise is all there is."""
    losses = past.last(LOSS, 15)
    if len(losses) < 5:
        return
    now, best = median(losses[-SMOOTHED_LOSSES:]), past.best_loss
    jumps = [after - before for before, after in pairwise(losses)]
    rises = sum(jump for jump in jumps if jump > 0)
    swing = 2 * min(rises, rises - sum(jumps)) / len(jumps)  # of rises and falls the smaller sum: no trend is in it
    if len(losses) == 15 and swing > max(SWINGING * median(losses), SWINGING_NATS):
        yield Finding(
            "swinging-loss",
            f"the loss swings by {swing:.2f} from line to line around {median(losses):.3f}. The learning rate is probably too "
            f"high, or the batch too small: try {past.settings.slower}, or a larger batch_tokens.",
            swing,
        )
    if now - best > max(RISEN * best, RISEN_NATS, 3 * median(map(abs, jumps))) and min(losses[-3:]) > best:
        yield Finding(
            "learning-rate",
            f"the loss has risen to {now:.3f} from its best, {best:.3f}. The learning rate is probably too high: go back to a "
            f"checkpoint from before and try {past.settings.slower}. If the data changes here, this may be its doing.",
            now / best,
            "critical",
        )


def memorising(past: History) -> Iterator[Finding]:
    """The held-out loss has turned: the model learns its data by heart."""
    losses = past.last(HELD_OUT, KEPT)
    lowest, step = past.lowest_held_out
    if len(losses) >= TURNED_EVALUATIONS and min(losses[-2:]) > (1 + TURNED) * lowest:
        yield Finding(
            "memorising",
            f"the held-out loss is {losses[-1]:.3f}, and it was lowest, {lowest:.3f}, at step {step:,}: the model learns its "
            "data by heart. Keep the checkpoint of that step, and give more, or more varied, data.",
            losses[-1] / lowest,
        )


def clipped(past: History) -> Iterator[Finding]:
    """Clipping decides the length of every step."""
    shares = past.last(CLIPPED, CLIPPED_LINES)
    if past.tokens > past.settings.warmup_tokens and len(shares) == CLIPPED_LINES and min(shares) >= ALWAYS_CLIPPED:
        norm = f" (norm {past.line[GRAD_NORM]:.3g})" if GRAD_NORM in past.line else ""
        yield Finding(
            "always-clipped",
            f"every gradient of the last {CLIPPED_LINES} lines was clipped{norm}, so clip_norm={past.settings.clip_norm:g} "
            f"decides how far a step goes. Try {past.settings.slower}; if the loss falls well as it is, a larger clip_norm.",
        )


def dead_units(past: History) -> Iterator[Finding]:
    """More than half of a layer's feed-forward units never fire."""
    dead = {
        name.removeprefix(DEAD_UNITS): share for name, share in past.line.items() if name.startswith(DEAD_UNITS) and share > DEAD
    }
    if dead:
        worst = max(dead, key=lambda layer: dead[layer])
        layers = f", and more than {DEAD:.0%} in {len(dead)} layers in all" if len(dead) > 1 else ""
        yield Finding(
            "dead-layers",
            f"{dead[worst]:.0%} of the feed-forward units in layer {worst} give nothing for any token{layers}. They do not come "
            "back by themselves; a step was probably too large. Go back to an earlier checkpoint and try "
            f"{past.settings.slower} and a longer schedule.warmup_tokens.",
            sum(dead.values()),
            "critical",
        )


def cut_off(past: History) -> Iterator[Finding]:
    """No gradient reaches a layer while others have one. (A head that begins at zero lets none through in the first step.)"""
    parts = [name.removeprefix(LAYER_NORM) for name, norm in past.line.items() if name.startswith(LAYER_NORM) and norm == 0.0]
    still = [f"layer {part}" if part.isdigit() else part for part in parts]
    if still and past.line.get(GRAD_NORM, 0.0) > 0.0 and past.step > 1:
        yield Finding(
            "dead-layer-gradient",
            f"no gradient reaches {', '.join(still[:4])}{' and others' if len(still) > 4 else ''}, while the rest learns "
            f"(norm {past.line[GRAD_NORM]:.3g}). The layer is dead or cut off: look at its weights, and at what detaches it.",
            float(len(still)),
            "critical",
        )


def growing(metric: str, past: History) -> Iterator[Finding]:
    """Memory grows evenly: the medians of a window's quarters rise by like amounts, unlike in a jump or a warm-up."""
    for lines in GROWTH_WINDOWS:
        values = past.last(metric, lines)
        if len(past.values[metric]) < min(lines + CALM, KEPT):
            return
        quarter = lines // 4
        medians = [median(values[start : start + quarter]) for start in range(0, 4 * quarter, quarter)]
        rises, low, high = [after - before for before, after in pairwise(medians)], medians[0], medians[-1]
        if high - low > max(GROWING * low, GROWING_BYTES) and min(rises) > max(rises) / 2:
            steps = past.memory_steps[-1] - past.memory_steps[-1 - 3 * quarter]
            yield Finding(
                "memory-growth",
                f"{metric} grows evenly, by {(high - low) / 2**20 / max(steps, 1) * 1000:,.0f} MiB in 1,000 steps, and is "
                f"{high / 2**30:.2f} GiB: something is kept that should be let go, and the run ends when memory does. Take out "
                "what was added last (a hook, a list of tensors); the same command goes on with the memory of a fresh start.",
                high,
            )
            return


def starved(past: History) -> Iterator[Finding]:
    """The device waits for data."""
    share, workers = median(past.last(DATA_TIME, STARVED_LINES)), past.settings.loader_workers
    waited = sum(list(past.waited_seconds)[-STARVED_LINES:])  # so little that nobody would notice it is no reason to speak
    if len(past.values[DATA_TIME]) >= CALM and share > STARVED and waited > STARVED_SECONDS:
        yield Finding(
            "starved-loader",
            f"{share:.0%} of a step's time passes in waiting for data ({past.line[DATA_TIME]:.0f} ms). Try "
            f"{past.settings.section}loader_workers={2 * max(1, workers)} (now {workers}), and put the run folder with "
            "its shards on a faster disk.",
            share,
        )


def slowed(past: History) -> Iterator[Finding]:
    """The run is less than half as fast as it was, for a minute."""
    if past.slow_seconds >= SLOW_SECONDS:
        others = past.line.get(OTHER_CPUS, 0.0)
        cause = (
            f"Other processes keep {others:.1f} CPUs of this machine busy: end them, or let them wait."
            if others > BUSY_CPUS
            else "No other process keeps its CPUs busy: look for heat, a power limit, a full memory that swaps, or a slow disk."
        )
        now = past.line[SPEED]
        yield Finding(
            "slow-run",
            f"the run makes {now:,.0f} tokens/s, and it has made {past.best_speed:,.0f}. {cause}",
            past.best_speed / now,
        )


def stalled(past: History) -> Iterator[Finding]:
    """The last fifth of the run is no better than the fifth before it, and there are lines enough to see that.

    Windows grow with the run, because a healthy loss falls by like amounts in like ratios of time.
    """
    sums, jumps, count = past.loss_sums, past.jump_sums, len(past.loss_sums) - 1
    lr = past.line.get(LR, past.settings.lr)
    if count < STALLED_LINES or lr < ANNEALED * past.peak_lr:
        return
    size = count // 5
    now = (sums[count] - sums[count - size]) / size
    before = (sums[count - size] - sums[count - 2 * size]) / size
    noise = (jumps[count] - jumps[count - 2 * size]) / (2 * size) * math.sqrt(math.pi) / 2  # of one line, as a deviation
    if now > LEARNED and before - now + noise * math.sqrt(2 / size) < STALLED * now:
        yield Finding(
            "stalled-loss",
            f"the loss has not fallen for {2 * size} lines: {before:.3f}, then {now:.3f}, at a learning rate of {lr:.2g}. Either "
            f"the rate is too high for what is left to learn: try {past.settings.slower}, or a schedule that falls to 0. Or the "
            "model has learned what its size and its data allow.",
        )


# A rule runs on lines with its metric; a name that ends with a slash stands for one metric per layer.
RULES: tuple[tuple[str, Callable[[History], Iterator[Finding]]], ...] = (
    (GRAD_NORM, exploding),
    (GRAD_NORM, vanishing),
    (LOSS, guessing),
    (UNLEARNED, unlearned),
    (EPOCH, repeated),
    (LOSS, rising),
    (CLIPPED, clipped),
    (DEAD_UNITS, dead_units),
    (LAYER_NORM, cut_off),
    *((metric, partial(growing, metric)) for metric in MEMORY),
    (DATA_TIME, starved),
    (SPEED, slowed),
    (LOSS, stalled),
    (HELD_OUT, memorising),
)
