"""How fast a device trains: the share of its peak that it is assumed to reach, and the time of steps that follows. Torch-free.

FLOPs are counted by the PaLM convention (``flops_per_token`` in ``model/config.py``), so a share of the peak is an MFU. Nothing
was measured on a GPU yet: the shares are those that others publish, and a plan says so. ``--probe`` replaces them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from osler.config.devices import Device
from osler.plan.estimate import Estimate, combined, total

Mode = Literal["off", "selective", "full"]  # how much of the activations is computed again

MFU = Estimate(
    0.16, 0.40, 0.50,
    "assumed MFU 16 to 50 %: nanochat has 41 % (width 768) to 50 % (1536) on an H100, and 19,057 tokens/s, which were published "
    "for pure-medium-large on an A100, are 16 %; not measured by Osler on a GPU",
)  # fmt: skip
FULL_WIDTH = 768  # hidden_size from which on the shares hold; narrower models are assumed to fill a GPU in proportion less
EAGER_MFU = Estimate(0.08, 0.20, 0.35, "assumed MFU 8 to 35 % without torch.compile; not measured by Osler on a GPU")
CPU_SHARE = Estimate(
    0.5, 1.0, 1.4,
    "assumed: a share of the rate of matrix products that grows with the width, 37 % at hidden_size 128 and 75 % from 512 on, "
    "give or take a half; as on one Xeon with AMX (quickstart, bench_train.py)",
)  # fmt: skip
EAGER_CPU_SHARE = Estimate(0.15, 0.50, 1.10, "assumed 15 to 110 % of the rate of matrix products in fp32, uncompiled")
SEVERAL = Estimate(0.80, 0.93, 1.0, "assumed 80 to 100 % of several GPUs' speed on one machine")
# Time of a step that recomputes activations, over the time of one that does not (bench_recompute.py, on a CPU).
AGAIN = {"off": Estimate(1, 1, 1), "selective": Estimate(1.02, 1.09, 1.15), "full": Estimate(1.20, 1.27, 1.34)}
OPTIMIZER_BYTES = 28  # bytes for each parameter that an update of AdamW in fp32 reads and writes


@dataclass(frozen=True)
class Arithmetic:
    """What a run computes with: the precision that ``auto`` becomes, whether it compiles, and what it recomputes."""

    precision: str  # bf16, fp32, pure-bf16 or fp8
    compiled: bool
    recompute: Mode

    @property
    def width(self) -> int:
        """Bytes of one number of the activations."""
        return 4 if self.precision == "fp32" else 2


def flops_per_second(device: Device, arithmetic: Arithmetic, gpus: int, hidden_size: int) -> Estimate:
    """Return the training FLOP/s of all GPUs together; the FLOPs of recomputation do not count.

    Several processes on a CPU share its cores, so they have the speed of one.
    """
    on_cpu = device.kind == "cpu"
    gpus = 1 if on_cpu else gpus
    peak = gpus * (device.fp32_flops if arithmetic.precision == "fp32" else device.flops)
    share = (
        (CPU_SHARE.times(min(0.75, 0.25 + hidden_size / 1024)) if arithmetic.compiled else EAGER_CPU_SHARE)
        if on_cpu
        else (MFU if arithmetic.compiled else EAGER_MFU)
    )
    if not on_cpu and hidden_size < FULL_WIDTH:
        part = hidden_size / FULL_WIDTH
        why = f"{share.source}; at hidden_size {hidden_size} {part:.0%} of that, an assumption too"
        share = Estimate(part * share.low, part * share.value, share.high, why)
    rate = share.times(peak).over(AGAIN[arithmetic.recompute], f"{share.source}; peak {device.source}")
    if gpus > 1:
        rate = combined(lambda one, share: one * share, rate, SEVERAL, source=f"{rate.source}; {SEVERAL.source}")
    return rate


def step_seconds(flops: float, rate: Estimate, device: Device, parameters: int) -> Estimate:
    """Return the time of a step with this many FLOPs, its update included."""
    update = OPTIMIZER_BYTES * parameters / (device.bandwidth_gb * 1e9)
    computing = Estimate(flops / rate.high, flops / rate.value, flops / rate.low, rate.source)
    return total([computing, Estimate(update / 2, update, 2 * update, rate.source)])


@dataclass(frozen=True)
class Stretch:
    """Steps of one length: the token at which they begin, the tokens of a step, its time, and the FLOPs of a token."""

    first_token: int
    step_tokens: int
    seconds: Estimate
    token_flops: float


@dataclass(frozen=True)
class Pace:
    """The speed of a run, stretch by stretch; a stretch has steps of one length."""

    stretches: Sequence[Stretch]

    def _parts(self, tokens: float) -> list[tuple[Stretch, float]]:
        ends = [*(stretch.first_token for stretch in self.stretches[1:]), float("inf")]
        found = [(one, min(end, tokens) - one.first_token) for one, end in zip(self.stretches, ends, strict=True)]
        return [(one, count) for one, count in found if count > 0]

    def flops(self, tokens: float) -> float:
        """Return the FLOPs of the first ``tokens`` tokens."""
        return sum(count * one.token_flops for one, count in self._parts(tokens))

    def seconds(self, tokens: float) -> Estimate:
        """Return the time of the first ``tokens`` tokens."""
        return total(one.seconds.times(count / one.step_tokens) for one, count in self._parts(tokens))

    def tokens(self, seconds: Estimate) -> Estimate:
        """Return how many tokens are learned in a time: at the low end in the shortest time with the slowest steps."""
        low, value, high = (self._tokens(time, 2 - place) for place, time in enumerate(seconds.numbers))
        return Estimate(low, value, high, self.stretches[0].seconds.source)

    def _tokens(self, seconds: float, place: int) -> float:
        ends = [*(stretch.first_token for stretch in self.stretches[1:]), float("inf")]
        for one, end in zip(self.stretches, ends, strict=True):
            per_second = one.step_tokens / one.seconds.numbers[place]
            count = max(0.0, seconds) * per_second
            if one.first_token + count <= end:
                return one.first_token + count
            seconds -= (end - one.first_token) / per_second
        raise AssertionError("the last stretch has no end")
