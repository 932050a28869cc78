"""Torch's own data parallelism: DDP, where every rank has the whole model, and FSDP2, where each keeps a shard of it.

Both average gradients during the backward pass. FSDP2 shards a model on the ``meta`` device, so no rank ever holds all weights
before evaluation gathers them. While micro-batches accumulate, a rank keeps whole gradients. Weights are gathered in the compute
dtype and gradients reduced in fp32, as precisely as with one process; only FP8 gets weights that were rounded to bf16 before.
https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

import inspect
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from osler.model.transformer import ModelLoss
from osler.parallel.config import DdpConfig, FsdpConfig
from osler.parallel.engine import ParallelEngine, switched_off
from osler.runtime.world import World


def apply_ddp(loss: ModelLoss, config: DdpConfig, world: World) -> ParallelEngine:
    """Wrap the loss in DDP, which thus sees one forward pass from tokens to a number."""
    # The buffers are tables, equal on all ranks, and need not be sent in every step; torch 2.13 renamed the option.
    known = inspect.signature(DistributedDataParallel).parameters
    options: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    wrapped = DistributedDataParallel(loss, gradient_as_bucket_view=True, **options)
    if any(parameter.dtype == torch.bfloat16 for parameter in loss.parameters()):
        wrapped.register_comm_hook(None, lambda _, bucket: average_in_fp32(bucket))  # a hook must have no annotations
    exchange = partial(pass_nothing, wrapped, loss)
    # After its first backward pass DDP lays out its gradient buckets for good. The place of a gradient in its bucket decides in
    # which order three or more ranks are summed, so a first step that did this would round differently after a resume.
    exchange()
    for parameter in loss.parameters():
        parameter.grad = None
    return ParallelEngine(wrapped, world, wrapped.no_sync, exchange)


def average_in_fp32(bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average gradients of bf16 parameters in fp32 and round once, as one process does when it adds them up."""
    wide = bucket.buffer().float().div_(dist.get_world_size())
    summed = dist.all_reduce(wide, async_op=True).get_future()
    return summed.then(lambda future: bucket.buffer().copy_(future.value()[0]))


def pass_nothing(wrapped: DistributedDataParallel, loss: ModelLoss) -> None:
    """Run an empty backward pass: DDP averages the gradients that are there, to which it adds zero."""
    learned = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    loss.forward = lambda: sum(0.0 * parameter.sum() for parameter in learned)
    try:
        wrapped().backward()
    finally:
        del loss.forward


def apply_fsdp(loss: ModelLoss, config: FsdpConfig, world: World) -> ParallelEngine:
    """Shard every block, and everything outside the blocks as one more unit; the model's parameters become ``DTensor``.

    The shards of a model on ``meta`` get memory but no values.
    """
    mesh = init_device_mesh(torch.device(world.device).type, (world.size,))
    # The model casts its activations itself.
    policy = MixedPrecisionPolicy(param_dtype=loss.model.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in loss.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)
    # Embeddings and head are needed first and last, so they stay from the forward into the backward pass.
    root = fully_shard(loss, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    if any(parameter.is_meta for parameter in loss.parameters()):
        loss.to_empty(device=world.device)
        loss.model.make_tables(torch.device(world.device))
    return ParallelEngine(loss, world, partial(switched_off, root.set_requires_gradient_sync))
