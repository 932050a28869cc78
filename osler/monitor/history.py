"""A run's numbers so far, as the rules need them: the last values of each metric, and sums over all losses. Torch-free."""

from __future__ import annotations

import math
from array import array
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from statistics import median
from string import ascii_uppercase

# The metrics that the rules read, by their names in METRICS.
LOSS = "train/loss"
HELD_OUT = "eval/loss"
LR = "train/lr"
GRAD_NORM = "train/grad_norm"
CLIPPED = "grad/clipped_frac"
STAGE = "train/stage"
DATA_TIME = "perf/data_ms"
SPEED = "perf/tokens_per_second"  # GRPO has none: how fast it samples depends on how long the answers are
OTHER_CPUS = "perf/other_cpus"
STEP_TIMES = (DATA_TIME, "perf/forward_ms", "perf/backward_ms", "perf/optimizer_ms")
MEMORY = ("perf/memory_resident_bytes", "perf/memory_allocated_bytes")
DEAD_UNITS = "model/dead_units_frac/"  # and the number of the layer
LAYER_NORM = "grad/norm/"  # and the number of the layer, or what else it is
REWARD, REWARD_SPREAD, CORRECT = "reward", "reward_std", "answer/correct_frac"
ALL_EQUAL = "frac_reward_zero_std"
ENTROPY = "entropy"
LOGP_DIFFERENCE = "sampling/sampling_logp_difference/mean"
LETTERS = tuple(f"answer/letter_{letter}_frac" for letter in ascii_uppercase)
CUT = "completions/clipped_ratio"
EPOCH = "data/epoch"
UNLEARNED = "train/unlearned_steps"

JUDGED = frozenset(  # by their last values
    (STAGE, LR, GRAD_NORM, CLIPPED, SPEED, *MEMORY, HELD_OUT, ALL_EQUAL, ENTROPY, LOGP_DIFFERENCE, *LETTERS)
)
KEPT = 480  # values of one metric
FIRST = 5  # lines that say how a run began
SMOOTHED_NORMS, SMOOTHED_LOSSES, SMOOTHED_SPEEDS = 10, 5, 5  # lines in a median
SLOW = 0.5  # of the best speed: below it a line is slow


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What the rules must know of a run's configuration, to judge and to advise."""

    section: str = ""  # begins the keys of these settings where they are a section of a recipe, as ``pretrain.``
    lr: float
    clip_norm: float
    warmup_tokens: int = 0
    vocab_size: int = 0  # 0: the loss is not a cross-entropy over the vocabulary
    loader_workers: int = 0
    max_new_tokens: int = 0
    zero_reward_patience: int = 5  # lines without a reward

    @property
    def slower(self) -> str:
        """Return a smaller learning rate, as an override and in words."""
        return self._rate(self.lr / 3)

    @property
    def faster(self) -> str:
        """Return a larger learning rate, as an override and in words."""
        return self._rate(10 * self.lr)

    def _rate(self, lr: float) -> str:
        return f"{self.section}optim.lr={lr:.2g} (now {self.lr:.2g})"


