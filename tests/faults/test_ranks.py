"""Several processes: one dies, one computes NaN, all are interrupted."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("broken_ranks.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_what_breaks_one_rank_is_agreed_on_by_all(tiny, runs, tmp_path):
    paths = [str(PROGRAM.parents[2]), str(PROGRAM.parents[1] / "distributed"), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(filter(None, paths))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), tiny.pretrain, tiny.grpo, str(runs.sft), str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.startswith("ok ")] == []
    assert len(lines) == 8 + (2 if importlib.util.find_spec("deepspeed") else 0)
