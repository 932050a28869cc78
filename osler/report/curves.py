"""The curves of a ``metrics.jsonl`` as arrays, read as the file grows. A number takes 8 bytes here, and a log may hold millions.

Each poll reads what was appended and nothing else. A torn last line waits for its rest. A file that was cut short, or rewritten
by a resume, is read again from the start: the last bytes that were read are then no longer in their place.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from osler.records.jsonl import MetricsLine
from osler.runtime.errors import UserError

MARK_BYTES = 64  # bytes kept from the end of what was read: while they are in their place, the file is the same
PAUSE_SECONDS, PAUSE_GAPS = 60.0, 30  # a gap above this many seconds and this many times the usual gap is a pause

Floats = npt.NDArray[np.float64]


@dataclass
class Series:
    """One metric over steps, in step order; NaN where the run logged a value that was not finite."""

    steps: npt.NDArray[np.int64]
    values: Floats

    def __init__(self, steps: Sequence[int] | npt.NDArray[np.int64] = (), values: Sequence[float] | Floats = ()) -> None:
        self.steps, self.values = np.asarray(steps, np.int64), np.asarray(values, np.float64)

    def __len__(self) -> int:
        return len(self.steps)

    def finite(self) -> Series:
        """Return the points whose value is finite."""
        known = np.isfinite(self.values)
        return self if known.all() else Series(self.steps[known], self.values[known])

    def extended(self, steps: npt.NDArray[np.int64], values: Floats) -> Series:
        """Return the curve with points appended; when a step was logged twice, the later point counts."""
        if len(self):
            steps, values = np.concatenate([self.steps, steps]), np.concatenate([self.values, values])
        if not (steps[1:] > steps[:-1]).all():
            order = np.argsort(steps, kind="stable")
            kept = order[np.append(np.diff(steps[order]) > 0, True)]
            steps, values = steps[kept], values[kept]
        return Series(steps, values)


class MetricsLog:
    """A log's curves so far; ``poll`` brings them up to date."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start_over()

    def _start_over(self) -> None:
        self.curves: dict[str, Series] = {}
        self.tokens = Series()  # tokens seen
        self.times: Floats = np.array([])  # the time of every line that has one, in unix seconds, in the order of the file
        self.unreadable = 0  # unreadable lines so far
        self._position, self._mark = 0, b""  # bytes read, and the last ``MARK_BYTES`` of them

    def poll(self) -> None:
        """Read what is new; raises UserError when the file is there and cannot be read."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._position - len(self._mark))
                if file.read(len(self._mark)) != self._mark:
                    self._start_over()
                    file.seek(0)
                self._read(file)
        except FileNotFoundError:
            self._start_over()
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}.") from error

    def _read(self, lines: Iterable[bytes]) -> None:
        """Take in all whole lines."""
        steps, tokens, times = array("q"), array("d"), array("d")
        found: dict[str, tuple[array[int], array[float]]] = {}  # metric -> its steps and values
        for raw in lines:
            if not raw.endswith(b"\n"):  # torn
                break
            if line := MetricsLine.parse(raw):
                for name, value in line.values.items():
                    logged_steps, values = found.setdefault(name, (array("q"), array("d")))
                    logged_steps.append(line.step)
                    values.append(value)
                steps.append(line.step)
                tokens.append(line.tokens)
                times.append(line.time)
            elif raw.strip():
                self.unreadable += 1
            self._position += len(raw)
            self._mark = raw[-MARK_BYTES:]
        for name in list(found):
            self.curves[name] = self.curves.get(name, Series()).extended(*map(np.asarray, found.pop(name)))
        self.tokens = self.tokens.extended(np.asarray(steps), np.asarray(tokens))
        known = np.asarray(times)
        self.times = np.concatenate([self.times, known[np.isfinite(known)]])


def time_at_work(times: Floats) -> tuple[float, list[float]]:
    """Return the seconds from the first line to the last without pauses (NaN for fewer than two lines), and each pause's seconds.

    A pause is a gap far longer than the usual ones, which are known from five gaps on.
    """
    gaps = np.maximum(np.diff(times), 0.0)
    if not len(gaps):
        return math.nan, []
    longest = max(PAUSE_SECONDS, PAUSE_GAPS * float(np.median(gaps))) if len(gaps) >= 5 else math.inf
    return float(gaps[gaps <= longest].sum()), gaps[gaps > longest].tolist()
