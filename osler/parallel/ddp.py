"""Data parallel (torch's DDP): whole copies of the model whose gradients are averaged while the backward pass still runs."""

from __future__ import annotations

import inspect
from typing import Any

import torch._dynamo
from torch.nn.parallel import DistributedDataParallel

from osler.model.loss import ModelLoss
from osler.parallel.config import DdpConfig
from osler.parallel.engine import Engine
from osler.runtime.world import World


def share_with_ddp(loss: ModelLoss, config: DdpConfig, world: World) -> Engine:
    """Wrap the loss, so that DDP sees one forward pass from tokens to a number."""
    # Blocks are compiled one by one and their gradients arrive block by block: torch need not cut graphs for overlap.
    torch._dynamo.config.optimize_ddp = False
    # The only buffers are tables, equal everywhere; torch 2.13 renamed the option that would send them at every step.
    known = inspect.signature(DistributedDataParallel).parameters
    silent: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    wrapped = DistributedDataParallel(loss, gradient_as_bucket_view=True, **silent)
    return Engine(wrapped, world, wrapped.no_sync)
