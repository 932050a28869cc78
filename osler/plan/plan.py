"""What a run will take on a device: time, memory, disk and money, each with its interval and where it comes from. Torch-free.

    plan_of(config, Where(find_device("h100"), gpus=8))

Everything follows from the config and from the assumptions in ``speed.py`` and ``memory.py``. A probe (``Measured``) replaces
assumptions by what a few real steps took. A plan says that a run fits only if the upper end of its memory estimate does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from osler.config.devices import Device
from osler.plan.estimate import Estimate, combined, exact, total
from osler.plan.speed import Pace

HOUR = 3600.0
PACED = ("training", "sampling", "learning")  # the parts of the time that grow with the tokens


@dataclass(frozen=True)
class Where:
    """The device that a plan is made for, how many of them, and the price of an hour of one (None: the table's)."""

    device: Device
    gpus: int = 1
    price: float | None = None

    @property
    def usd_per_hour(self) -> Estimate | None:
        """Price of an hour of all devices; None where it is not known."""
        if self.price is not None:
            return exact(self.price * self.gpus, "price given")
        if self.device.usd is None:
            return None
        low, high = (price * self.gpus for price in self.device.usd)
        return Estimate(low, (low + high) / 2, high, f"prices seen on {self.device.seen or 'an unknown day'}")


@dataclass(frozen=True)
class Measured:
    """What a probe measured here; None or absent keeps the assumption."""

    step_seconds: Mapping[int, Estimate] = field(default_factory=dict)  # seconds of a step, by the number of its stage (1, 2 ...)
    memory_bytes: Estimate | None = None  # peak of the process, as ``perf/memory_peak_bytes`` counts it
    start_seconds: Estimate | None = None  # time before the first step, and what that step takes beyond the others
    evaluation_seconds: Estimate | None = None  # time of one evaluation


@dataclass(frozen=True)
class Plan:
    """What a run will take."""

    name: str
    kind: str  # pretrain, sft or grpo
    where: Where
    parameters: int
    tokens: Estimate  # tokens that are learned; in GRPO those that are drawn
    steps: Estimate
    flops: Estimate
    pace: Pace
    time: Mapping[str, Estimate]  # seconds, by part
    seconds: Estimate  # of all parts; a clock (max_minutes) makes one part shorter where another is longer
    memory: Mapping[str, Estimate]  # bytes of one process, by part
    rows: int  # rows of a forward pass
    seq_len: int
    recompute: str
    most_rows: Mapping[str, int]  # the most rows of a forward pass that surely fit, by mode of recomputation
    disk: Mapping[str, Estimate]  # bytes, by part
    notes: tuple[str, ...] = ()  # warnings, each with its evidence
    not_planned: tuple[str, ...] = ()  # parts of the run that the plan leaves out

    @property
    def tokens_per_second(self) -> Estimate:
        """Tokens that are learned in a second of training."""
        return exact(self.tokens.value).over(self.pace.seconds(self.tokens.value), self.pace.stretches[0].seconds.source)

    @property
    def memory_bytes(self) -> Estimate:
        return total(self.memory.values())

    @property
    def disk_bytes(self) -> Estimate:
        return total(self.disk.values())

    @property
    def usd(self) -> Estimate | None:
        """What the run costs; None where the price is not known."""
        price = self.where.usd_per_hour
        if price is None:
            return None
        return combined(lambda usd, seconds: usd * seconds / HOUR, price, self.seconds)

    @property
    def fits(self) -> str:
        """Whether the memory suffices: yes, no, or unsure where it lies within the interval of the estimate."""
        limit = self.where.device.memory_bytes
        memory = self.memory_bytes
        return "yes" if memory.high <= limit else "no" if memory.low > limit else "unsure"

    def tokens_within(self, seconds: Estimate) -> Estimate:
        """Return how many tokens the run learns in this time, whatever its length."""
        paced = total(part for name, part in self.time.items() if name in PACED)
        beside = total(part for name, part in self.time.items() if name not in ("start", *PACED))
        share = paced.value / (paced.value + beside.value)  # the rest is evaluations
        start = self.time["start"]
        short, middle, long = (
            share * max(0.0, time - begun) for time, begun in zip(seconds.numbers, reversed(start.numbers), strict=True)
        )
        return self.pace.tokens(Estimate(short, middle, long))
