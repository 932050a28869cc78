"""The terminal: one plain picture where nobody watches, a screen of its own where somebody does, and nothing left behind."""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from osler.cli.main import main
from osler.watch.screen import ENTER, HOME, LEAVE
from tests.report.conftest import write_run

pty = pytest.importorskip("pty", reason="terminals of this kind are Unix's")
termios = pytest.importorskip("termios")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    speed = {"perf/eta_seconds": 9.0, "perf/tokens_per_second": 100.0}
    row = {"step": 1, "tokens": 100, "time": time.time(), "train/loss": 3.25, **speed}
    return write_run(tmp_path, [row], "kind: pretrain\ntotal_tokens: 1000\n")


@pytest.mark.parametrize("how", [(), ("--once",)])
def test_without_a_terminal_one_plain_picture_is_printed(run: Path, capsys: pytest.CaptureFixture[str], how: tuple[str]) -> None:
    assert main(["watch", str(run), *how]) == 0
    plain = capsys.readouterr().out
    assert "loss 3.250" in plain and "100 of 1,000 tokens" in plain and "\x1b" not in plain


def test_what_cannot_be_watched_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, said in (
        ([str(tmp_path / "nowhere")], "is no folder"),
        ([str(tmp_path), "--once"], f"{tmp_path} is not a run folder: it has no config.yaml"),
        ([str(tmp_path), "--every", "0"], "above 0"),
    ):
        assert main(["watch", *given]) == 2 and said in capsys.readouterr().err


def test_a_folder_of_runs_is_listed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    top = run / "more"
    for name in ("a", "b"):
        shutil.copytree(run, top / name, ignore=lambda *_: ["more"])
    (top / "notes").mkdir()
    assert main(["watch", str(top)]) == 0
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{top / 'a'}  running") and second.startswith(f"{top / 'b'}  running")
    assert last == f"This folder holds 2 runs; give one: osler watch {top / 'a'}"
    assert main(["report", str(top)]) == 2
    assert f"holds 2 runs. Give one of them: {top / 'a'}, {top / 'b'}." in capsys.readouterr().err


class Terminal:
    """`osler watch` on a terminal of its own."""

    def __init__(self, folder: Path, every: float) -> None:
        self.end, self.other = pty.openpty()
        termios.tcsetwinsize(self.other, (30, 100)) if hasattr(termios, "tcsetwinsize") else None
        # A test runner that a shell put into the background ignores Ctrl-C, and what it starts would too.
        start = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from osler.cli.main import main; "
        command = [sys.executable, "-c", f"{start}sys.exit(main(sys.argv[1:]))", "watch", str(folder), "--every", str(every)]
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}  # outrank its size
        environment |= {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
        pipes = {"stdin": self.other, "stdout": self.other, "stderr": self.other}
        self.process = subprocess.Popen(command, **pipes, env=environment, start_new_session=True)
        self.seen = ""

    def until(self, text: str, seconds: float = 300.0) -> str:
        """Read on until a text shows up; returns what came up to it."""
        begun, deadline = len(self.seen), time.monotonic() + seconds
        while text not in self.seen[begun:]:
            assert time.monotonic() < deadline, f"{text!r} did not come: {self.seen!r}"
            if select.select([self.end], [], [], 0.2)[0]:
                self.seen += os.read(self.end, 1 << 16).decode("utf-8", "replace")
        return self.seen[begun:]

    def leave(self, how: signal.Signals = signal.SIGINT) -> int:
        """Leave by a signal, see that the terminal is as it was, and return the exit code."""
        self.process.send_signal(how)
        self.until(LEAVE)
        code = self.process.wait(300)
        assert self.seen.count(ENTER) == self.seen.count(LEAVE) == 1 and self.seen.endswith(LEAVE), "the screen before is back"
        os.close(self.end)
        os.close(self.other)
        return code


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_the_terminal_is_left_as_it_was(run: Path, how: signal.Signals, code: int) -> None:
    terminal = Terminal(run, every=30.0)
    assert terminal.until("so far").startswith(ENTER + HOME)
    assert terminal.leave(how) == code


def test_the_picture_follows_the_run_from_before_it_begins_and_the_size_of_the_terminal(run: Path) -> None:
    folder = run / "later"
    terminal = Terminal(folder, every=0.1)
    terminal.until("nothing here yet")
    folder.mkdir()
    (run / "metrics.jsonl").rename(folder / "metrics.jsonl")
    terminal.until("loss 3.250")
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 2, "tokens": 200, "time": time.time(), "train/loss": 1.5}) + "\n")
    terminal.until("loss 1.500")
    if hasattr(termios, "tcsetwinsize"):  # Python 3.11
        termios.tcsetwinsize(terminal.other, (2, 20))
        terminal.until("\x1b[J")
        picture = terminal.until("\x1b[J").rpartition(HOME)[2]
        assert picture.count("\r\n") <= 1
    assert terminal.leave() == 0
