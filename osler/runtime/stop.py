"""Ctrl-C and SIGTERM as a request: the loop finishes its step, saves, and leaves; a second signal leaves at once."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

from osler.runtime.log import say

EXIT_STOPPED = 130  # a run that was asked to stop and saved; the same command goes on from there


class StopFlag:
    """While entered, the first SIGINT or SIGTERM sets ``requested``; the second raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopFlag:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        say(f"{signal.Signals(number).name}: finishing this step and saving; once more to leave at once.")
