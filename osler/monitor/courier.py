"""Carries lines and alerts to a place outside the run, in a thread of its own: whatever happens there, no step waits for it.

The queue is bounded: when the place is slower than the run, lines are dropped and counted. An exception, or a call that does
not come back, is told once, and the place gets nothing more. The thread is a daemon: one that hangs does not keep the program
alive. Nothing here is resumed; a line that was dropped stands in ``metrics.jsonl``.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Protocol

from osler.monitor.alerts import Alert

logger = logging.getLogger(__name__)

QUEUE_LINES = 1000
HANG_SECONDS = 120.0  # a single call that takes longer does not come back
CLOSE_SECONDS = 8.0  # what the end of a run waits for a place


class Sink(Protocol):
    """A place for metrics and alerts. Every method may raise, and may take its time."""

    def write(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """Take the finite metrics of a step."""

    def alert(self, alert: Alert) -> None:
        """Take an alert."""

    def close(self) -> None:
        """Finish what was taken."""


class Courier:
    """Opens a sink in a background thread and hands on to it what it is given; no method raises or waits."""

    def __init__(self, name: str, open_sink: Callable[[], Sink], *, hang_seconds: float = HANG_SECONDS) -> None:
        self.name = name
        self.hang_seconds = hang_seconds
        self.dropped = 0
        self.gone = False
        self._ended = False
        self._todo: queue.SimpleQueue[Callable[[Sink], None] | None] = queue.SimpleQueue()
        self._failure = _Failure()
        self._busy_since: float | None = time.monotonic()
        self._thread = threading.Thread(target=self._work, args=(open_sink,), name=f"osler-{name}", daemon=True)
        self._thread.start()

    def write(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        self._give(lambda sink: sink.write(step, tokens, metrics))

    def alert(self, alert: Alert) -> None:
        self._give(lambda sink: sink.alert(alert))

    def end(self) -> None:
        """Say that nothing more comes; does not wait. Calling it twice is fine."""
        if self._ended or self._is_gone():
            return
        self._ended = True
        self._todo.put(None)

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Let the sink finish, for at most so many seconds, and say what did not arrive; closing twice is fine."""
        self.end()
        if self.gone:
            return
        self._thread.join(seconds)
        if not self._is_gone() and self._thread.is_alive():
            logger.info(
                f"{self.name} has not finished within {seconds:g} s; the run waits no longer. What it lacks is in metrics.jsonl."
            )
        elif self.dropped:
            logger.warning(f"{self.name} was too slow for {self.dropped} lines; they are only in metrics.jsonl.")
        self.gone = True

    def _give(self, work: Callable[[Sink], None]) -> None:
        if self._is_gone():
            return
        if self._todo.qsize() < QUEUE_LINES:
            self._todo.put(work)
        else:
            self.dropped += 1

    def _is_gone(self) -> bool:
        """Whether the sink is lost; says so when that is news."""
        since = self._busy_since
        if self.gone:
            return True
        if self._failure.error is not None:
            self._give_up(f"failed ({type(self._failure.error).__name__}: {self._failure.error})")
        elif since is not None and time.monotonic() - since > self.hang_seconds:
            self._give_up(f"has not answered for {self.hang_seconds:g} s")
        return self.gone

    def _give_up(self, what: str) -> None:
        self.gone = True
        logger.warning(f"{self.name} {what}. The run goes on without it.")

    def _work(self, open_sink: Callable[[], Sink]) -> None:
        with self._failure:
            sink = open_sink()
            while True:
                self._busy_since = None
                work = self._todo.get()
                self._busy_since = time.monotonic()
                if work is None or self.gone:
                    break
                work(sink)
            sink.close()


class _Failure:
    """Holds what ended the thread. All exceptions: a foreign library may raise anything, and must not end the run."""

    error: BaseException | None = None

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        self.error = error
        return True
