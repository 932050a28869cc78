"""The alert rules: each reads the newest line of a run's history and yields what is wrong.

A rule compares a number with the run's own past by medians, which a single odd line cannot move. It names the number, the likely
cause and what to change. The thresholds leave room for what healthy runs do: lines that differ by a tenth, norms that double, a
restart. The rules for GRPO follow the others, and the rules for the end of a run come last. Torch-free.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from statistics import median
from string import ascii_uppercase
from typing import NamedTuple

from osler.monitor.history import CALM, KEPT, History

LEARNED = 0.05  # nats per token: a lower loss leaves nothing to learn
LINES = 20  # lines that a policy is judged by


class Rule(NamedTuple):
    """A rule and the name of its findings; rules with the same name report the same trouble."""

    metric: str  # the rule runs on lines with this metric; a name that ends with a slash stands for one metric per layer
    name: str
    severity: str  # warning or critical
    find: Callable[[History], Iterator[str]]  # yields what is wrong, in words


def exploding(past: History) -> Iterator[str]:
    """Above clip_norm, the norm is 4 times the usual or 10 times the calmest for three lines, or 50 times the usual for one."""
    norms, clip = past.last("train/grad_norm", 50 + 3), past.settings.clip_norm
    now, before = min(norms[-3:]), [norm for norm in norms[:-3] if norm > 0.0]  # 0: nothing to learn from in GRPO
    if len(before) < CALM:
        return
    usual = median(before)
    if norms[-1] > max(50 * usual, clip):
        now = norms[-1]
    if now > clip and (now > 4 * usual or now > 10 * past.calmest):
        usual = min(usual, past.calmest)
        yield (
            f"the gradient's norm is {now:.3g}, {now / usual:.0f} times the {usual:.3g} that it was. The learning rate is "
            f"probably too high: try {past.settings.slower} with a longer schedule.warmup_tokens. If it came at once, look at "
            "the data of these steps."
        )


def vanishing(past: History) -> Iterator[str]:
    """The norm is below 1 % of the usual for three lines, with something to learn. (GRPO, without train/loss, is left out.)"""
    norms = past.last("train/grad_norm", 50 + 3)
    if past.line.get("train/loss", 0.0) < LEARNED or len(norms) < 3:
        return
    now, before = max(norms[-3:]), norms[:-3]
    usual = median(before) if len(before) >= CALM else 0.0
    if now < max(0.01 * usual, 1e-7):
        was = f", where {usual:.2g} was usual" if usual > now else ""
        yield (
            f"the gradient's norm is {now:.2g}{was}, while the loss is {past.line['train/loss']:.3g}: nothing is being learned. "
            f"Activations have probably saturated or died: {past.settings.go_back}; in a new model look at the initialisation."
        )


def guessing(past: History) -> Iterator[str]:
    """For three lines the loss is a fifth above guessing, where a new model begins, or after the warm-up it is no better."""
    settings, losses = past.settings, past.last("train/loss", 5)
    if not settings.vocab_size or len(losses) < 3:
        return
    chance = math.log(settings.vocab_size)
    is_worse = min(losses[-3:]) > 1.2 * chance
    had_time = past.tokens > settings.warmup_tokens and past.step >= 50 and len(losses) == 5
    if is_worse or (had_time and min(losses) > 0.97 * chance):
        is_high = is_worse or settings.lr > 1e-5
        advice = f"high: try {settings.slower}" if is_high else f"low: try {settings.at_lr(10 * settings.lr)}"
        yield (
            f"the loss is {median(losses):.3f}, and guessing among {settings.vocab_size:,} tokens gives {chance:.3f}: the model "
            f"{'does worse than that' if is_worse else 'has learned nothing'}. The learning rate is probably too {advice}."
        )


def unlearned(is_all: bool, past: History) -> Iterator[str]:
    """All steps since the previous line (``is_all``), or else some, had no token to learn, and were for nothing."""
    count = past.line["train/unlearned_steps"]
    if count and is_all != past.has_loss:
        yield (
            f"{'all' if is_all else 'some'} steps since the previous line ({count:.0f}) had no token to learn in any row, and "
            "count nowhere. Fine-tuning learns answers alone: set a larger seq_len, so that an answer stays in the row of its "
            "question, or a larger batch_tokens."
        )


def repeated(past: History) -> Iterator[str]:
    """The data were read so often that another time teaches next to nothing (Muennighoff et al. 2023, arXiv 2305.16264)."""
    epochs = past.line["data/epoch"]
    if epochs > 16 and not past.settings.max_new_tokens:  # GRPO samples new answers each time
        yield (
            f"the run has read its data {epochs:.0f} times. After about 16 times another one teaches next to nothing: keep the "
            "checkpoint with the lowest eval/loss, and give more data or a smaller total_tokens."
        )


def rising(past: History) -> Iterator[str]:
    """The loss goes up again by more than the noise of its lines."""
    losses, best = past.last("train/loss", 15), past.best_loss
    if len(losses) < 5:
        return
    now, noise = median(losses[-5:]), median(abs(after - before) for before, after in pairwise(losses))
    if now - best > max(0.25 * best, 0.1, 3 * noise) and min(losses[-3:]) > best:
        yield (
            f"the loss has risen to {now:.3f} from its best, {best:.3f}. The learning rate is probably too high: "
            f"{past.settings.go_back}. If the data changes here, this may be its doing."
        )


def swinging(past: History) -> Iterator[str]:
    """The loss swings up and down from line to line, by more than a fifth of its level and more than 0.3 nats."""
    losses = past.last("train/loss", 15)
    jumps = [after - before for before, after in pairwise(losses)]
    rises = sum(jump for jump in jumps if jump > 0)
    swing = 2 * min(rises, rises - sum(jumps)) / 14  # the smaller sum, of rises or of falls, has no trend in it
    if len(losses) == 15 and swing > max(0.2 * median(losses), 0.3):
        yield (
            f"the loss swings by {swing:.2f} from line to line around {median(losses):.3f}. The learning rate is probably too "
            f"high, or the batch too small: try {past.settings.slower}, or a larger batch_tokens."
        )


def memorising(past: History) -> Iterator[str]:
    """The held-out loss has turned: for two evaluations it is more than 2 % above its lowest."""
    losses = past.last("eval/loss", KEPT)
    lowest, step = past.lowest_held_out
    if len(losses) >= 4 and min(losses[-2:]) > 1.02 * lowest:
        yield (
            f"the held-out loss is {losses[-1]:.3f}, and it was lowest, {lowest:.3f}, at step {step:,}: the model learns its "
            "data by heart. Keep the checkpoint of that step, and give more, or more varied, data, or more optim.weight_decay."
        )


def clipped(past: History) -> Iterator[str]:
    """Clipping decides the length of every step."""
    shares = past.last("grad/clipped_frac", 30)
    if past.tokens > past.settings.warmup_tokens and len(shares) == 30 and min(shares) >= 0.99:
        norm = f" (norm {past.line['train/grad_norm']:.3g})" if "train/grad_norm" in past.line else ""
        yield (
            f"every gradient of the last 30 lines was clipped{norm}, so clip_norm={past.settings.clip_norm:g} "
            f"decides how far a step goes. Try {past.settings.slower}; if the loss falls well as it is, a larger clip_norm."
        )


def dead_units(past: History) -> Iterator[str]:
    """More than half of a layer's feed-forward units never fire."""
    shares = {name: share for name, share in past.line.items() if name.startswith("model/dead_units_frac/") and share > 0.5}
    if shares:
        worst = max(shares, key=lambda name: shares[name])
        layer = f"layer {worst.rpartition('/')[2]}"
        layers = f", and more than 50% in {len(shares)} layers in all" if len(shares) > 1 else ""
        yield (
            f"{shares[worst]:.0%} of the feed-forward units in {layer} give nothing for any token{layers}. A step was probably "
            f"too large, and they do not come back: {past.settings.go_back} and a longer schedule.warmup_tokens."
        )


