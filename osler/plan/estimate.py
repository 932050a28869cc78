"""A number with its interval and a sentence that says where it comes from, and sums and products of them. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

COMPUTED = "computed from the config"


@dataclass(frozen=True)
class Estimate:
    """A number, the interval that it is expected in, and where it comes from."""

    low: float
    value: float
    high: float
    source: str = COMPUTED

    @property
    def numbers(self) -> tuple[float, float, float]:
        """The low end, the number and the high end."""
        return self.low, self.value, self.high

    def through(self, function: Callable[[float], float], source: str = "") -> Estimate:
        """Return the estimate of a function of the number; the function may rise or fall with the number."""
        return spanning([*map(function, self.numbers)], source or self.source)

    def times(self, factor: float) -> Estimate:
        """Return the estimate of a multiple."""
        return self.through(lambda number: number * factor)

    def over(self, other: Estimate, source: str = "") -> Estimate:
        """Return the estimate of a quotient of two positive numbers."""
        return Estimate(self.low / other.high, self.value / other.value, self.high / other.low, source or other.source)

    def at_most(self, limit: float) -> Estimate:
        return self.through(lambda number: min(number, limit))


def exact(number: float, source: str = COMPUTED) -> Estimate:
    """Return a number that is known."""
    return Estimate(number, number, number, source)


def spanning(cases: Sequence[float], source: str = COMPUTED) -> Estimate:
    """Return the estimate of a number in three cases, of which the second is the expected one."""
    return Estimate(min(cases), cases[1], max(cases), source)


def combined(function: Callable[..., float], *estimates: Estimate, source: str = "") -> Estimate:
    """Return the estimate of a function that rises with each of the numbers."""
    low, value, high = (function(*numbers) for numbers in zip(*(one.numbers for one in estimates), strict=True))
    return Estimate(low, value, high, source or estimates[0].source)


def total(estimates: Iterable[Estimate]) -> Estimate:
    """Return the estimate of a sum. All of its parts may be off in the same direction."""
    parts = list(estimates)
    low, value, high = (sum(part.numbers[place] for part in parts) for place in range(3))
    return Estimate(low, value, high, "; ".join(dict.fromkeys(part.source for part in parts)))
