"""Whether compiling works is tried; of many shapes few stay compiled, none compiles twice in a row, and all compute the same."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import torch

from osler.model.transformer import SummedLoss
from osler.parallel.compile import COMPILED_SHAPES
from osler.parallel.config import NoParallelConfig
from osler.parallel.parallelize import parallelize
from osler.runtime.world import World
from tests.models import tiny_model

ROOT = Path(__file__).parents[2]
LENGTHS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)


def test_ten_lengths_with_at_most_four_compiled_versions_alive(no_compiled_code, monkeypatch):
    """The loss that training compiles, at more lengths than torch allows one function; counted in torch's own cache."""
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list
    from torch._dynamo.testing import CompileCounter

    model = tiny_model(num_layers=1)
    eager, counter, alive = SummedLoss(model), CompileCounter(), []
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    loss = parallelize(model, NoParallelConfig(), World(), compile=True).loss
    for number, seq_len in enumerate(LENGTHS, start=1):
        ids = torch.randint(0, 64, (2, seq_len + 1), generator=torch.Generator().manual_seed(seq_len))
        rows = ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None
        for _ in range(2):
            gradients = []
            for function in (loss, eager):
                model.zero_grad()
                function(*rows).backward()
                gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
            torch.testing.assert_close(*gradients)
        assert counter.frame_count == number
        alive.append(len(_debug_get_cache_entry_list(SummedLoss.forward.__code__)))
    assert alive == [1, 2, 3, 4, 1, 2, 3, 4, 1, 2] and max(alive) == COMPILED_SHAPES


def test_compile_says_what_is_missing():
    """Without a compiler on the path the probe answers with what to install; the import alone does nothing."""
    code = (
        "import sys, torch, osler.parallel.compile as compile\n"
        "assert 'torch._inductor.compile_fx' not in sys.modules\n"
        "print(compile.compile_works(torch.device('cpu')))\n"
    )
    environment = {**os.environ, "PATH": "", "CXX": "no-such-compiler", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(False, '") and "C++ compiler" in done.stdout