def cut_off(past: History) -> Iterator[str]:
    """No gradient reaches a layer while others get some.

    A head that begins at zero lets none through in the first step, and then an output projection at zero none to the values.
    """
    parts = [name.rpartition("/")[2] for name, norm in past.line.items() if name.startswith("grad/norm/") and norm == 0.0]
    late = [part for part in parts if past.step > (2 if part == "values" else 1)]
    unreached = [f"layer {part}" if part.isdigit() else part for part in late]
    if unreached and past.line.get("train/grad_norm", 0.0) > 0.0:
        yield (
            f"no gradient reaches {', '.join(unreached[:4])}{' and others' if len(unreached) > 4 else ''}, while the rest learns "
            f"(norm {past.line['train/grad_norm']:.3g}). What gets none is dead or cut off: look at the weights, and at what "
            "detaches them."
        )


def growing(metric: str, past: History) -> Iterator[str]:
    """Memory grows evenly: the medians of a window's quarters rise by similar amounts, unlike in a jump or a warm-up."""
    for lines in (30, 120, 480):
        values = past.last(metric, lines)
        if len(past.values[metric]) < min(lines + CALM, KEPT):
            return
        quarter = lines // 4
        medians = [median(values[start : start + quarter]) for start in range(0, 4 * quarter, quarter)]
        rises, low, high = [after - before for before, after in pairwise(medians)], medians[0], medians[-1]
        if high - low > max(0.05 * low, 64 * 2**20) and min(rises) > max(rises) / 2:
            yield (
                f"{metric} grows evenly, by {(high - low) / 2**20:,.0f} MiB in {3 * quarter} lines, and is {high / 2**30:.2f} "
                "GiB: something is kept that should be let go, and the run ends when memory does. Take out what was added last "
                "(a hook, a list of tensors); the same command goes on with the memory of a fresh start."
            )
            return


