"""Progress: one redrawn line on a terminal, rare plain lines elsewhere, honest estimates, and no way to end a run."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from functools import partial
from typing import TextIO

import pytest

from osler.cli import main
from osler.runtime.log import Progress, duration, quantity, say


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@contextlib.contextmanager
def terminal(columns: int) -> Iterator[tuple[TextIO, int]]:
    """A real pseudo-terminal of that width: the stream to write to and the descriptor to read from."""
    fcntl, termios, pty = (pytest.importorskip(name) for name in ("fcntl", "termios", "pty"))
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, columns.to_bytes(2, sys.byteorder).rjust(4, b"\x00") + b"\x00" * 4)
    with os.fdopen(slave, "w") as stream:
        try:
            yield stream, master
        finally:
            os.close(master)


@pytest.fixture(autouse=True)
def _ordinary_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")


def test_plain_lines_come_every_few_seconds():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(1000, "steps", stream, plain_seconds=10, clock=clock)
    for step in range(1, 301):
        clock.seconds += 0.1
        progress.update(step, loss=2.5)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4  # the first update, then at 10, 20, and the last state at close
    assert lines[-1].startswith(" 30.0%  300/1000 steps  loss 2.5  ETA 1m10s")
    assert "\r" not in stream.getvalue()


def test_the_estimate_ignores_what_an_earlier_run_did():
    clock = Clock()
    progress = Progress(1000, "steps", io.StringIO(), initial=890, clock=clock)
    progress.update(900)
    clock.seconds += 10
    progress.update(950)
    assert "ETA 10s" in progress.line()


def test_the_estimate_begins_with_the_first_update():
    """What came before it is loading and compiling: no rate follows from it."""
    clock = Clock()
    progress = Progress(1000, "steps", io.StringIO(), clock=clock)
    clock.seconds += 30
    progress.update(1)
    assert "ETA" not in progress.line()
    clock.seconds += 1
    progress.update(11)
    assert "ETA 1m39s" in progress.line()


def test_the_estimate_follows_the_last_minute():
    clock = Clock()
    progress = Progress(2000, "steps", io.StringIO(), clock=clock)
    clock.seconds += 500  # a slow start, such as compilation
    progress.update(1)
    for step in range(1, 102):
        clock.seconds += 1
        progress.update(10 * step)
    assert "ETA 1m39s" in progress.line()


def test_fields_stay_until_given_again_and_finished_work_has_no_estimate():
    clock = Clock()
    progress = Progress(10, "items", io.StringIO(), label="eval", clock=clock)
    clock.seconds += 1
    progress.update(5, accuracy=0.25)
    progress.update(10)
    assert progress.line() == "eval  100.0%  10/10 items  accuracy 0.25"


def test_nothing_to_do_is_complete():
    assert Progress(0, "items", io.StringIO()).line().startswith("100.0%")


def test_a_terminal_sees_one_line_that_fits():
    clock = Clock()
    with terminal(columns=40) as (stream, master):
        progress = Progress(1_000_000, "tokens", stream, clock=clock)
        for done in range(1, 11):
            clock.seconds += 0.0625
            progress.update(done * 1000, loss=3.25, tokens_per_second=123456.0, note="x" * 60)
        say("a message", stream)
        clock.seconds += 1
        progress.update(20_000)
        progress.close()
        say("afterwards", stream)
        output = ""
        while not output.endswith("afterwards\r\n"):
            output += os.read(master, 65536).decode()
    drawn = output.split("\r\x1b[K")[1:]
    assert len(drawn) == 5  # updates 1, 5 and 9; the message; the last update
    assert all(len(line) == 39 for line in drawn[:3])
    assert drawn[3] == "a message\r\n"
    assert drawn[4].endswith("\r\nafterwards\r\n")


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with terminal(columns=80) as (stream, _):
        assert not Progress(10, "steps", stream).live


def test_close_shows_the_last_state_once():
    stream, clock = io.StringIO(), Clock()
    with Progress(10, "steps", stream, clock=clock) as progress:
        progress.update(1)
        clock.seconds += 1
        progress.update(9)
    progress.close()
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/10", "9/10"]


def test_a_lost_reader_does_not_end_the_run(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    progress = Progress(10, "steps", stream, plain_seconds=0)
    progress.update(1)
    say("nobody listens", stream)
    with contextlib.suppress(OSError):
        stream.close()
    progress.update(2)
    progress.close()
    assert not Progress(10, "steps", stream).live


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


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (9999, "9999"),
        (12345, "12.35k"),
        (123456.0, "123.5k"),
        (4_000_000, "4.00M"),
        (2.5e9, "2.50B"),
        (0.000123456, "0.0001235"),
        (2.0, "2"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (True, "True"),
        ("a", "a"),
    ],
)
def test_quantity(value, text):
    assert quantity(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0s"), (59.6, "1m00s"), (42, "42s"), (7620, "2h07m"), (97200, "1d03h")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text
