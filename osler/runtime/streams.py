"""Standard streams that are closed when the process starts, or that fail while it runs.

A closed stream is replaced by the null device: Python has None there, and the next file that is opened would take its number and
receive what libraries print. A stream that cannot be written to (a full disk, a terminal that is gone) must not make the
interpreter complain at its end, where nobody can catch that.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import TextIO

OUTPUT = "standard output"  # the file name of its errors


class _Output(io.TextIOWrapper):
    """Standard output whose errors name it; ``flush`` raises an error of ``write`` again, because argparse hides that one."""

    _error: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._error = error
            error.filename = OUTPUT
            raise

    def flush(self) -> None:
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
            super().flush()
        except OSError as error:
            error.filename = OUTPUT
            raise


def open_streams() -> None:
    """Open what is closed, and let the errors of standard output name it."""
    stdout = sys.stdout
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # in the order of the numbers that they take
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - open to the end
    if isinstance(stdout, io.TextIOWrapper):
        sys.stdout = _Output(
            stdout.buffer, encoding=stdout.encoding, line_buffering=stdout.line_buffering, write_through=stdout.write_through
        )


def flush_or_silence() -> None:
    """Flush the streams; one that fails is redirected to the null device, which takes the rest."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            silence(stream)


def silence(stream: TextIO) -> None:
    """Redirect a stream to the null device."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
