"""Ctrl-C and SIGTERM as a request: the loop finishes its step, saves, and leaves; a second signal leaves at once.

One request often comes twice: a terminal and a service manager signal a whole group of processes, and a launcher among them
(``torchrun``, ``timeout``) passes on what it got. What follows the first signal closely is therefore the same request.
"""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType

from osler.runtime.log import say

EXIT_STOPPED = 130  # a run that was asked to stop and saved; the same command goes on from there
SAME_REQUEST_SECONDS = 0.5


_entered: list[StopFlag] = []


class AskedToStop(Exception):
    """Raised, on every rank, by an evaluation that was left undone; what it had by then is no result."""


def asked() -> bool:
    """Whether this process was asked to stop and a StopFlag has heard it: signals are the whole process's, and so is this."""
    return any(flag.requested for flag in _entered)


class StopFlag:
    """While entered, the first SIGINT or SIGTERM sets ``requested``; a second one, half a second later, raises KeyboardInterrupt.

    The trainers set ``requested`` too, when another rank was asked: a first signal to this process is no second one then.
    """

    def __init__(self) -> None:
        self.requested = False
        self._first_seconds: float | None = None  # time.monotonic() of the first signal to this process
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopFlag:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        _entered.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _entered.remove(self)
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first_seconds is None:
            self.requested, self._first_seconds = True, now
            say(f"{signal.Signals(number).name}: finishing this step and saving; once more to leave at once.")
        elif now - self._first_seconds > SAME_REQUEST_SECONDS:
            raise KeyboardInterrupt
