"""A loss that jumps: how far a value lies above the ones before it, in robust standard deviations.

The idea: the median and the median absolute deviation of the last losses say what is usual, and neither is moved by a few wild
values (Iglewicz and Hoaglin 1993, How to Detect and Handle Outliers). A value that is not finite is no evidence of what is usual,
and a spike is none either: neither enters the window, so nothing can make the next spike look normal. A loss that stays up is a
new level and no spike: after half a window of spikes in a row the window begins anew with them. Resume is exact: ``state`` is the
whole memory.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from osler.monitor.config import SpikeConfig

NORMAL_SPREAD = 1.4826  # standard deviations in a median absolute deviation, were the values normal
LEAST_SPREAD = 0.01  # nats: the spread of a loss that stands still is rounding, and no measure of anything


class Spike(NamedTuple):
    """A value too far above the usual ones: by how many standard deviations, above what, and the how many-th in a row."""

    deviations: float
    median: float
    in_a_row: int


class SpikeWindow:
    """The last usual losses; ``observe`` judges each new one by them."""

    def __init__(self, config: SpikeConfig) -> None:
        self.threshold = config.threshold
        self.usual: deque[float] = deque(maxlen=config.window_steps)
        self.spikes: list[float] = []  # in a row, up to now

    def observe(self, loss: float) -> Spike | None:
        """Judge a loss and remember it; None when it is usual, not finite, or when half a window has not been seen yet."""
        if not math.isfinite(loss):
            return None
        patience = -(-(self.usual.maxlen or 1) // 2)
        if len(self.usual) >= patience:
            deviations, median = robust_z(loss, self.usual)
            if deviations > self.threshold:
                self.spikes.append(loss)
                spike = Spike(deviations, median, len(self.spikes))
                if len(self.spikes) >= patience:
                    self.restore({"usual": self.spikes, "spikes": []})
                return spike
        self.spikes.clear()
        self.usual.append(loss)
        return None

    def state(self) -> dict[str, list[float]]:
        """The memory, as JSON."""
        return {"usual": list(self.usual), "spikes": list(self.spikes)}

    def restore(self, state: dict[str, list[float]]) -> None:
        """Go on from what ``state`` gave."""
        self.usual = deque(state["usual"], self.usual.maxlen)
        self.spikes = list(state["spikes"])


def robust_z(value: float, usual: Sequence[float] | deque[float]) -> tuple[float, float]:
    """How many standard deviations a value lies above the median of the others, estimated by medians; and that median."""
    median = statistics.median(usual)
    spread = NORMAL_SPREAD * statistics.median(abs(other - median) for other in usual)
    return (value - median) / max(spread, LEAST_SPREAD), median
