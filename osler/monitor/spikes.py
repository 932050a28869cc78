"""Spikes of the loss: how far a value is above the ones before it, in robust standard deviations.

The median and the median absolute deviation of the last losses say what is usual, because a few wild values move neither
(Iglewicz and Hoaglin 1993, How to Detect and Handle Outliers). Spikes do not enter the window, so that they cannot make the next
spike look usual. A loss that stays up is a new level: after half a window of spikes in a row, the window starts over with them.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from osler.monitor.config import SpikeConfig

NORMAL_SPREAD = 1.4826  # standard deviations in a median absolute deviation of normal values
LEAST_SPREAD = 0.01  # nats; without it, rounding would be a spike of a constant loss


class Spike(NamedTuple):
    """A value too far above the usual ones: how far in standard deviations, their median, and how many spikes in a row it is."""

    deviations: float
    median: float
    in_a_row: int


class SpikeWindow:
    """The last usual losses, to which ``observe`` compares each new one."""

    def __init__(self, config: SpikeConfig) -> None:
        self.threshold = config.threshold
        self.usual: deque[float] = deque(maxlen=config.window_steps)
        self.spikes: list[float] = []  # the values of the present series of spikes

    def observe(self, loss: float) -> Spike | None:
        """Take in a loss; return None when it is usual or not finite, or when less than half a window was seen before it."""
        if not math.isfinite(loss):
            return None
        patience = -(-(self.usual.maxlen or 1) // 2)
        deviations, median = robust_z(loss, self.usual) if len(self.usual) >= patience else (0.0, loss)
        if deviations <= self.threshold:
            self.spikes.clear()
            self.usual.append(loss)
            return None
        self.spikes.append(loss)
        spike = Spike(deviations, median, len(self.spikes))
        if len(self.spikes) >= patience:
            self.restore({"usual": self.spikes, "spikes": []})
        return spike

    def state(self) -> dict[str, list[float]]:
        """Return the window as JSON."""
        return {"usual": list(self.usual), "spikes": list(self.spikes)}

    def restore(self, state: dict[str, list[float]]) -> None:
        """Continue from what ``state`` returned."""
        self.usual = deque(state["usual"], self.usual.maxlen)
        self.spikes = list(state["spikes"])


def robust_z(value: float, usual: Sequence[float] | deque[float]) -> tuple[float, float]:
    """Return how far a value is above the median of others, in standard deviations estimated by medians, and that median."""
    median = statistics.median(usual)
    spread = NORMAL_SPREAD * statistics.median(abs(other - median) for other in usual)
    return (value - median) / max(spread, LEAST_SPREAD), median
