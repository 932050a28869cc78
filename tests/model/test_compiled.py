"""What the compiler makes of the model and its loss, kernels included, against the same run operator by operator."""

from __future__ import annotations

import pytest
import torch

from osler.model.config import ModelConfig
from osler.model.transformer import SummedLoss, Transformer
from osler.ops import attention, cross_entropy
from osler.parallel.compile import compile_works

pytestmark = pytest.mark.usefixtures("no_compiled_code")

SHAPE = {"num_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_compiled_gradients_are_the_plain_ones(dtype: torch.dtype, near: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several pieces of the queries, chunks of the tokens and tiles of the vocabulary, of which the last ends in padding."""
    if not compile_works(torch.device("cpu"))[0]:
        pytest.skip("no C++ compiler here")
    monkeypatch.setattr(attention, "CAUSAL_PIECE", 16)
    monkeypatch.setattr(cross_entropy, "TILE_WORDS", 64)
    monkeypatch.setattr(cross_entropy, "TILED_CHUNK_TOKENS", 128)
    model = Transformer(ModelConfig(**SHAPE, vocab_size=300, max_seq_len=64, head_init="normal", residual_init="scaled"))
    model.init_weights(0)
    ids = torch.randint(0, 300, (3, 65), generator=torch.Generator().manual_seed(1))
    rows = ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None
    found = []
    for compute, run in (
        (torch.float32, SummedLoss(model)),
        (dtype, torch.compile(SummedLoss(model), fullgraph=True, dynamic=False)),
    ):
        model.zero_grad()
        with model.computing_in(compute):
            loss = run(*rows)
            loss.backward()
        found.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    for plain, compiled in zip(*found, strict=True):
        scale = plain.norm()
        assert scale > 0 and (compiled - plain).norm() < near * scale
