"""`osler watch`: frames of a run, drawn on the terminal's alternate screen until Ctrl-C, in plain ANSI."""

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from osler.report.read import is_run, sub_runs, why_no_run
from osler.runtime.errors import UserError
from osler.runtime.log import is_terminal
from osler.watch.frame import Text, clean, frame
from osler.watch.state import WatchedFolder

# Switch to another screen, without a cursor or wrapping of long lines; and switch back.
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l\x1b[?7l", "\x1b[?7h\x1b[?25h\x1b[?1049l"
HOME, CLEAR_LINE, CLEAR_BELOW, PLAIN = "\x1b[H", "\x1b[K", "\x1b[J", "\x1b[0m"
STYLES = {"title": "\x1b[1m", "chart": "\x1b[36m", "good": "\x1b[32m", "warn": "\x1b[33m", "bad": "\x1b[31m", "dim": "\x1b[2m"}
POLL_SECONDS = 0.2  # between two checks of the terminal's size
EXIT_TERMINATED = 143


def run(folder: str, *, every_seconds: float = 2.0, once: bool = False) -> int:
    """Show a run until the reader leaves, or once in plain text where there is no terminal; return the exit code.

    For a folder that is no run but holds several, print one line for each run.
    """
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
    with contextlib.suppress(KeyboardInterrupt), own_screen():
        while True:
            watched.refresh()
            size = shutil.get_terminal_size()
            draw(frame(watched, time.time(), *size))
            wait(every_seconds, size)
    return 0


def draw(lines: Sequence[Text]) -> None:
    """Draw a frame over the one before.

    A line is cleared before it is written: after a full line the cursor is on its last character, which clearing would erase.
    """
    colours = not os.environ.get("NO_COLOR")
    styled = [f"{CLEAR_LINE}{STYLES.get(style, '') if colours else ''}{text}{PLAIN}" for text, style in lines]
    print(HOME + "\r\n".join(styled) + CLEAR_BELOW, end="", flush=True)


def wait(seconds: float, size: os.terminal_size) -> None:
    """Wait for the next frame, or until the terminal's size changes."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and shutil.get_terminal_size() == size:
        time.sleep(min(left, POLL_SECONDS))


@contextlib.contextmanager
def own_screen() -> Iterator[None]:
    """Take the terminal over, and give it back as it was, also after Ctrl-C and SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))
    if hasattr(signal, "SIGTSTP"):
        signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # Ctrl-Z would leave this screen to the shell
    print(ENTER, end="", flush=True)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not keep this screen
        print(LEAVE, end="", flush=True)
