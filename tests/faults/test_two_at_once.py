"""The same command started twice: the second process leaves the first one's run alone."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
from run_folders import TRAINERS

from osler.runtime.errors import UserError
from osler.runtime.files import is_locked, locked

pytest.importorskip("fcntl", reason="locks of this kind are Unix's")


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_folder_that_a_process_works_on_is_refused(kind, launch, tmp_path, capsys):
    with locked(tmp_path):
        assert launch(kind, tmp_path) == 2
    assert "Another process is at work on" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_look_at_a_folder_keeps_nobody_out(tmp_path):
    """`osler watch` looks with a shared lock; a run that starts at that moment waits for it and begins."""
    import fcntl

    looking = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    entered = threading.Event()

    def enter() -> None:
        with locked(tmp_path):
            entered.set()

    thread = threading.Thread(target=enter)
    thread.start()
    assert not entered.wait(0.05)
    os.close(looking)
    thread.join(300)
    assert entered.is_set() and not is_locked(tmp_path)


def test_the_lock_ends_with_its_process(tmp_path):
    program = "import sys, time; from osler.runtime.files import locked\nfrom pathlib import Path\n"
    program += "with locked(Path(sys.argv[1])):\n    print('in', flush=True)\n    time.sleep(3600)\n"
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, cwd=os.getcwd())
    assert process.stdout is not None and process.stdout.readline() == b"in\n"
    with pytest.raises(UserError, match="Another process"), locked(tmp_path):
        pass
    process.kill()
    process.wait()
    with locked(tmp_path):
        pass
