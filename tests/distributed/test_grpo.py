"""GRPO on one, two and four processes: the same questions, completions and rewards, and the same policy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("grpo_runs.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_number_of_ranks_draws_and_learns_the_same(tiny, runs, tmp_path):
    path = os.pathsep.join([str(PROGRAM.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    given = [tiny.grpo, str(runs.sft), str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *given], env=environment, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.startswith("ok ")] == []
    assert len(lines) == 11
