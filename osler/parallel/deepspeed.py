"""DeepSpeed's ZeRO: the door to an optional library."""

from __future__ import annotations

from osler.errors import UserError
from osler.model.loss import SummedLoss
from osler.parallel.config import DeepSpeedConfig
from osler.parallel.engine import Engine
from osler.runtime.world import World


def share_with_deepspeed(loss: SummedLoss, config: DeepSpeedConfig, world: World) -> Engine:
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        raise UserError("parallel.type=deepspeed needs DeepSpeed: pip install -e '.[deepspeed]'.") from None
    raise UserError("parallel.type=deepspeed is not connected yet: use fsdp.")
