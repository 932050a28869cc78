"""The seconds of each part of a step, without waiting for the device: on CUDA every mark records an event in the stream."""

from __future__ import annotations

import time
from collections import defaultdict

import torch


class Stopwatch:
    """Adds up seconds by name: ``mark(name)`` ends a part that began at the previous mark, or at ``start``."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.start()

    def start(self) -> None:
        """Begin the next part now; the time since the last mark is not counted."""
        self._last = self._now()

    def mark(self, name: str) -> None:
        """End the part ``name`` and begin the next."""
        now = self._now()
        if self._on_gpu:
            self._pending.append((name, self._last, now))
        else:
            self._seconds[name] += now - self._last
        self._last = now

    def read(self) -> dict[str, float]:
        """Return the seconds of each part since the last call. Only this waits for the device."""
        if self._pending:
            self._pending[-1][2].synchronize()
            for name, begin, end in self._pending:
                self._seconds[name] += begin.elapsed_time(end) / 1000
            self._pending.clear()
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds

    def _now(self):  # type: ignore[no-untyped-def]  # float on a CPU, Event on CUDA: never mixed
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
