"""The one place that turns a single-device model into what the ranks train together, in a fixed order."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from osler.model.transformer import ModelLoss, SummedLoss, Transformer
from osler.optim.bf16 import keep_in_bf16
from osler.parallel.activation_checkpoint import set_recompute
from osler.parallel.compile import compile_loss
from osler.parallel.config import DdpConfig, DeepSpeedConfig, FsdpConfig, NoParallelConfig, ParallelConfig
from osler.parallel.data_parallel import apply_ddp, apply_fsdp
from osler.parallel.deepspeed import DeepSpeedEngine, read_settings
from osler.parallel.engine import ParallelEngine
from osler.parallel.fp8 import convert_to_fp8
from osler.runtime.device import pick_device
from osler.runtime.errors import UserError
from osler.runtime.world import World

logger = logging.getLogger(__name__)

STRATEGIES: dict[type, Callable[[Any, Any, World], ParallelEngine]] = {
    DdpConfig: apply_ddp, FsdpConfig: apply_fsdp, DeepSpeedConfig: DeepSpeedEngine
}  # fmt: skip


def parallelize(
    model: Transformer,
    config: ParallelConfig,
    world: World,
    *,
    precision: str = "auto",
    pass_tokens: Sequence[int] = (),
    recompute: str = "off",
    compile: bool = False,
    loss_of: Callable[[Transformer], ModelLoss] = SummedLoss,
) -> ParallelEngine:
    """Make ``model`` ready for its training step, in place, and return the engine that makes the step.

    The optimizer is built after this, on the parameters that result. ``pass_tokens`` are the tokens of a forward pass of one
    process in each stage. Only a ``SummedLoss`` can be compiled or trained by DeepSpeed. Raises UserError for bad settings.
    """
    check_strategy(config, world.size)
    # The dtype of the weights comes first, because buckets and shards are laid out by it.
    if precision == "pure-bf16":
        keep_in_bf16(model)
    # FP8 replaces layers, so it comes before anything that would keep the old layers.
    if precision == "fp8":
        convert_to_fp8(model, pick_device(world.device), tokens=pass_tokens)
    # Recomputation is inside the compiled function, so that the compiler plans both forward passes of a block.
    set_recompute(model, recompute)
    loss = loss_of(model)
    # Compiling precedes sharding, so that the hooks that gather weights and send gradients stay outside the graphs.
    if compile:
        assert isinstance(loss, SummedLoss)
        compile_loss(loss, by_block=world.size > 1)
    if world.size > 1:
        return STRATEGIES[type(config)](loss, config, world)
    if not isinstance(config, NoParallelConfig):
        logger.info(
            f"parallel.type={config.type} changes nothing here: it shares the work when torchrun starts several processes."
        )
    return ParallelEngine(loss)


def check_strategy(config: ParallelConfig, processes: int) -> None:
    """Raise UserError when several processes would each train the same model alone, or where DeepSpeed cannot run."""
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
