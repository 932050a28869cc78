"""Follows a `metrics.jsonl` while a run writes it: each poll reads what was appended and nothing else.

A long file is read once in full and parsed in part: its end, all evaluations, and a random sample of the rest, because lines at
an even distance could all miss those that come at a rhythm of their own. A torn last line waits for its rest. A file that is
gone, was cut short, or was written anew by a resume is read from the start; its last bytes that were read tell.
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
