"""Fully sharded data parallelism (FSDP2, ``fully_shard``): each rank keeps a shard of every weight and moment.

A model on the ``meta`` device is sharded before it has weights, so no rank ever needs to hold all of them; only evaluation
gathers the model. While micro-batches accumulate, a rank keeps whole gradients, because nothing is sent before the last one; a
batch of one forward pass keeps shards only. Weights are gathered in the compute dtype and gradients are reduced in fp32, so the
weights and the sum over the ranks are as wide as with one process. Only FP8 differs: it gets weights that were rounded to bf16
before. https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
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


def apply_fsdp(loss: ModelLoss, config: FsdpConfig, world: World) -> ParallelEngine:
    """Shard every block, and what lies outside of the blocks as one more unit; the model's parameters become ``DTensor``.

    The shards of a model on ``meta`` get memory but no values.
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
