"""Two ranks that share Muon's work, replicated or sharded, end where one rank alone ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

RANKS = 2
ROOT = Path(__file__).parents[2]


def test_shared_and_sharded_updates_are_those_of_one_rank(tmp_path):
    program = str(Path(__file__).with_name("muon_ranks.py"))
    commands = [[sys.executable, program, str(rank), str(RANKS), str(tmp_path / "meeting")] for rank in range(RANKS)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = [subprocess.Popen(command, env=environment, text=True, **pipes) for command in commands]
    try:
        for process in started:
            output, errors = process.communicate(timeout=1800)
            assert process.returncode == 0 and output == "ok\n", errors[-3000:]
    finally:
        for process in started:
            process.kill()
