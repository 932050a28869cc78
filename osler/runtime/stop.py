"""Ctrl-C, SIGTERM and SIGHUP as a request: the loop finishes its step, saves, and leaves; a second signal leaves at once.

One request often comes twice: a terminal and a service manager signal a whole group of processes, and a launcher among them
(``torchrun``, ``timeout``) passes on what it got. What follows the first signal closely is therefore the same request, and so is
whatever arrives while the process leaves: it is deaf from then on, because an exception in its last moments only makes noise.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

logger = logging.getLogger(__name__)


EXIT_STOPPED = 130  # a run that was asked to stop and saved; the same command goes on from there
SAME_REQUEST_SECONDS = 0.5
REQUESTS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]  # Windows has no SIGHUP

_entered: list[StopFlag] = []
_leaving = False  # this process was asked to stop and ends
_interrupted = (0, 0.0)  # the signal that interrupted it last, and when by time.monotonic()


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: ends also what goes on after a Ctrl-C, as a chat does."""


class AskedToStop(Exception):
    """Raised, on every rank, by an evaluation that was left undone; what it had by then is no result."""


def asked() -> bool:
    """Whether this process was asked to stop and a StopFlag has heard it: signals are the whole process's, and so is this."""
    return any(flag.requested for flag in _entered)


def hear_requests() -> dict[int, object]:
    """From now on SIGTERM and SIGHUP interrupt the program as Ctrl-C does; where a StopFlag is entered, it hears all three.

    A signal that something else handles or ignores is left alone: ``nohup`` keeps its promise. Returns the handlers before.
    """
    global _leaving, _interrupted
    _leaving, _interrupted = False, (0, 0.0)
    if threading.current_thread() is not threading.main_thread():
        return {}
    standard = (signal.SIG_DFL, signal.default_int_handler)
    return _install(_interrupt, [number for number in REQUESTS if signal.getsignal(number) in standard])


@contextmanager
def interruptible() -> Iterator[None]:
    """``hear_requests`` inside, for a program that goes on afterwards."""
    before = hear_requests()
    try:
        yield
    finally:
        _restore(before)


def ignore_requests() -> None:
    """Make the process deaf to all requests, because it ends."""
    global _leaving
    _leaving = True


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _interrupted
    (last, when), now = _interrupted, time.monotonic()
    if _leaving or (number == last and now - when <= SAME_REQUEST_SECONDS):
        return
    _interrupted = (number, now)
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def _install(handler: Callable[[int, FrameType | None], None], numbers: list[signal.Signals]) -> dict[int, object]:
    """Set the handler of these signals and return those before."""
    return {number: signal.signal(number, handler) for number in numbers}


def _restore(handlers: dict[int, object]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)  # type: ignore[arg-type]


class StopFlag:
    """While entered, the first signal that asks to stop sets ``requested``; one half a second later raises KeyboardInterrupt.

    The trainers set ``requested`` too, when another rank was asked: a first signal to this process is no second one then. A
    process that has left the flag after a request is about to end, and ``interruptible`` ignores what comes then.
    """

    def __init__(self) -> None:
        self.requested = False
        self._first_seconds: float | None = None  # time.monotonic() of the first signal to this process
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopFlag:
        ignored = hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        self._previous = _install(self._on_signal, REQUESTS[:2] if ignored else REQUESTS)
        _entered.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _entered.remove(self)
        if self.requested:
            ignore_requests()
        _restore(self._previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first_seconds is None:
            self.requested, self._first_seconds = True, now
            logger.info(f"{signal.Signals(number).name}: finishing this step and saving; once more to leave at once.")
        elif self in _entered and now - self._first_seconds > SAME_REQUEST_SECONDS:
            raise KeyboardInterrupt
