"""A run's numbers so far, as the alert rules need them: the last values of each metric, and sums over all losses. Torch-free."""

import math
from array import array
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from statistics import median

STEP_TIMES = ("perf/data_ms", "perf/forward_ms", "perf/backward_ms", "perf/optimizer_ms")
KEPT = 480  # values that are kept of one metric
FIRST = 5  # first values of one metric, which say how a run began
CALM = 10  # values that it takes to know what is usual


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The settings of a run that the alert rules need for their findings and their advice."""

    section: str = ""  # prefix of these settings' keys if they are in a section of a recipe, such as ``pretrain.``
    lr: float
    clip_norm: float
    warmup_tokens: int = 0
    vocab_size: int = 0  # 0: the loss is not a cross-entropy over the vocabulary
    is_frozen: bool = False  # whether the weights that the loss depends on stay as they are
    loader_workers: int = 0
    max_new_tokens: int = 0  # 0: the run is not GRPO
    zero_reward_patience: int = 5  # lines without a reward that raise an alert

    @property
    def slower(self) -> str:
        """A smaller learning rate as an override, beside the present one."""
        return self.at_lr(self.lr / 3)

    @property
    def go_back(self) -> str:
        """The advice against damage by a learning rate that is too high."""
        return f"go back to a checkpoint from before and try {self.slower}"

    def at_lr(self, lr: float) -> str:
        """Return a learning rate as an override, beside the present one."""
        return f"{self.section}optim.lr={lr:.2g} (now {self.lr:.2g})"


class History:
    """The lines so far; ``add`` takes in the next line."""

    def __init__(self, settings: RunSettings) -> None:
        self.settings = settings
        self.lines = self.step = 0
        self.tokens = 0.0
        self.line: dict[str, float] = {}  # the newest line, without values that are not finite
        self.has_loss = False  # whether the newest line has a loss, finite or not
        self.loss: float | None = None  # the loss of the newest line that has one; NaN when it was not finite
        self.peak_lr = 0.0
        self.had_gradient = False  # GRPO: whether the rewards of some group differed
        self.without_reward = 0  # lines in a row that had no reward
        self.first: defaultdict[str, list[float]] = defaultdict(list)  # the first values of each metric
        self._begin_stage()

    def _begin_stage(self) -> None:
        """Forget the past, because a new row length or batch size changes what is usual."""
        self.values: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))
        self.waits: deque[tuple[float, float]] = deque(maxlen=CALM)  # the wait for data in each line: share of a step, seconds
        self.calmest = math.inf  # lowest gradient norm after the warm-up, smoothed
        self.best_loss = math.inf  # lowest loss, smoothed
        self.lowest_held_out = (math.inf, 0)  # the lowest held-out loss, and its step
        self.loss_sums, self.jump_sums = array("d", [0.0]), array("d", [0.0])  # running sums of losses, and of their jumps
        self.forget_speed()

    def forget_speed(self) -> None:
        """Forget the usual speed: another process may have other devices, or more of them."""
        self.values["perf/tokens_per_second"].clear()
        self.best_speed, self.slow_seconds = 0.0, 0.0  # the best smoothed speed; seconds of the slow lines in a row

    def add(self, step: int, tokens: float, metrics: Mapping[str, float]) -> None:
        """Add a line of metrics; values that are not finite are left out."""
        line = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        if "train/stage" in line and self.last("train/stage", 1) not in ([], [line["train/stage"]]):
            self._begin_stage()
        new_steps, new_tokens = step - self.step, tokens - self.tokens
        self.line, self.step, self.tokens, self.lines = line, step, tokens, self.lines + 1
        for name, value in line.items():
            self.values[name].append(value)
            if len(self.first[name]) < FIRST:
                self.first[name].append(value)
        self.peak_lr = max(self.peak_lr, line.get("train/lr", 0.0))
        self.has_loss = "train/loss" in metrics
        if self.has_loss:
            self.loss = line.get("train/loss", math.nan)
        if "train/loss" in line:
            loss, before = line["train/loss"], self.last("train/loss", 2)[0]
            self.jump_sums.append(self.jump_sums[-1] + abs(loss - before))
            self.loss_sums.append(self.loss_sums[-1] + loss)
            self.best_loss = min(self.best_loss, self.median("train/loss", 5))
        if "eval/loss" in line:
            self.lowest_held_out = min(self.lowest_held_out, (line["eval/loss"], step))
        self._add_gradient()
        if "perf/data_ms" in line:
            total = sum(line.get(name, 0.0) for name in STEP_TIMES)
            self.waits.append((line["perf/data_ms"] / (total or 1.0), line["perf/data_ms"] / 1000 * new_steps))
        if "reward" in line:
            # No completion earned a reward. The mean alone could hide a few rewards among penalties.
            nothing = line["reward"] <= 0.0 and 0.0 in (line.get("reward_std", 0.0), line.get("answer/correct_frac", 0.0))
            self.without_reward = self.without_reward + 1 if nothing else 0
        if (speed := line.get("perf/tokens_per_second", 0.0)) > 0.0:
            is_slow = speed < 0.5 * self.best_speed
            self.slow_seconds = self.slow_seconds + new_tokens / speed if is_slow else 0.0
            self.best_speed = max(self.best_speed, self.median("perf/tokens_per_second", 5))

    def _add_gradient(self) -> None:
        equal = self.line.get("frac_reward_zero_std")
        self.had_gradient = self.had_gradient or (equal is not None and equal < 1.0)
        if equal == 1.0 and "train/grad_norm" in self.line:
            self.values["train/grad_norm"][-1] = 0.0  # the pull of GRPO's KL term alone says nothing of other steps
        norms = [norm for norm in self.last("train/grad_norm", CALM) if norm > 0.0]
        if self.tokens > self.settings.warmup_tokens and len(norms) == CALM:
            self.calmest = min(self.calmest, median(norms))

    def median(self, name: str, count: int) -> float:
        """Return the median of a metric's last ``count`` values. With fewer values it is NaN, which exceeds no limit."""
        values = self.last(name, count)
        return median(values) if len(values) == count else math.nan

    def has(self, metric: str) -> bool:
        """Whether the newest line has a metric. A name that ends with a slash stands for every metric that begins with it."""
        return metric in self.line or (metric.endswith("/") and any(name.startswith(metric) for name in self.line))

    def last(self, name: str, count: int) -> list[float]:
        """Return the last values of a metric, the newest last."""
        return list(islice(reversed(self.values[name]), count))[::-1]
