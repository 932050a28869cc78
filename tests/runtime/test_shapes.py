"""Compiled versions of many shapes: few are alive, none is made twice in a row, and all compute the same."""

from __future__ import annotations

import functools

import torch

from osler.model.config import ModelConfig
from osler.model.loss import SummedLoss
from osler.model.transformer import Transformer
from osler.parallel.config import NoParallelConfig
from osler.parallel.parallelize import parallelize
from osler.runtime.shapes import COMPILED_SHAPES
from osler.runtime.world import World

LENGTHS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)


def test_ten_lengths_with_at_most_four_compiled_versions_alive(no_compiled_code, monkeypatch):
    """The loss that training compiles, at more lengths than torch allows one function; counted in torch's own cache."""
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list
    from torch._dynamo.testing import CompileCounter

    model = Transformer(ModelConfig(num_layers=1, hidden_size=32, intermediate_size=64, vocab_size=64))
    model.init_weights(0)
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
