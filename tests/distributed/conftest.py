"""Runs the programs that fork ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def run_cases() -> Callable[..., int]:
    """``run_cases(program, *arguments, **environment)`` requires that all cases succeed, and returns their number."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")

    def run(program: str, *arguments: object, **environment: str) -> int:
        path = os.pathsep.join([str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
        command = [sys.executable, str(HERE / program), *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = done.stdout.splitlines()
        assert [line for line in lines if not line.startswith("ok ")] == []
        return len(lines)

    return run