def starved(past: History) -> Iterator[str]:
    """The device waits for data for a fifth of its time. (Nobody would notice a wait of a second in five lines.)"""
    newest, workers = list(past.waits)[-5:], past.settings.loader_workers
    share = median(share for share, _ in newest)
    if len(past.waits) >= CALM and share > 0.2 and sum(seconds for _, seconds in newest) > 1.0:
        yield (
            f"{share:.0%} of a step's time passes in waiting for data ({past.line['perf/data_ms']:.0f} ms). Try "
            f"{past.settings.section}loader_workers={2 * max(1, workers)} (now {workers}), and a faster disk for the shards."
        )


def slowed(past: History) -> Iterator[str]:
    """The run is less than half as fast as it was, for a minute. (GRPO is left out: its speed depends on the answers' length.)"""
    if past.slow_seconds >= 60.0:
        others, now = past.line.get("perf/other_cpus", 0.0), past.line["perf/tokens_per_second"]
        cause = (
            f"Other processes keep {others:.1f} CPUs of this machine busy: end them, or let them wait."
            if others > 0.25
            else "No other process keeps its CPUs busy: look for heat, a power limit, a full memory that swaps, or a slow disk."
        )
        yield f"the run makes {now:,.0f} tokens/s, and it has made {past.best_speed:,.0f}. {cause}"


