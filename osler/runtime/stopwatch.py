"""Where a step's time goes, without waiting for the device: on CUDA an event is left in the stream at every mark."""

from __future__ import annotations

import time
from collections import defaultdict

import torch


class Stopwatch:
    """Seconds by name. ``mark(name)`` ends the part of that name, which began at the mark before it (or at ``start``)."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.start()

    def start(self) -> None:
        """Let the next part begin now; what lies between is in no part."""
        self._last = self._now()

    def mark(self, name: str) -> None:
        """End a part."""
        now = self._now()
        if self._on_gpu:
            self._pending.append((name, self._last, now))
        else:
            self._seconds[name] += now - self._last
        self._last = now

    def read(self) -> dict[str, float]:
        """Seconds of each part since the last reading. The only wait for the device."""
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
