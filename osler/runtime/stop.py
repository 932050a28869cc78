"""Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP ask a run to stop: it finishes its step, saves, and ends; a second signal ends it at once.

Slurm sends SIGUSR1 before the time is up: ``--signal=USR1@90``. One request often arrives twice, because terminals and service
managers signal a whole group of processes and a launcher in it (``torchrun``, ``timeout``) passes the signal on. So a signal
shortly after the first is the same request. A process that is about to end ignores all signals, because an exception would only
make noise.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

EXIT_STOPPED = 130  # a run that was asked to stop and saved; the same command resumes it
SAME_REQUEST_SECONDS = 0.5
REQUESTS = [  # SIGHUP last, so that it can be left out; Windows has only the first two
    signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)
]

_entered: list[StopFlag] = []  # flags whose context is entered now
_ending = False  # whether this process was asked to stop, and is about to end
_last_interrupt = (0, 0.0)  # the number of the last signal that interrupted this process, and its time.monotonic()


class Terminated(KeyboardInterrupt):
    """SIGTERM, SIGUSR1 or SIGHUP came. They also end what survives a Ctrl-C, such as a chat."""


class AskedToStop(Exception):
    """The run was asked to stop, so an evaluation or a wait for data ended early on every rank, without a result."""


def asked() -> bool:
    """Return whether this process was asked to stop while a ``StopFlag`` was entered."""
    return any(flag.requested for flag in _entered)


def hear_requests() -> dict[int, Any]:
    """Let SIGTERM, SIGUSR1 and SIGHUP interrupt the program as Ctrl-C does, and return the earlier handlers.

    An entered ``StopFlag`` handles all of them instead. Signals that have a handler or are ignored stay so, as under ``nohup``.
    """
    global _ending, _last_interrupt
    _ending, _last_interrupt = False, (0, 0.0)
    if threading.current_thread() is not threading.main_thread():
        return {}
    standard = (signal.SIG_DFL, signal.default_int_handler)
    return _install(_interrupt, [number for number in REQUESTS if signal.getsignal(number) in standard])


@contextmanager
def interruptible() -> Iterator[None]:
    """Call ``hear_requests``, and undo it at the end of the context, for a program that continues after it."""
    before = hear_requests()
    try:
        yield
    finally:
        _restore(before)


@contextmanager
def ended_by_requests() -> Iterator[None]:
    """Let a request end the process on the spot, because a call that waits inside a library hears no handler of Python.

    A signal that somebody else handles, or that is ignored, stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = _install(signal.SIG_DFL, [number for number in REQUESTS if signal.getsignal(number) is _interrupt])
    try:
        yield
    finally:
        _restore(before)


def ignore_requests() -> None:
    """Ignore all requests from here on, because the process ends."""
    global _ending
    _ending = True


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _last_interrupt
    last, when = _last_interrupt
    now = time.monotonic()
    if _ending or (number == last and now - when <= SAME_REQUEST_SECONDS):
        return
    _last_interrupt = (number, now)
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def _install(handler: Any, numbers: list[signal.Signals]) -> dict[int, Any]:
    """Set the handler of these signals, and return the earlier handlers."""
    return {number: signal.signal(number, handler) for number in numbers}


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


class StopFlag:
    """While entered, the first signal sets ``requested``; a signal more than half a second later raises KeyboardInterrupt.

    The training loop also sets ``requested`` when another rank was asked; the first signal to this process still counts as first.
    A process that leaves the context after a request ignores all signals from then on, because it is about to end.
    """

    def __init__(self) -> None:
        self.requested = False
        self._first_seconds: float | None = None  # time.monotonic() of the first signal to this process
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopFlag:
        ignored = hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        self._previous = _install(self._on_signal, REQUESTS[:-1] if ignored else REQUESTS)
        _entered.append(self)
        return self

    def __exit__(self, *_: object) -> None:
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
