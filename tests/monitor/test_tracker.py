"""A tracker that fails, hangs, crashes or is slow costs the run nothing but a word."""

import time
from collections.abc import Callable

import pytest

from osler.monitor import tracker as trackers
from osler.monitor.alerts import Alert
from osler.monitor.tracker import TrackerProcess

ALERT = Alert(7, "dead-layers", "critical", "layer 3 is dead – look")
PATIENCE_SECONDS = 300.0
LIBRARY = """
import os, pathlib, sys, threading, time
from osler.monitor.tracker import Tracker, UndeliveredError
class Library(Tracker):
    def __init__(self, folder, fate):
        self.path, self.fate = pathlib.Path(folder) / "got", fate
        print("a banner", flush=True)
        if fate == "refuses":
            sys.exit("no API key")
        if fate == "holds the end":
            threading.Thread(target=time.sleep, args=(3600,)).start()
    def take(self, text):
        with self.path.open("a") as file:
            file.write(text)
    def write(self, step, tokens, metrics):
        if self.fate == "crashes":
            os.abort()
        if self.fate == "raises" and step == 3:
            raise ConnectionError("no route to host")
        while self.fate == "hangs" or self.fate == "waits" and not self.path.exists():
            time.sleep(0.01)
        self.take(f"{step} {tokens} {metrics} ")
    def alert(self, alert):
        if self.fate == "undelivered":
            raise UndeliveredError("no such channel")
        self.take(f"{alert.name} ")
    def close(self):
        self.take("closed")
"""


@pytest.fixture
def got(tmp_path):
    """The file into which the library writes what it got."""
    return tmp_path / "got"


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start a tracker with a fate; what is left of it is killed after the test."""
    (tmp_path / "library.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(str(tmp_path))
    started: list[TrackerProcess] = []

    def build(fate: str) -> TrackerProcess:
        started.append(TrackerProcess("Far", "library:Library", tmp_path / "run" / "printed", str(tmp_path), fate))
        return started[-1]

    yield build
    for tracker in started:
        tracker.process.kill()
        tracker.process.wait()


def wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_tracker_gets_everything_in_order_and_prints_into_a_file(start, got, capsys):
    tracker = start("works")
    for step in range(50):
        tracker.write(step, 10 * step, {"train/loss": 0.5})
    tracker.alert(ALERT)
    tracker.close(PATIENCE_SECONDS)
    tracker.close()
    lines = [f"{step} {10 * step} {{'train/loss': 0.5}} " for step in range(50)]
    assert got.read_text() == "".join(lines) + "dead-layers closed"
    assert capsys.readouterr().err == "" and tracker.printed.read_text() == "a banner\n"


@pytest.mark.parametrize(
    ("fate", "said"), [("raises", "ConnectionError: no route to host"), ("refuses", "no API key"), ("crashes", "exit code -6")]
)
@pytest.mark.parametrize("when", ["while the run goes on", "at its end"])
def test_a_tracker_that_fails_is_told_once_and_left_alone(start, fate, said, when, capsys):
    tracker = start(fate)
    for step in range(1, 5):
        tracker.write(step, step, {})
    if when == "while the run goes on":
        wait_until(lambda: tracker.write(9, 9, {}) or tracker.is_gone)
    tracker.close(PATIENCE_SECONDS)
    told = capsys.readouterr().err
    assert told.startswith("Warning: Far failed (") and said in told and told.count("\n") == 1
    assert "printed). The run goes on without it." in told


def test_what_cannot_be_started_is_told(tmp_path, capsys):
    (tmp_path / "run").write_text("no folder")
    tracker = TrackerProcess("Far", "library:Library", tmp_path / "run" / "printed")
    tracker.write(1, 1, {})
    tracker.close()
    assert capsys.readouterr().err.count("Far could not be started") == 1


def test_an_alert_that_does_not_arrive_is_told_once_and_the_next_is_tried(start, got, capsys):
    tracker = start("undelivered")
    for _ in range(2):
        tracker.alert(ALERT)
    tracker.write(1, 1, {})
    tracker.close(PATIENCE_SECONDS)
    assert got.read_text() == "1 1 {} closed"
    assert capsys.readouterr().err == "Warning: Far failed (no such channel). The run goes on; the next alert tries it again.\n"


@pytest.mark.parametrize("fate", ["hangs", "holds the end"])
def test_a_tracker_that_hangs_stops_no_step_and_holds_up_the_end_a_little(start, fate, got, capsys):
    tracker = start(fate)
    for step in range(200 if fate == "hangs" else 1):
        tracker.write(step, step, {"x" * 1000: 1.0})  # more than a pipe takes
    if fate == "holds the end":
        tracker.end()
        wait_until(lambda: got.exists() and "closed" in got.read_text())
    tracker.close(0.2)
    assert tracker.process.poll() is None and "Far has not finished within 0.2 s" in capsys.readouterr().err


def test_a_slow_tracker_loses_lines_and_they_are_counted(start, got, capsys, monkeypatch):
    monkeypatch.setattr(trackers, "QUEUE_BYTES", 5000)
    tracker, wide = start("waits"), {"x" * 2000: 1.0}
    wait_until(lambda: tracker.write(1, 1, wide) or tracker.dropped)
    for _ in range(4):
        tracker.write(2, 2, wide)
    got.touch()
    tracker.close(PATIENCE_SECONDS)
    assert got.read_text().startswith("1 1 {'xxx") and got.read_text().endswith("closed") and "2 2 " not in got.read_text()
    assert "too slow for 5 lines" in capsys.readouterr().err


def test_a_tracker_finishes_what_it_has_when_the_run_is_killed(start, got):
    tracker = start("works")
    tracker.write(1, 1, {})
    tracker._to_child.close()  # as the system does
    wait_until(lambda: tracker.process.poll() is not None)
    assert got.read_text() == "1 1 {} closed"
