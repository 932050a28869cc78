"""SwiGLU feed-forward (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from osler.model.config import ModelConfig
from osler.model.linear import DecodeLinear, Layout, Linear, joint_linear
from osler.model.norm import RMSNorm


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


class DecodeFeedForward:
    """The same with its weights in the layout of decoding, the norm before it included."""

    def __init__(self, trained: FeedForward, norm: RMSNorm, layout: Layout) -> None:
        self._gate_up = DecodeLinear(layout, trained.gate_proj.weight, trained.up_proj.weight, norm=norm)
        self._down = DecodeLinear(layout, trained.down_proj.weight)

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self._gate_up(x).chunk(2, dim=-1)
        return self._down(F.silu(gate) * up)
