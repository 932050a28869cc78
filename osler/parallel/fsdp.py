"""Fully sharded data parallel (FSDP2, ``fully_shard``): each rank keeps a part of every weight and moment.

A model on the ``meta`` device is cut before it has weights, so that no rank ever holds all of them to start with; evaluation
gathers it whole. While micro-batches accumulate, a rank keeps whole gradients, because nothing is sent before the last one; a
batch of one forward pass keeps parts only. A block's weights are gathered in the compute dtype when it computes, and gradients
are reduced in fp32, so the master weights and the sum over ranks are as wide as with one process; only FP8 finds weights that
were rounded to bf16 before it rounds them.
https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from osler.model.loss import ModelLoss
from osler.parallel.config import FsdpConfig
from osler.parallel.engine import ParallelEngine
from osler.runtime.world import World


def share_with_fsdp(loss: ModelLoss, config: FsdpConfig, world: World) -> ParallelEngine:
    """Cut every block, and what lies outside the blocks as one more; the model's parameters become ``DTensor``.

    Those of a model on ``meta`` then have memory for their parts and no values.
    """
    mesh = init_device_mesh(torch.device(world.device).type, (world.size,))
    # The model casts its activations itself.
    policy = MixedPrecisionPolicy(
        param_dtype=loss.model.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in loss.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)
    # Embeddings and head: needed first and last, so they stay from the forward into the backward pass.
    root = fully_shard(loss, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    if any(parameter.is_meta for parameter in loss.parameters()):
        loss.to_empty(device=world.device)
        loss.model.make_tables(torch.device(world.device))

    @contextmanager
    def accumulating() -> Iterator[None]:
        root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            root.set_requires_gradient_sync(True)

    assert isinstance(root, FSDPModule)
    return ParallelEngine(loss, world, accumulating)
