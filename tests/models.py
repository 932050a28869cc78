"""A model for tests: two layers of 32, whose words differ in probability from the start."""

from typing import Any

import torch

from osler.model.config import ModelConfig
from osler.model.transformer import Transformer

SHAPE: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16,
    "vocab_size": 64, "max_seq_len": 64, "head_init": "normal", "residual_init": "scaled",
}  # fmt: skip


def tiny_model(*, seed: int = 0, compute_dtype: torch.dtype = torch.float32, **changes: Any) -> Transformer:
    model = Transformer(ModelConfig(**{**SHAPE, **changes}), compute_dtype=compute_dtype)
    model.init_weights(seed)
    return model