class History:
    """The lines so far, of which ``add`` takes in the next."""

    def __init__(self, settings: RunSettings) -> None:
        self.settings = settings
        self.lines = self.step = 0
        self.tokens = 0.0
        self.line: dict[str, float] = {}  # the newest, without what is not finite
        self.has_loss = False  # whether the newest line has a loss, finite or not
        self.loss: float | None = None  # of the newest line with one; NaN when it was not finite
        self.peak_lr = 0.0
        self.had_gradient = False  # in GRPO: some group was not rewarded equally
        self.without_reward = 0  # lines in a row
        self.first: dict[str, list[float]] = {CUT: [], REWARD: [], ENTROPY: []}  # of the first lines
        self._begin_stage()

    def _begin_stage(self) -> None:
        """Forget the past, because another length of rows or size of batch changes what is usual."""
        self.values: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))
        self.waited_seconds: deque[float] = deque(maxlen=KEPT)  # of each line, for data
        self.memory_steps: deque[int] = deque(maxlen=KEPT)  # of the values of MEMORY
        self.calmest = math.inf  # lowest gradient norm after the warm-up, smoothed
        self.best_loss = math.inf  # smoothed
        self.lowest_held_out = (math.inf, 0)  # and its step
        self.best_speed, self.slow_seconds = 0.0, 0.0  # smoothed; of the slow lines since the last one that was not
        self.loss_sums, self.jump_sums = array("d", [0.0]), array("d", [0.0])  # running sums: of losses, of their differences

    def add(self, step: int, tokens: float, metrics: Mapping[str, float]) -> None:
        """Take in a line; a value that is not finite is no value."""
        line = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        if STAGE in line and self.last(STAGE, 1) not in ([], [line[STAGE]]):
            self._begin_stage()
        new_steps, new_tokens = step - self.step, tokens - self.tokens
        self.line, self.step, self.tokens, self.lines = line, step, tokens, self.lines + 1
        for name in line:
            if name in JUDGED:
                self.values[name].append(line[name])
        if HELD_OUT in line:
            self.lowest_held_out = min(self.lowest_held_out, (line[HELD_OUT], step))
        self.had_gradient = self.had_gradient or line.get(ALL_EQUAL, 1.0) < 1.0
        if GRAD_NORM in line and line.get(ALL_EQUAL) == 1.0:  # the pull of GRPO's KL term alone says nothing of other steps
            self.values[GRAD_NORM][-1] = 0.0
        if any(name in line for name in MEMORY):
            self.memory_steps.append(step)
        self.peak_lr = max(self.peak_lr, line.get(LR, 0.0))
        if DATA_TIME in line:
            total = sum(line.get(name, 0.0) for name in STEP_TIMES)
            self.values[DATA_TIME].append(line[DATA_TIME] / (total or 1.0))
            self.waited_seconds.append(line[DATA_TIME] / 1000 * new_steps)
        self.has_loss = LOSS in metrics
        if self.has_loss:
            self.loss = line.get(LOSS, math.nan)
        if LOSS in line:
            self._add_loss(line[LOSS])
        norms = [norm for norm in self.last(GRAD_NORM, SMOOTHED_NORMS) if norm > 0.0]
        if tokens > self.settings.warmup_tokens and len(norms) == SMOOTHED_NORMS:
            self.calmest = min(self.calmest, median(norms))
        for name, values in self.first.items():
            if name in line and len(values) < FIRST:
                values.append(line[name])
        if REWARD in line:
            # No completion earned one; the mean alone could hide a few rewards among penalties.
            nothing = line[REWARD] <= 0.0 and 0.0 in (line.get(REWARD_SPREAD, 0.0), line.get(CORRECT, 0.0))
            self.without_reward = self.without_reward + 1 if nothing else 0

        if line.get(SPEED, 0.0) > 0.0:
            self._add_speed(line[SPEED], new_tokens / line[SPEED])

    def _add_speed(self, speed: float, seconds: float) -> None:
        self.slow_seconds = self.slow_seconds + seconds if speed < SLOW * self.best_speed else 0.0
        if len(self.values[SPEED]) >= SMOOTHED_SPEEDS:
            self.best_speed = max(self.best_speed, median(self.last(SPEED, SMOOTHED_SPEEDS)))

    def forget_speed(self) -> None:
        """Forget what speed is usual: another process may have other devices, or more of them."""
        self.values[SPEED].clear()
        self.best_speed, self.slow_seconds = 0.0, 0.0

    def _add_loss(self, loss: float) -> None:
        losses = self.values[LOSS]
        self.jump_sums.append(self.jump_sums[-1] + (abs(loss - losses[-1]) if losses else 0.0))
        self.loss_sums.append(self.loss_sums[-1] + loss)
        losses.append(loss)
        if len(losses) >= SMOOTHED_LOSSES:
            self.best_loss = min(self.best_loss, median(self.last(LOSS, SMOOTHED_LOSSES)))

    def has(self, metric: str) -> bool:
        """Whether the newest line has a metric, or one that begins with its name where that ends with a slash."""
        return metric in self.line or (metric.endswith("/") and any(name.startswith(metric) for name in self.line))

    def last(self, name: str, count: int) -> list[float]:
        """Return the last values of a metric, the newest last; those of ``DATA_TIME`` are shares of a step."""
        return list(islice(reversed(self.values[name]), count))[::-1]
