"""Small models of every dense shape in folders of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from osler.checkpoint import store
from osler.inference.load import describing_files
from osler.tokenizer.bpe import Tokenizer
from tests.models import tiny_model

SHAPES: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_embeddings": True, "norm_weight": True, "qk_norm_weight": True},
    "factorized": {"embed_rank": 16, "norm_weight": True},
    "head_dim_72": {"head_dim": 72, "num_heads": 4, "num_kv_heads": 2},
}


@pytest.fixture
def checkpoint(tiny, tmp_path) -> Callable[..., Path]:
    """``checkpoint(tokenizer=..., training=..., **shape)`` is the run of an untrained model; its 532 words have 576 rows."""

    def save(tokenizer: Tokenizer | None = None, training: str = "", **shape: Any) -> Path:
        model = tiny_model(seed=1, **{"vocab_size": 532, **shape})
        with torch.no_grad():  # norm weights start at one, where a forgotten one would not be noticed
            for name, weight in model.named_parameters():
                if name.endswith("norm.weight"):
                    weight.copy_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(len(name))) + 0.5)
        files = describing_files(model.config, tokenizer or Tokenizer.load(tiny.tokenizer))
        files |= {"config.yaml": training.encode()} if training else {}
        store.save(tmp_path / "run" / "checkpoints", 0, tensors={"model": model.state_dict()}, state={}, files=files)
        return tmp_path / "run"

    return save
