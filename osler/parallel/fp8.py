"""FP8 for the projections of the blocks, through torchao (the extra ``fp8``).

The three matrix products of a projection run on 8-bit numbers: activations and weights as e4m3, gradients as e5m2 (arXiv
2209.05433), each tensor scaled by its own largest value. Without gradients the ordinary product runs, so the ordinary model is
evaluated, sampled and saved. FP8 pays for wide models: nanochat reports it slower than bf16 at width 768, faster at 1,664.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osler.model.config import ModelConfig
from osler.model.init import is_of_indexer
from osler.model.layers import Linear
from osler.model.transformer import Transformer
from osler.runtime.errors import UserError

logger = logging.getLogger(__name__)

TILE = 16  # the hardware multiplies FP8 matrices in tiles of this size
FIRST_CAPABILITY = (8, 9)  # Ada, the first CUDA devices with FP8; 9.0 is Hopper


def convert_to_fp8(model: Transformer, device: torch.device, *, tokens: Sequence[int]) -> None:
    """Let the projections of ``model`` train in FP8, in place; ``tokens`` are those of a forward pass in each stage."""
    check_shapes(model.config, tokens)
    on_gpu = device.type == "cuda"
    if on_gpu:
        check_gpu(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    else:
        logger.warning("a CPU has no FP8; its rounding is emulated, which is slower than bf16 and good for trials only.")
    layer, config = float8_linear(emulate=not on_gpu)
    for name, module in list(model.layers.named_modules()):
        if isinstance(module, Linear) and not is_of_indexer(f"{name}.weight"):  # the indexer is small, and ranks keys by it
            with torch.device("meta"):
                converted = layer(module.weight.shape[1], module.weight.shape[0], bias=False, config=config)
            converted.weight = module.weight
            model.layers.set_submodule(name, converted)


def check_shapes(config: ModelConfig, tokens: Sequence[int]) -> None:
    """Raise UserError for projections and batches that FP8 hardware cannot multiply."""
    sizes = [("hidden_size", config.hidden_size), ("intermediate_size", config.intermediate_size)]
    sizes += [("num_heads x head_dim", config.query_size), ("num_kv_heads x head_dim", config.kv_size)]
    sizes += [("tokens of a forward pass (rows of one process x seq_len)", each) for each in tokens]
    uneven = [f"{name} {size:,}" for name, size in sizes if size % TILE]
    if uneven:
        raise UserError(
            f"precision=fp8 needs multiples of {TILE}, and these are not: {', '.join(uneven)}. Change them, or use "
            "precision=bf16."
        )


def check_gpu(name: str, capability: tuple[int, int]) -> None:
    """Raise UserError for a GPU without FP8."""
    if capability < FIRST_CAPABILITY:
        raise UserError(
            f"precision=fp8 needs a GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell); {name} has "
            f"{capability[0]}.{capability[1]}. Use precision=bf16."
        )


@functools.cache
def float8_linear(emulate: bool) -> tuple[Callable[..., nn.Linear], Any]:
    """Return the class of a projection in FP8 and torchao's configuration for it; raises UserError without torchao."""
    for name in ("torchao", "torch.utils._pytree"):  # they warn about kernels for another Python, and about each other
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        from torchao.float8 import Float8LinearConfig
        from torchao.float8.float8_linear import Float8Linear
    except ImportError as error:
        raise UserError(
            f"precision=fp8 needs torchao ({error}): pip install -e '.[fp8]' in Osler's source tree, or use precision=bf16."
        ) from error

    class Float8Projection(Float8Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if torch.is_grad_enabled() else F.linear(x, self.weight.to(x.dtype))

    return Float8Projection, Float8LinearConfig(emulate=emulate)  # its defaults are tensorwise and dynamic
