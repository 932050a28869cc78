"""How several processes train one model together; a recipe chooses the ``type``. Torch-free."""

from typing import Annotated, Literal

from osler.config.schema import TAGGED, config

COMPILE_MIN_STEPS = 100  # compiling costs 10 seconds to a minute; shorter runs end sooner without it


@config
class NoParallelConfig:
    """One process."""

    type: Literal["none"] = "none"


@config
class DdpConfig:
    """Every process holds the whole model and optimizer, and gradients are averaged. The fastest type if memory allows it."""

    type: Literal["ddp"] = "ddp"


@config
class FsdpConfig:
    """Every process holds a shard of weights, gradients and optimizer (FSDP2); a block is gathered when it computes."""

    type: Literal["fsdp"] = "fsdp"
    reshard_after_forward: bool = True  # gather a block again for its backward pass; False: keep it, more memory and fewer waits


@config
class DeepSpeedConfig:
    """DeepSpeed's ZeRO (an extra) shards the optimizer (stage 1), the gradients too (2), and the weights too (3)."""

    type: Literal["deepspeed"] = "deepspeed"
    stage: Literal[1, 2, 3] = 2  # the stage of ZeRO
    config_file: str | None = None  # DeepSpeed's own JSON, whose zero_optimization then replaces stage


ParallelConfig = Annotated[NoParallelConfig | DdpConfig | FsdpConfig | DeepSpeedConfig, TAGGED]
