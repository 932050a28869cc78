"""`osler watch`: frames of a run, drawn on the terminal's alternate screen until Ctrl-C or q, in plain ANSI."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from osler.report.read import is_run, sub_runs, why_no_run
from osler.runtime.errors import UserError
from osler.runtime.log import is_terminal
from osler.watch.frame import Text, clean, frame
from osler.watch.state import WatchedFolder

# Another screen, no cursor, no wrapping of long lines; and back.
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l\x1b[?7l", "\x1b[?7h\x1b[?25h\x1b[?1049l"
HOME, CLEAR_LINE, CLEAR_BELOW, PLAIN = "\x1b[H", "\x1b[K", "\x1b[J", "\x1b[0m"
STYLES = {"title": "\x1b[1m", "chart": "\x1b[36m", "good": "\x1b[32m", "warn": "\x1b[33m", "bad": "\x1b[31m", "dim": "\x1b[2m"}
POLL_SECONDS = 0.2  # between two checks of the keyboard and of the terminal's size
EXIT_TERMINATED = 143


def run(folder: str, *, every_seconds: float = 2.0, once: bool = False) -> int:
    """Show a run until the reader leaves, or once in plain text where there is no terminal; returns the exit code."""
    if not every_seconds > 0:
        raise UserError(f"--every {every_seconds:g} must be above 0: the seconds between two frames.")
    path = Path(folder)
    if path.is_dir() and not is_run(path) and (runs := sub_runs(path)):
        for each in runs:
            watched = WatchedFolder(each)
            watched.refresh()
            print(clean(f"{each}  {watched.current.state(time.time()).words}"))
        print(f"This folder holds {len(runs)} runs; give one: osler watch {runs[0]}")
        return 0
    watched = WatchedFolder(path)
    if once or not is_terminal(sys.stdout):
        if not is_run(path):  # on a terminal a run may still begin, and the screen says so
            raise UserError(why_no_run(path))
        watched.refresh()
        print("\n".join(line.text for line in frame(watched, time.time(), shutil.get_terminal_size().columns)))
        return 0
    with contextlib.suppress(KeyboardInterrupt), own_screen() as keys:
        while True:
            watched.refresh()
            size = shutil.get_terminal_size()
            draw(frame(watched, time.time(), *size))
            if not wait(every_seconds, size, keys):
                return 0
    return 0


def draw(lines: Sequence[Text]) -> None:
    """Draw a frame over the one before.

    A line is cleared before it is written, because after a full line the cursor is on its last character, which would go too.
    """
    colours = not os.environ.get("NO_COLOR")
    styled = [f"{CLEAR_LINE}{STYLES.get(style, '') if colours else ''}{text}{PLAIN}" for text, style in lines]
    print(HOME + "\r\n".join(styled) + CLEAR_BELOW, end="", flush=True)


def wait(seconds: float, size: os.terminal_size, keys: int | None) -> bool:
    """Wait for the next frame, or until the terminal's size changes; return False when the reader pressed q."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and shutil.get_terminal_size() == size:
        if keys is None:
            time.sleep(min(left, POLL_SECONDS))
        elif select.select([keys], [], [], min(left, POLL_SECONDS))[0]:
            pressed = os.read(keys, 64)
            if not pressed:  # the keyboard is gone, and select would not wait
                time.sleep(min(left, POLL_SECONDS))
            if pressed in (b"q", b"Q"):
                return False
    return True


@contextlib.contextmanager
def own_screen() -> Iterator[int | None]:
    """Take the terminal over and give it back as it was, also on Ctrl-C, SIGTERM and Ctrl-Z; yields the keyboard, if any."""
    keys, restore_keys = _quiet_keyboard()

    def terminate(*_: Any) -> None:
        raise SystemExit(EXIT_TERMINATED)

    def suspend(*_: Any) -> None:
        print(LEAVE, end="", flush=True)
        signal.raise_signal(signal.SIGSTOP)
        print(ENTER, end="", flush=True)

    handlers: dict[int, Any] = {signal.SIGTERM: terminate}
    if hasattr(signal, "SIGTSTP"):
        handlers[signal.SIGTSTP] = suspend
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        print(ENTER, end="", flush=True)
        yield keys
    finally:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not come between
        print(LEAVE, end="", flush=True)
        restore_keys()
        for number, handler in before.items():
            signal.signal(number, handler)


def _quiet_keyboard() -> tuple[int | None, Any]:
    """Return the keyboard, if there is one, set to give single keys without an echo; and what undoes that."""
    try:
        import termios
        import tty
    except ImportError:  # Windows
        return None, lambda: None
    if not sys.stdin.isatty():
        return None, lambda: None
    keys = sys.stdin.fileno()
    before = termios.tcgetattr(keys)
    tty.setcbreak(keys)
    return keys, lambda: termios.tcsetattr(keys, termios.TCSAFLUSH, before)
