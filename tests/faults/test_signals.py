"""Ctrl-C in a real process: once saves and leaves with 130, twice leaves at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from osler.checkpoint import store

ROOT = Path(__file__).parents[2]
ENDLESS = ["total_tokens=100_000_000_000", "eval_every_tokens=100_000_000_000", "save_every_tokens=100_000_000_000"]
PATIENCE_SECONDS = 60


def start(tiny, folder: Path, *overrides: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "osler.cli", "pretrain", tiny.pretrain, *ENDLESS, *overrides, "--run", str(folder)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, "the run did not get that far"
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_once_and_twice(tiny, tmp_path):
    once = start(tiny, tmp_path / "once")
    # Steps of many seconds, so that the second Ctrl-C finds the run still in the step of the first.
    twice = start(tiny, tmp_path / "twice", "batch_tokens=16_777_216", "micro_batch_tokens=1024")
    try:
        metrics = tmp_path / "once" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, once)
        once.send_signal(signal.SIGINT)
        said = once.communicate(timeout=PATIENCE_SECONDS)[1]
        assert once.returncode == 130 and "Traceback" not in said
        assert "SIGINT: finishing this step and saving" in said and "Stopped and saved" in said
        saved, skipped = store.newest_good(tmp_path / "once" / "checkpoints")
        assert saved is not None and not skipped and store.load(saved).step >= 5

        wait_for((tmp_path / "twice" / "metrics.jsonl").exists, twice)
        twice.send_signal(signal.SIGINT)
        for line in twice.stderr:
            if "once more to leave at once" in line:
                break
        began = time.monotonic()
        twice.send_signal(signal.SIGINT)
        said = twice.communicate(timeout=PATIENCE_SECONDS)[1]
        assert twice.returncode == 130 and "osler: interrupted" in said and "Traceback" not in said
        assert time.monotonic() - began < 10
        assert not (tmp_path / "twice" / "checkpoints").exists()
    finally:
        for process in (once, twice):
            if process.poll() is None:
                process.kill()
                process.wait()
