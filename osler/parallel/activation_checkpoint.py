"""Memory for time: activations of a block that the backward pass computes again instead of keeping (arXiv 1604.06174).

A training step keeps, for every block, what its gradients need, and in a deep model that outweighs the weights. ``full`` keeps
the block's input only and runs the block a second time in the backward pass, a third more arithmetic. ``selective`` (arXiv
2205.05198) also keeps what is dear to compute, the results of the projections and of a fused attention, and computes again what
is cheap: norms, RoPE, SwiGLU, casts. Of attention made of plain matmuls (on a CPU) nothing is kept, because the scores, tokens ×
tokens per head, would be the largest thing of all. The gradients are the same to the bit where the kernels are (eager). Blocks,
parameter names and checkpoints stay as they are; there is no state.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from osler.model.transformer import Transformer

_aten = torch.ops.aten
KEPT = [
    _aten.mm.default,
    _aten._scaled_mm.default,  # the FP8 product
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
]


def set_recompute(model: Transformer, mode: str) -> None:
    """Make a new ``model`` keep everything (``off``), what is dear to compute (``selective``) or block inputs only (``full``)."""
    if mode == "off":
        return
    # Blocks draw no random numbers, so there is no state of a generator to keep.
    again: Callable[..., Tensor] = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if mode == "selective":
        again = partial(again, context_fn=partial(create_selective_checkpoint_contexts, KEPT))
    # Inside the block, so that a compiler sees both, and so that the hooks of FSDP stay outside.
    for block in model.layers:
        block.forward = partial(_run, again, block.forward)


def _run(again: Callable[..., Tensor], forward: Callable[..., Tensor], *args: Any) -> Tensor:
    # Without gradients nothing is kept for a backward pass that never comes.
    return again(forward, *args) if torch.is_grad_enabled() else forward(*args)
