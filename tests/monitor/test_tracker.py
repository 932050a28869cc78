"""A tracker that fails, hangs, crashes or is slow costs the run nothing but a word."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from osler.monitor.tracker import Trackers

ALERT = {"step": 7, "name": "dead-layers", "severity": "critical", "message": "layer 3 is dead – look"}
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
        while self.fate == "hangs":
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
    started = []

    def build(fate: str) -> Trackers:
        trackers = Trackers(tmp_path / "run", {"far": ("library:Library", str(tmp_path), fate)})
        started.extend(trackers.running.values())
        return trackers

    yield build
    for child in started:
        child.kill()
        child.wait()


def write(trackers: Trackers, *steps: int, name: str = "train/loss") -> None:
    for step in steps:
        trackers.send("write", {"step": step, "tokens": 10 * step, "metrics": {name: 0.5}})


def wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def lines(*steps: int) -> str:
    return "".join(f"{step} {10 * step} {{'train/loss': 0.5}} " for step in steps)


def test_a_tracker_gets_everything_in_order_and_prints_into_a_file(start, got, capsys):
    trackers = start("works")
    write(trackers, *range(50))
    trackers.send("alert", ALERT)
    trackers.close(PATIENCE_SECONDS)
    trackers.close()
    assert got.read_text() == lines(*range(50)) + "dead-layers closed"
    assert capsys.readouterr().err == "" and [path.name for path in trackers.folder.iterdir()] == ["far.log"]
    assert (trackers.folder / "far.log").read_text() == "a banner\n"


@pytest.mark.parametrize(
    ("fate", "said"), [("raises", "ConnectionError: no route to host"), ("refuses", "no API key"), ("crashes", "exit code -6")]
)
@pytest.mark.parametrize("when", ["while the run goes on", "at its end"])
def test_a_tracker_that_fails_is_told_once_and_left_alone(start, fate, said, when, capsys):
    trackers = start(fate)
    write(trackers, *range(1, 5))
    if when == "while the run goes on":
        wait_until(lambda: write(trackers, 9) or not trackers.running)
    trackers.close(PATIENCE_SECONDS)
    told = capsys.readouterr().err
    assert told.startswith("Warning: monitor.far failed (") and said in told and told.count("\n") == 1
    assert "far.log). The run goes on." in told


def test_what_cannot_be_started_is_told(tmp_path, capsys):
    (tmp_path / "run").write_text("no folder")
    trackers = Trackers(tmp_path / "run", {"far": ("library:Library",)})
    write(trackers, 1)
    trackers.close()
    assert capsys.readouterr().err.count("far could not be started") == 1


def test_an_alert_that_does_not_arrive_is_told_once_and_the_next_is_tried(start, got, capsys):
    trackers = start("undelivered")
    for _ in range(2):
        trackers.send("alert", ALERT)
    write(trackers, 1)
    trackers.close(PATIENCE_SECONDS)
    assert got.read_text() == lines(1) + "closed"
    assert capsys.readouterr().err.count("failed (no such channel; more in") == 1
    assert (trackers.folder / "far.log").read_text().count("no such channel") == 2


@pytest.mark.parametrize("fate", ["hangs", "holds the end"])
def test_a_tracker_that_hangs_stops_no_step_and_holds_up_the_end_a_little(start, fate, got, capsys):
    trackers = start(fate)
    (child,) = trackers.running.values()
    write(trackers, *range(200 if fate == "hangs" else 1), name="x" * 1000)
    if fate == "holds the end":
        trackers.send("close", {})
        wait_until(lambda: got.exists() and "closed" in got.read_text())
    trackers.close(0.2)
    assert child.poll() is None and "far has not finished within 0.2 s" in capsys.readouterr().err


def test_a_tracker_finishes_what_it_has_when_the_run_is_killed(tmp_path, got):
    (tmp_path / "library.py").write_text(LIBRARY)
    script = (
        "import os, sys, pathlib, time\nfrom osler.monitor.tracker import Trackers\n"
        "folder = sys.argv[1]\nsys.path.insert(0, folder)\n"
        "trackers = Trackers(pathlib.Path(folder) / 'run', {'far': ('library:Library', folder, 'works')})\n"
        "trackers.send('write', {'step': 1, 'tokens': 10, 'metrics': {'train/loss': 0.5}})\n"
        "while not os.path.exists(folder + '/got'):\n    time.sleep(0.01)\nos.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=Path(__file__).parents[2], check=False)
    wait_until(lambda: got.exists() and got.read_text().endswith("closed"))
    assert got.read_text() == lines(1) + "closed"
