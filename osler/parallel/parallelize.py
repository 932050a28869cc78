"""The one place that turns a single-device model into what the ranks train together.

The order is FP8, recompute, compile, shard: layers are exchanged before anything wraps them (``fp8.py``) and blocks are told to
recompute before they are compiled (``activation_checkpoint.py``), both on the model that comes in here; what is sharded is the
compiled block, so that its hooks stay outside the graph. One process compiles
the whole loss as one graph; several compile block by block, because a block's gradient can then travel while the one before it
still computes. The optimizer is built after this, on the parameters that result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from osler.errors import UserError
from osler.model.loss import ModelLoss, SummedLoss
from osler.model.transformer import Transformer
from osler.parallel.config import DdpConfig, DeepSpeedConfig, FsdpConfig, NoParallelConfig, ParallelConfig
from osler.parallel.ddp import share_with_ddp
from osler.parallel.deepspeed import read_settings, share_with_deepspeed
from osler.parallel.engine import Engine
from osler.parallel.fsdp import share_with_fsdp
from osler.runtime.log import say
from osler.runtime.shapes import with_few_shapes
from osler.runtime.world import World

STRATEGIES: dict[type, Callable[[Any, Any, World], Engine]] = {
    DdpConfig: share_with_ddp,
    FsdpConfig: share_with_fsdp,
    DeepSpeedConfig: share_with_deepspeed,
}


def parallelize(
    model: Transformer,
    config: ParallelConfig,
    world: World,
    *,
    compile: bool,
    loss_of: Callable[[Transformer], ModelLoss] = SummedLoss,
) -> Engine:
    """Make ``model`` ready for its training step, in place; with one process a strategy changes nothing, and that is said.

    Only a ``SummedLoss`` can be compiled, and DeepSpeed takes no other.
    """
    check_strategy(config, world.size)
    loss = loss_of(model)
    if world.size == 1:
        if not isinstance(config, NoParallelConfig):
            say(f"parallel.type={config.type} changes nothing here: it shares the work when torchrun starts several processes.")
        engine = Engine(torch.compile(loss, fullgraph=True, dynamic=False) if compile else loss)
    else:
        if compile:
            assert isinstance(loss, SummedLoss)
            compile_by_block(loss)
        engine = STRATEGIES[type(config)](loss, config, world)
    if compile:
        engine.loss = with_few_shapes(engine.loss)
    return engine


def check_strategy(config: ParallelConfig, processes: int) -> None:
    """Raise UserError for several processes that would each train the same model alone, and for DeepSpeed where it cannot run."""
    if processes > 1 and isinstance(config, NoParallelConfig):
        raise UserError(
            f"{processes} processes were started and parallel.type is none, so each would train the same model alone: set "
            "parallel.type=ddp (or fsdp where the optimizer's state is too large for one GPU), or start one process."
        )
    if isinstance(config, DeepSpeedConfig):
        if processes == 1:
            raise UserError(
                "parallel.type=deepspeed trains on several processes, and one was started: start them with torchrun "
                "--nproc-per-node N -m osler.cli ..., or set parallel.type=none, which trains the same model alone."
            )
        read_settings(config)


def compile_by_block(loss: SummedLoss) -> None:
    """Compile each block, which all share one graph, and the loss behind the last."""
    for block in loss.model.layers:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
    loss.of_hidden = torch.compile(loss.of_hidden, fullgraph=True, dynamic=False)  # type: ignore[method-assign]
