"""Everything that goes to stderr: log messages, progress lines, and the error that ends the program.

Osler's modules use ``logging``; ``log_to_terminal`` sends what they say to stderr. A progress line is redrawn on a terminal and
printed now and then elsewhere. Output that cannot be written is dropped, so that no run ends because nobody was watching. Of
several processes that train together only rank 0 writes.

A standard stream that is closed at the start is replaced by the null device. Otherwise the next file that is opened would take
its number and receive what libraries print. A stream that fails must not make the interpreter complain when it exits, where
nobody can catch the error.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import math
import os
import sys
import time
from typing import TextIO

from osler.runtime import format as fmt
from osler.runtime.errors import UserError
from osler.runtime.world import is_silent


def open_streams() -> None:
    """Open standard streams that are closed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # in the order of their file numbers
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - open to the end


def flush_or_silence() -> None:
    """Flush the streams; a stream that fails is redirected to the null device, which takes the rest."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            silence(stream)


def silence(stream: TextIO) -> None:
    """Redirect a stream to the null device."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


LEVEL_VARIABLE = "OSLER_LOG_LEVEL"  # debug, info (the default), warning, error or critical
LIVE_SECONDS, PLAIN_SECONDS = 0.2, 10.0  # between two updates of a progress line on a terminal, and elsewhere
RATE_WINDOW_SECONDS = 60.0
ERASE_LINE = "\r\x1b[K"

_live: list[Progress] = []  # progress lines now on a terminal, so that say() does not write into them


class Progress:
    """Shows progress through ``total`` units of work, and the time left at the rate of the last minute. A context manager.

    ``initial`` is the work that earlier processes did. The clock starts with the first update, after loading and compiling.
    """

    def __init__(self, total: float, unit: str, *, label: str = "", initial: float = 0) -> None:
        self.total = total
        self.unit = unit
        self.label = label
        self.live = is_terminal(sys.stderr)
        self._done = initial
        self._fields: dict[str, object] = {}
        self._marks: collections.deque[tuple[float, float]] = collections.deque()  # times, and the units done by then
        self._shown_at: float | None = None
        self._is_news = False  # whether the state has changed since it was shown
        if self.live:
            _live.append(self)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, done: float, **fields: object) -> None:
        """Show that ``done`` units are finished; ``fields`` stay on the line until they are given again. Cheap to call often."""
        now = time.monotonic()
        self._done = done
        self._fields.update(fields)
        self._marks.append((now, done))
        while len(self._marks) > 2 and now - self._marks[0][0] > RATE_WINDOW_SECONDS:
            self._marks.popleft()
        self._is_news = True
        if self._shown_at is None or now - self._shown_at >= (LIVE_SECONDS if self.live else PLAIN_SECONDS):
            self._show(now)

    def close(self) -> None:
        """Show the last state and leave the cursor on a fresh line; further calls do nothing."""
        if self._is_news:
            self._show(time.monotonic())
        if self in _live:
            _live.remove(self)
            if self._shown_at is not None:
                _write("\n")

    def line(self) -> str:
        """Return the text of the line: label, percent, amounts, fields, time left."""
        share = min(1.0, self._done / self.total) if self.total > 0 else 1.0
        parts = [self.label, f"{100 * share:5.1f}%", f"{fmt.count(self._done)}/{fmt.count(self.total)} {self.unit}"]
        parts += [f"{name} {_written(value)}" for name, value in self._fields.items()]
        if self._marks and self._done < self.total:
            (began, before), (now, done) = self._marks[0], self._marks[-1]
            if now > began and done > before:
                parts.append(f"ETA {fmt.duration((self.total - done) * (now - began) / (done - before))}")
        return "  ".join(parts if self.label else parts[1:])

    def _show(self, now: float) -> None:
        self._shown_at, self._is_news = now, False
        if not self.live:
            _write(f"{self.line()}\n")
            return
        with contextlib.suppress(OSError, ValueError):  # the terminal is gone
            columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            _write(ERASE_LINE + self.line()[: max(1, columns - 1)])  # with a full last column some terminals wrap


def say(text: str) -> None:
    """Write one line to stderr; a live progress line steps aside and comes back with its next update."""
    _write(f"{ERASE_LINE if _live else ''}{text}\n")


class TerminalHandler(logging.Handler):
    """Writes log messages to stderr; one of level WARNING or above begins with its level."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        level = f"{record.levelname.capitalize()}: " if record.levelno >= logging.WARNING else ""
        say(f"{level}{record.getMessage()}")


def log_to_terminal() -> None:
    """Send the messages of all of Osler's loggers to the terminal, from the level in ``OSLER_LOG_LEVEL`` on."""
    osler = logging.getLogger("osler")
    level = os.environ.get(LEVEL_VARIABLE, "info").upper()
    if level not in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"):
        raise UserError(f"{LEVEL_VARIABLE} is {level.lower()!r}; it must be debug, info, warning, error or critical.")
    osler.setLevel(level)
    if not any(isinstance(handler, TerminalHandler) for handler in osler.handlers):
        osler.addHandler(TerminalHandler())


def complain(text: str, is_reporter: bool = True) -> None:
    """Write to stderr why the program ends, if this process is the one that reports it."""
    if is_reporter:
        with contextlib.suppress(OSError, ValueError):  # stderr may be closed
            print(text, file=sys.stderr, flush=True)


def is_terminal(stream: TextIO) -> bool:
    """Whether the stream is a terminal that can redraw a line."""
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # the stream is closed
        return False


def _written(value: object) -> str:
    """Return a finite number as all of Osler writes it, and anything else as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return str(value)
    return fmt.count(value) if isinstance(value, int) else fmt.number(value)


def _write(text: str) -> None:
    if is_silent():
        return
    # The reader is gone, the stream is closed, or a signal handler writes amid another write.
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        sys.stderr.write(text)
        sys.stderr.flush()
