"""The curves of a ``metrics.jsonl``, as arrays: a number takes 8 bytes here and not 60, and a log may hold millions of them."""

from __future__ import annotations

import math
import os
import random
import re
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from osler.records.jsonl import MetricsLine, read_lines
from osler.records.values import as_number

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


@dataclass
class Curves:
    """What a log holds: a curve for each metric, tokens seen, unix seconds; and how many lines before the last are unreadable."""

    metrics: dict[str, Series] = field(default_factory=dict)
    tokens: Series = field(default_factory=Series)
    clock: Series = field(default_factory=Series)
    unreadable: int = 0


def read_curves(path: Path) -> Curves:
    """Return the curves of a ``metrics.jsonl``; of a step that was logged twice the later line counts.

    There are none when there is no file; raises UserError when it cannot be read.
    """
    steps, tokens, clock = array("q"), array("d"), array("d")
    values: dict[str, array[float]] = {}
    places: dict[str, array[int]] = {}  # the numbers of the lines that have a metric
    unreadable, is_torn = 0, False
    for raw in read_lines(path):
        unreadable += is_torn
        line = MetricsLine.parse(raw)
        is_torn = line is None and bool(raw.strip())
        if line is None:
            continue
        for name, value in line.values.items():
            if name not in values:
                values[name], places[name] = array("d"), array("I")
            values[name].append(value)
            places[name].append(len(steps))
        steps.append(line.step)
        tokens.append(line.tokens)
        clock.append(line.time)
    at = np.frombuffer(steps, np.int64)
    curves: dict[str, Series] = {}
    own, before = np.array([], np.int64), np.array([], np.uintc)
    for name in list(values):
        lines = np.frombuffer(places.pop(name), np.uintc)
        own = own if np.array_equal(before, lines) else at[lines]  # curves of the same lines share their steps
        curves[name], before = _in_order(own, np.frombuffer(values.pop(name), np.float64)), lines
    seen, clock_ = (_in_order(at, np.frombuffer(column, np.float64)) for column in (tokens, clock))
    return Curves(curves, seen, clock_, unreadable)


def _in_order(steps: npt.NDArray[np.int64], values: Floats) -> Series:
    """Return a curve in step order, each step once."""
    if (steps[1:] > steps[:-1]).all():
        return Series(steps, values)
    order = np.argsort(steps, kind="stable")
    steps = steps[order]
    is_last = np.append(steps[1:] != steps[:-1], True)
    return Series(steps[is_last], values[order[is_last]])


CHUNK_BYTES = 1 << 18  # read at a time; the last chunk is parsed in full
SAMPLED_LINES = 3000
MAX_POINTS = 4096  # of a curve; then every other one goes
MARK_BYTES = 64  # of the end of what was read: the same bytes at the same place are the same file
RECENT_LINES = 50
PAUSE_SECONDS, PAUSE_GAPS = 60.0, 30  # a gap longer than this and than so many mean ones: stopped, or the machine slept
EVALUATION = b'"eval/'
TIME = re.compile(rb'"time": ?([0-9.]+)')


class Moment(NamedTuple):
    """When a line was written."""

    step: int
    tokens: float
    time: float


class Follower:
    """The curves of a log so far, and its clock; `poll` brings them up to date."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = 0
        self.idle: list[tuple[float, float]] = []  # from the end of a process to the start of the next
        self._start_over()

    def _start_over(self) -> None:
        self.curves: dict[str, list[tuple[int, float]]] = {}  # name -> (step, value), NaN where it was not finite
        self.recent: deque[Moment] = deque(maxlen=RECENT_LINES)  # lines since the last pause, or since the run went back
        self.active_seconds = 0.0  # between the first and the newest line, pauses left out
        self.lines = 0
        self.position = 0
        self._newest_time = math.nan
        self._pause_ended = -math.inf
        self._gaps = 0
        self._mark = b""
        self._random = random.Random(0)

    @property
    def last(self) -> Moment | None:
        """The newest line's moment."""
        return self.recent[-1] if self.recent else None

    @property
    def usual_gap(self) -> float:
        """The median of the seconds between two recent lines; 0 when too few are known."""
        gaps = [b.time - a.time for a, b in pairwise(self.recent) if b.time > a.time]
        return median(gaps) if gaps else 0.0

    def poll(self) -> bool:
        """Read what is new, and return whether anything changed."""
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                is_new = not self._is_same(file, size)
                if is_new:
                    self._start_over()
                return self._read(file, size) or is_new
        except OSError:  # not there yet, or gone
            changed = self.position > 0
            if changed:
                self._start_over()
            return changed

    def _is_same(self, file: BinaryIO, size: int) -> bool:
        if size < self.position:
            return False
        file.seek(self.position - len(self._mark))
        return file.read(len(self._mark)) == self._mark

    def _read(self, file: BinaryIO, size: int) -> bool:
        """Take in all whole lines from the position on."""
        began, share = self.position, 1.0
        while self.position < size:
            file.seek(self.position)
            chunk = file.read(CHUNK_BYTES)
            self.bytes_read += len(chunk)
            end = chunk.rfind(b"\n") + 1
            if not end:  # torn, or longer than a chunk
                chunk += file.readline()
                end = len(chunk) if chunk.endswith(b"\n") else 0
                if not end:
                    break
            lines = chunk[: end - 1].split(b"\n")
            is_end = self.position + len(chunk) >= size
            if self.position == began:
                share = min(1.0, SAMPLED_LINES * end / len(lines) / (size - began))
            self._count_time(chunk[:end])
            for line in lines:
                if is_end or share == 1.0 or EVALUATION in line or self._random.random() < share:
                    self._take(line)
            self.lines += len(lines)
            self.position += end
            self._mark = chunk[max(0, end - MARK_BYTES) : end]
        return self.position > began

    def _count_time(self, chunk: bytes) -> None:
        """Add up the time between lines without that of pauses: those that are known, and gaps far longer than the usual."""
        for now in (as_number(found.decode()) for found in TIME.findall(chunk)):
            gap = now - self._newest_time
            for since, until in self.idle:
                if self._newest_time < until <= now:
                    gap -= until - max(self._newest_time, since)
                    self._newest_time = self._pause_ended = until
            if self._gaps >= 5 and gap > max(PAUSE_SECONDS, PAUSE_GAPS * self.active_seconds / self._gaps):
                self._pause_ended = now
            elif gap > 0:
                self.active_seconds += gap
                self._gaps += 1
            self._newest_time = now if math.isfinite(now) else self._newest_time

    def _take(self, raw: bytes) -> None:
        line = MetricsLine.parse(raw)
        if line is None:
            return
        if self.recent and (line.step < self.recent[-1].step or self.recent[-1].time < self._pause_ended <= line.time):
            self.recent.clear()  # neither a pause nor going back to a checkpoint says how fast the run is
        self.recent.append(Moment(line.step, line.tokens, line.time))
        for name, value in line.values.items():
            curve = self.curves.setdefault(name, [])
            while curve and curve[-1][0] >= line.step:  # of a step that was made twice the later line counts
                curve.pop()
            curve.append((line.step, value))
            if len(curve) > MAX_POINTS:
                del curve[1:-1:2]
