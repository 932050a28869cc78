"""One run on one, two and four processes, by DDP and FSDP2: the same losses, whoever wrote the checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("parallel_runs.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_number_of_ranks_and_strategy_is_the_same_run(tiny, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[2]), "OMP_NUM_THREADS": "1"}
    given = [tiny.pretrain, tiny.sft, str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *given], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.startswith("ok ")] == []
    assert len(lines) == 13