def stalled(past: History) -> Iterator[str]:
    """The last fifth of the run is no better than the fifth before it, and there are lines enough to see that.

    Windows grow with the run, because a healthy loss falls by equal amounts in equal ratios of time. A loss may rest when the
    learning rate is below a tenth of its peak.
    """
    sums, jumps, count = past.loss_sums, past.jump_sums, len(past.loss_sums) - 1
    lr = past.line.get("train/lr", past.settings.lr)
    if count < 60 or lr < 0.1 * past.peak_lr or past.settings.is_frozen:
        return
    size = count // 5
    now = (sums[count] - sums[count - size]) / size
    before = (sums[count - size] - sums[count - 2 * size]) / size
    noise = (jumps[count] - jumps[count - 2 * size]) / (2 * size) * math.sqrt(math.pi) / 2  # standard deviation of a line
    if now > LEARNED and before - now + noise * math.sqrt(2 / size) < 0.005 * now:
        yield (
            f"the loss has not fallen for {2 * size} lines: {before:.3f}, then {now:.3f}, at a learning rate of {lr:.2g}. Either "
            f"the rate is too high for what is left to learn: try {past.settings.slower}, or a schedule that falls to 0. Or the "
            "model has learned what its size and its data allow."
        )


def cut_completions(past: History) -> Iterator[str]:
    """Hardly a completion ends by itself. When most did at first, the steps since have broken the model."""
    share, least = past.line["completions/clipped_ratio"], min(past.first["completions/clipped_ratio"])
    if share > 0.9:
        cause = (
            f", and at first {least:.0%}. The learning rate is probably too high: {past.settings.go_back}."
            if least < 0.5
            else ". Either algorithm.max_new_tokens is too small, or the model never learned to end (was it fine-tuned with the "
            "chat template?)."
        )
        yield f"{share:.0%} of the completions were cut at {past.settings.max_new_tokens} tokens{cause}"


def unrewarded(past: History) -> Iterator[str]:
    """No completion earned a reward for too many steps to be chance. When some did at first, the model has lost its skill."""
    if past.without_reward >= past.settings.zero_reward_patience:
        most = max(past.first["reward"])
        cause = (
            f"At first the mean reward was {most:.2g}, so the learning rate is probably too high: {past.settings.go_back}."
            if most > 0.0
            else "Look at samples.jsonl in the run folder, and start from a model that is right now and then."
        )
        yield f"no completion earned a reward for {past.without_reward} steps; there is nothing to learn from. {cause}"


def equal_rewards(past: History) -> Iterator[str]:
    """Most groups have equal rewards, and so no gradient. (Another rule judges groups without any reward.)"""
    if past.median("frac_reward_zero_std", LINES) > 0.8 and not past.without_reward:
        yield (
            f"in most of the last {LINES} lines more than 80% of the groups had equal rewards and taught nothing. Replace them "
            f"({past.settings.section}algorithm.dynamic_sampling=true), or ask what the model gets right about half the time."
        )


def silent(past: History) -> Iterator[str]:
    """The policy always says the same: its entropy was above 0.2 nats per token, and is below 0.02."""
    most, now = max(past.first["entropy"]), past.median("entropy", LINES)
    if most > 0.2 and now < 0.02:
        yield (
            f"the entropy has fallen from {most:.2f} to {now:.3f}: the policy has stopped exploring, and can learn nothing new. "
            f"To recover, {past.settings.go_back}. To keep it open, let algorithm.beta hold it to its reference, or raise "
            "algorithm.temperature; with several updates per batch raise algorithm.clip.high."
        )


def sampler_apart(past: History) -> Iterator[str]:
    """Sampler and trainer do not agree about the policy."""
    gap = past.median("sampling/sampling_logp_difference/mean", LINES)
    if gap > 0.02:
        yield (
            f"sampler and trainer differ by {gap:.3f} in the log-probability of a token, and the ratios of the loss are off by "
            f"that much. Both compute alike with {past.settings.section}precision=fp32."
        )


def one_letter(past: History) -> Iterator[str]:
    """One letter takes over, although the options are shuffled."""
    names = {letter: f"answer/letter_{letter}_frac" for letter in ascii_uppercase}
    shares = {letter: past.median(name, LINES) for letter, name in names.items() if name in past.line}
    for letter, share in shares.items():
        if len(shares) > 2 and share > 0.7:
            yield (
                f"{share:.0%} of the readable answers of the last {LINES} lines are {letter}, and the options are shuffled: that "
                f"is a habit, not knowledge. To recover, {past.settings.go_back}."
            )


