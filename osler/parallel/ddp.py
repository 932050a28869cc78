"""Data parallel (torch's DDP): whole copies of the model whose gradients are averaged while the backward pass still runs."""

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


def share_with_ddp(loss: ModelLoss, config: DdpConfig, world: World) -> ParallelEngine:
    """Wrap the loss, so that DDP sees one forward pass from tokens to a number."""
    # The only buffers are tables, equal everywhere; torch 2.13 renamed the option that would send them at every step.
    known = inspect.signature(DistributedDataParallel).parameters
    silent: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    wrapped = DistributedDataParallel(loss, gradient_as_bucket_view=True, **silent)
    if any(parameter.dtype == torch.bfloat16 for parameter in loss.parameters()):
        wrapped.register_comm_hook(None, lambda _, bucket: average_in_fp32(bucket))  # whose annotations must be none
    settle_buckets(wrapped, loss)
    return ParallelEngine(wrapped, world, wrapped.no_sync)


def average_in_fp32(bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average the gradients of bf16 parameters as exactly as one process adds them up: rounded once, behind the sum."""
    wide = bucket.buffer().float().div_(dist.get_world_size())
    sent = dist.all_reduce(wide, async_op=True).get_future()
    return sent.then(lambda future: bucket.buffer().copy_(future.value()[0]))


def settle_buckets(wrapped: DistributedDataParallel, loss: ModelLoss) -> None:
    """Let DDP lay out its gradient buckets now: it does so once, after its first backward pass, which here computes nothing.

    The place of a gradient in its bucket decides in which order three or more ranks are summed. Were it the first step that lays
    the buckets out, the first step after a resume would round differently from the same step of a run that was never interrupted.
    """
    learned = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    loss.forward = lambda: sum(0.0 * parameter.sum() for parameter in learned)
    try:
        wrapped().backward()
    finally:
        del loss.forward
    for parameter in learned:
        parameter.grad = None
