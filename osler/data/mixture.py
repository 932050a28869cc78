"""Which source each row of a run comes from: weights that are honoured in every stretch of a run and not only on average.

Weights are rounded to thousandths, and the assignment of rows repeats after a period of at most a thousand rows. So any thousand
consecutive rows hold every source within 0.1 % of its weight, and any row is found at once. Within the period, rows are
dealt out by Tijdeman's algorithm for the chairman assignment problem (Discrete Mathematics 32, 1980), which keeps every count
within one row of its share. Rows of a stage are equally long, so shares of rows are shares of tokens, but for padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

PERIOD = 1000


class Mixture:
    """The source of each row, for weights relative to one another.

    Raises ValueError when all weights are 0, or when a source, which it names, would get no row of `PERIOD`.
    """

    def __init__(self, weights: Sequence[float], names: Sequence[str] = ()) -> None:
        shares = _whole_shares(weights, names)
        self.fractions = [share / sum(shares) for share in shares]
        self._sources = _assign(shares)
        self._before = [[0] * len(shares)]  # rows of each source before each row of a period, and at its end
        for source in self._sources:
            self._before.append([count + (number == source) for number, count in enumerate(self._before[-1])])

    def locate(self, row: int) -> tuple[int, int]:
        """Return the source of a row (0, 1, ...), and which of the rows of that source it is (0, 1, ...)."""
        period, place = divmod(row, len(self._sources))
        source = self._sources[place]
        return source, period * self._before[-1][source] + self._before[place][source]

    def rows(self, count: int) -> list[int]:
        """Return how many of the first `count` rows each source has."""
        period, place = divmod(count, len(self._sources))
        return [period * whole + part for whole, part in zip(self._before[-1], self._before[place], strict=True)]


def _whole_shares(weights: Sequence[float], names: Sequence[str]) -> list[int]:
    """Return weights as whole numbers without a common divisor; the largest remainders are rounded up."""
    if not 0 < sum(weights) < math.inf:
        raise ValueError(f"the weights are {', '.join(f'{weight:g}' for weight in weights)}; give at least one above 0")
    exact = [PERIOD * weight / sum(weights) for weight in weights]
    shares = [math.floor(share + 1e-9) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda source: shares[source] - exact[source])
    for source in by_remainder[: PERIOD - sum(shares)]:
        shares[source] += 1
    for number, (weight, share) in enumerate(zip(weights, shares, strict=True)):
        if weight and not share:
            whose = f"of {names[number]}, {weight:g}," if names else f"{weight:g}"
            raise ValueError(f"the weight {whose} is less than 1/{PERIOD} of the sum, so its source would never be read")
    return [share // math.gcd(*shares) for share in shares]


def _assign(shares: Sequence[int]) -> list[int]:
    """Return the sources of one period; with k sources no count is further from its share than 1 - 1 / (2k - 2) rows."""
    period, counts = sum(shares), [0] * len(shares)
    slack = max(1, 2 * len(shares) - 2)
    sources: list[int] = []
    for row in range(period):
        # A source may come if that puts its count ahead by the bound at most. Of these, the source that is due first comes.
        due = [
            ((counts[source] + 1) * period * slack - period, share, source)
            for source, share in enumerate(shares)
            if slack * (share * (row + 1) - counts[source] * period) >= period
        ]
        chosen = min(due, key=lambda entry: entry[0] / entry[1])[2]
        counts[chosen] += 1
        sources.append(chosen)
    return sources
