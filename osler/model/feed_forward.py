"""SwiGLU feed-forward (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from osler.model.config import ModelConfig
from osler.model.linear import Linear, joint_linear


class FeedForward(nn.Module):
    """Gate, up and down projections without biases."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = joint_linear(x, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up)
