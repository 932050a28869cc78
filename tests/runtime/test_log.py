"""Progress: one redrawn line on a terminal, rare plain lines elsewhere, honest estimates, and no way to end a run."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from functools import partial

import pytest

from osler.cli.main import main
from osler.runtime.log import Progress, say


@pytest.fixture
def clock(monkeypatch):
    """The time in a list, which a test moves on."""
    now = [100.0]
    monkeypatch.setattr("osler.runtime.log.time.monotonic", lambda: now[0])
    return now


@contextlib.contextmanager
def terminal(columns: int) -> Iterator[int]:
    """Make stderr a pseudo-terminal of that width; gives the descriptor to read from."""
    fcntl, termios, pty = (pytest.importorskip(name) for name in ("fcntl", "termios", "pty"))
    end, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, columns.to_bytes(2, sys.byteorder).rjust(4, b"\x00") + b"\x00" * 4)
    with os.fdopen(other, "w") as stream, contextlib.redirect_stderr(stream):
        try:
            yield end
        finally:
            os.close(end)


@pytest.fixture(autouse=True)
def _ordinary_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")


def test_plain_lines_come_every_few_seconds_and_close_shows_the_last_state_once(capsys, clock):
    with Progress(1000, "steps", label="train") as progress:
        for step in range(1, 301):
            clock[0] += 0.1
            progress.update(step, **({"loss": 2.5} if step == 1 else {}))  # a field stays until it is given again
    progress.close()
    said = capsys.readouterr().err
    lines = said.splitlines()
    assert len(lines) == 4  # the first update, then at 10, 20, and the last state at close
    assert lines[-1] == "train   30.0%  300/1,000 steps  loss 2.500  ETA 1 min 10 s"
    assert "\r" not in said


@pytest.mark.parametrize(
    ("total", "initial", "updates", "estimate"),
    [
        (1000, 890, [(0, 900), (10, 950)], "ETA 10 s"),  # what an earlier run did counts for nothing
        (1000, 0, [(30, 1)], "1/1,000 steps"),  # what comes before the first update is loading and compiling: no rate follows
        (1000, 0, [(30, 1), (1, 11)], "ETA 1 min 39 s"),
        (2000, 0, [(0, 1), (501, 10), *((1, 10 * step) for step in range(2, 102))], "1 min 39 s"),  # at the last minute's rate
        (0, 0, [], "100.0%  0/0 steps"),
        (10, 0, [(0, 1), (1, 10)], "100.0%  10/10 steps"),  # finished work has no estimate
    ],
)
def test_the_estimate(clock, total, initial, updates, estimate):
    progress = Progress(total, "steps", initial=initial)
    for seconds, done in updates:
        clock[0] += seconds
        progress.update(done)
    assert progress.line().endswith(estimate)


def test_a_terminal_sees_one_line_that_fits(clock, monkeypatch):
    with terminal(40) as end:
        progress = Progress(1_000_000, "tokens")
        for done in range(1, 11):
            clock[0] += 0.0625
            progress.update(done * 1000, loss=3.25, tokens_per_second=123456.0, note="x" * 60)
        say("a message")
        clock[0] += 1
        progress.update(20_000)
        progress.close()
        say("afterwards")
        output = ""
        while not output.endswith("afterwards\r\n"):
            output += os.read(end, 65536).decode()
        monkeypatch.setenv("TERM", "dumb")
        assert not Progress(10, "steps").live
    drawn = output.split("\r\x1b[K")[1:]
    assert len(drawn) == 5  # updates 1, 5 and 9; the message; the last update
    assert all(len(line) == 39 for line in drawn[:3])
    assert drawn[3] == "a message\r\n"
    assert drawn[4].endswith("\r\nafterwards\r\n")


def test_a_lost_reader_does_not_end_the_run(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("osler.runtime.log.PLAIN_SECONDS", 0.0)
    progress = Progress(10, "steps")
    progress.update(1)
    say("nobody listens")
    with contextlib.suppress(OSError):
        stream.close()
    progress.update(2)
    progress.close()
    assert not Progress(10, "steps").live


def test_a_log_message_is_a_line_on_stderr_with_its_level_where_that_matters(capsys):
    logger = logging.getLogger("osler.somewhere")
    logger.debug("a detail")
    logger.info("100% ready")
    logger.warning("a disk is full")
    assert capsys.readouterr().err == "100% ready\nWarning: a disk is full\n"


def test_a_user_may_ask_for_warnings_alone(capsys, monkeypatch, request):
    osler, logger = logging.getLogger("osler"), logging.getLogger("osler.somewhere")
    request.addfinalizer(partial(osler.setLevel, osler.level))
    monkeypatch.setenv("OSLER_LOG_LEVEL", "warning")
    assert main(["--version"]) == 0 and osler.level == logging.WARNING
    logger.warning("a disk is full")
    assert capsys.readouterr().err == "Warning: a disk is full\n", "once, however often a command runs in a process"
    monkeypatch.setenv("OSLER_LOG_LEVEL", "loud")
    assert main(["--version"]) == 2 and "OSLER_LOG_LEVEL is 'loud'" in capsys.readouterr().err
