"""Activation checkpointing: the backward pass computes activations of a block again, which saves memory (arXiv 1604.06174).

``full`` keeps only a block's input, which costs a third more arithmetic. ``selective`` (arXiv 2205.05198) also keeps the results
of projections and of a fused attention, but nothing of attention made of plain matmuls (on a CPU), because its scores would be
the largest tensor. Without a compiler the gradients are the same to the bit.
"""

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
    torch.ops.osler.choose.default,  # slow, because it scores all keys, and its result is small; so is index_all_keys
    torch.ops.osler.gather_attention.default,
    torch.ops.osler.index_all_keys.default,
]


def set_recompute(model: Transformer, mode: str) -> None:
    """Make ``model`` keep everything (``off``), what is expensive (``selective``) or block inputs only (``full``)."""
    if mode == "off":
        return
    # Blocks draw no random numbers, so no generator's state is needed.
    recomputed: Callable[..., Tensor] = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if mode == "selective":
        recomputed = partial(recomputed, context_fn=partial(create_selective_checkpoint_contexts, KEPT))
    # This goes inside the block, so that a compiler sees it and the hooks of FSDP stay outside.
    for block in model.layers:
        block.forward = partial(_run, recomputed, block.forward)


def _run(recomputed: Callable[..., Tensor], forward: Callable[..., Tensor], *args: Any) -> Tensor:
    # Without gradients no backward pass follows, so there is nothing to recompute.
    return recomputed(forward, *args) if torch.is_grad_enabled() else forward(*args)
