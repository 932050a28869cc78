"""Follows a `metrics.jsonl` while a run writes it: every look reads what was appended and nothing else.

A long file is read once in full and parsed in part: its end, all evaluations, and of the rest a random sample, because lines at
an even distance could all miss those that come at a rhythm of their own. A torn last line waits for its rest. A file that is not
there, that was cut short, or that a resume wrote anew begins again; the last bytes that were read tell.
"""

from __future__ import annotations

import math
import os
import random
import re
from collections import deque
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import BinaryIO, NamedTuple

from osler.records.metrics import MetricsLine
from osler.records.values import as_number

CHUNK_BYTES = 1 << 18  # read at a time; the last one is parsed in full
SAMPLED_LINES = 3000
MAX_POINTS = 4096  # of a curve; then every other one goes
MARK_BYTES = 64  # of the end of what was read: the same bytes at the same place are the same file
RECENT_LINES = 50
PAUSE_SECONDS, PAUSE_GAPS = 60.0, 30  # a gap longer than this and than so many usual ones: stopped, or the machine slept
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
        self._begin_again()

    def _begin_again(self) -> None:
        self.curves: dict[str, list[tuple[int, float]]] = {}  # name -> (step, value), NaN where it was not finite
        self.recent: deque[Moment] = deque(maxlen=RECENT_LINES)
        self.active_seconds = 0.0  # between the first and the newest line, pauses left out
        self.lines = 0
        self.position = 0
        self._counted_to = math.nan
        self._gaps = 0
        self._mark = b""
        self._random = random.Random(0)

    @property
    def last(self) -> Moment | None:
        """The newest line's moment."""
        return self.recent[-1] if self.recent else None

    @property
    def usual_gap(self) -> float:
        """Seconds between two lines, as a rule; 0 when too few are known."""
        gaps = [b.time - a.time for a, b in pairwise(self.recent) if b.time > a.time]
        return median(gaps) if gaps else 0.0

    def poll(self) -> bool:
        """Read what is new; whether anything changed."""
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                anew = not self._goes_on(file, size)
                if anew:
                    self._begin_again()
                return self._read(file, size) or anew
        except OSError:  # not there yet, or gone
            changed = self.position > 0
            if changed:
                self._begin_again()
            return changed

    def _goes_on(self, file: BinaryIO, size: int) -> bool:
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
            for line in lines:
                if is_end or share == 1.0 or EVALUATION in line or self._random.random() < share:
                    self._take(line)
            self._count_time(chunk[:end])
            self.lines += len(lines)
            self.position += end
            self._mark = chunk[max(0, end - MARK_BYTES) : end]
        return self.position > began

    def _take(self, raw: bytes) -> None:
        line = MetricsLine.parse(raw)
        if line is None:
            return
        moment = Moment(line.step, line.tokens, line.time)
        if self.recent:
            before = self.recent[-1]
            gap = moment.time - before.time
            paused = gap > PAUSE_SECONDS and gap > PAUSE_GAPS * self.usual_gap > 0
            paused = paused or any(before.time < until <= moment.time for _, until in self.idle)
            if paused or moment.step < before.step:  # went back to a checkpoint: neither says how fast it is now
                self.recent.clear()
        self.recent.append(moment)
        for name, value in line.values.items():
            curve = self.curves.setdefault(name, [])
            while curve and curve[-1][0] >= moment.step:  # a step made twice counts once, the later line wins
                curve.pop()
            curve.append((moment.step, value))
            if len(curve) > MAX_POINTS:
                del curve[1:-1:2]

    def _count_time(self, chunk: bytes) -> None:
        """Add up the time between lines, but not that of a pause: one that is known, or a gap far longer than the usual."""
        for found in TIME.findall(chunk):
            now = as_number(found.decode())
            before = self._counted_to
            gap = now - before
            for since, until in self.idle:
                if before < until <= now:
                    gap -= until - max(before, since)
                    before = until
            is_pause = self._gaps >= 5 and gap > max(PAUSE_SECONDS, PAUSE_GAPS * self.active_seconds / self._gaps)
            if gap > 0 and not is_pause:
                self.active_seconds += gap
                self._gaps += 1
            self._counted_to = now if math.isfinite(now) else self._counted_to
