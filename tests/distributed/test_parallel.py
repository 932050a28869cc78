"""One run on one, two and four processes, by DDP and FSDP2: the same losses, whoever wrote the checkpoint."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from osler.errors import UserError
from osler.model.config import ModelConfig
from osler.model.transformer import Transformer
from osler.parallel.config import DeepSpeedConfig
from osler.parallel.parallelize import parallelize
from osler.runtime.world import World

PROGRAM = Path(__file__).with_name("parallel_runs.py")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_number_of_ranks_and_strategy_is_the_same_run(tiny, tmp_path):
    path = os.pathsep.join([str(PROGRAM.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    given = [tiny.pretrain, tiny.sft, str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *given], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.startswith("ok ")] == []
    assert len(lines) == 27 + (4 if importlib.util.find_spec("deepspeed") else 0)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_without_deepspeed_its_strategy_says_what_to_install():
    model = Transformer(ModelConfig(num_layers=1, vocab_size=64))
    with pytest.raises(UserError, match=r"pip install -e '\.\[deepspeed\]'.*parallel.type=fsdp"):
        parallelize(model, DeepSpeedConfig(), World(size=2), compile=False)