def never_a_gradient(past: History) -> Iterator[str]:
    """All groups of a GRPO run had equal rewards. (Another rule judges groups without any reward.)"""
    equal = past.values["frac_reward_zero_std"]
    if equal and not past.had_gradient and past.without_reward < past.settings.zero_reward_patience:
        yield (
            "the samples of each question were rewarded equally in every step, so the model learned nothing. Ask what it gets "
            "right about half the time."
        )


def no_finite_loss(past: History) -> Iterator[str]:
    """The last loss is not finite."""
    if past.loss is not None and math.isnan(past.loss):
        yield (
            "no step of the last line had a finite loss, so none of them changed the model. Try "
            f"{past.settings.slower}, and look at the data."
        )


def worse_than_guessing(past: History) -> Iterator[str]:
    """The last loss of a run, however few its lines, is worse than guessing."""
    vocab_size, loss = past.settings.vocab_size, past.loss
    if vocab_size and loss is not None and loss > math.log(vocab_size):
        yield (
            f"the run ends with a loss of {loss:.3f}, and guessing among {vocab_size:,} tokens gives {math.log(vocab_size):.3f}: "
            "the model has learned nothing. Train longer (total_tokens), with a warm-up that ends early in the run; if the loss "
            f"rose, try {past.settings.slower}."
        )


RULES: tuple[Rule, ...] = (
    Rule("train/grad_norm", "exploding-gradient", "critical", exploding),
    Rule("train/grad_norm", "vanishing-gradient", "critical", vanishing),
    Rule("train/loss", "learning-rate", "critical", guessing),
    Rule("train/unlearned_steps", "nothing-to-learn", "critical", partial(unlearned, True)),
    Rule("train/unlearned_steps", "nothing-to-learn", "warning", partial(unlearned, False)),
    Rule("data/epoch", "repeated-data", "warning", repeated),
    Rule("train/loss", "swinging-loss", "warning", swinging),
    Rule("train/loss", "learning-rate", "critical", rising),
    Rule("grad/clipped_frac", "always-clipped", "warning", clipped),
    Rule("model/dead_units_frac/", "dead-layers", "critical", dead_units),
    Rule("grad/norm/", "dead-layer-gradient", "critical", cut_off),
    Rule("perf/memory_resident_bytes", "memory-growth", "warning", partial(growing, "perf/memory_resident_bytes")),
    Rule("perf/memory_allocated_bytes", "memory-growth", "warning", partial(growing, "perf/memory_allocated_bytes")),
    Rule("perf/data_ms", "starved-loader", "warning", starved),
    Rule("perf/tokens_per_second", "slow-run", "warning", slowed),
    Rule("train/loss", "stalled-loss", "warning", stalled),
    Rule("eval/loss", "memorising", "warning", memorising),
    Rule("completions/clipped_ratio", "cut-completions", "warning", cut_completions),
    Rule("reward", "no-reward", "warning", unrewarded),
    Rule("frac_reward_zero_std", "equal-rewards", "warning", equal_rewards),
    Rule("entropy", "no-exploration", "warning", silent),
    Rule("sampling/sampling_logp_difference/mean", "sampler-apart", "warning", sampler_apart),
    Rule("answer/letter_A_frac", "one-letter", "warning", one_letter),
)
RULES_OF_THE_END = (  # these rules judge a run when it ends
    Rule("frac_reward_zero_std", "equal-rewards", "warning", never_a_gradient),
    Rule("train/loss", "no-finite-loss", "critical", no_finite_loss),
    Rule("train/loss", "worse-than-guessing", "critical", worse_than_guessing),
)
