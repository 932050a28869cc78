"""Data parallelism (torch's DDP): every rank has the whole model, and gradients are averaged during the backward pass."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from osler.model.loss import ModelLoss
from osler.parallel.config import DdpConfig
from osler.parallel.engine import ParallelEngine
from osler.runtime.world import World


def apply_ddp(loss: ModelLoss, config: DdpConfig, world: World) -> ParallelEngine:
    """Wrap the loss, so that DDP sees one forward pass from tokens to a number."""
    # The buffers are tables, equal on all ranks, and need not be sent in every step; torch 2.13 renamed the option.
    known = inspect.signature(DistributedDataParallel).parameters
    options: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    wrapped = DistributedDataParallel(loss, gradient_as_bucket_view=True, **options)
    if any(parameter.dtype == torch.bfloat16 for parameter in loss.parameters()):
        wrapped.register_comm_hook(None, lambda _, bucket: average_in_fp32(bucket))  # whose annotations must be none
    lay_out_buckets(wrapped, loss)
    return ParallelEngine(wrapped, world, wrapped.no_sync)


def average_in_fp32(bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average gradients of bf16 parameters in fp32 and round once, as one process does that adds them up."""
    wide = bucket.buffer().float().div_(dist.get_world_size())
    summed = dist.all_reduce(wide, async_op=True).get_future()
    return summed.then(lambda future: bucket.buffer().copy_(future.value()[0]))


def lay_out_buckets(wrapped: DistributedDataParallel, loss: ModelLoss) -> None:
    """Run an empty backward pass, after which DDP lays out its gradient buckets for good.

    The place of a gradient in its bucket decides in which order three or more ranks are summed. If the first step laid the
    buckets out, the first step after a resume would round differently from the same step of an uninterrupted run.
    """
    learned = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    loss.forward = lambda: sum(0.0 * parameter.sum() for parameter in learned)
    try:
        wrapped().backward()
    finally:
        del loss.forward
    for parameter in learned:
        parameter.grad = None
