"""DeepSpeed's ZeRO (arXiv 1910.02054): the door to an optional library, and its engine in the terms of ours.

DeepSpeed takes over the optimizer's parameters, averages and clips gradients and makes the step itself. Checkpoints are ours: its
functions that put single weights and moments together give the same tensors that any other strategy writes, so a run may change
to ZeRO and back. ZeRO 2 and 3 reduce gradients in every micro-batch. DeepSpeed looks itself for a gradient that is not finite and
skips its step, which waits for the device; a version that makes such a step is refused. https://deepspeed.readthedocs.io
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from osler.checkpoint.state import flatten_optimizer
from osler.errors import UserError
from osler.model.loss import SummedLoss
from osler.model.transformer import Transformer
from osler.ops.labels import IGNORED
from osler.parallel.config import DeepSpeedConfig
from osler.parallel.engine import Engine, Hold
from osler.runtime.files import read_json
from osler.runtime.shapes import with_few_shapes
from osler.runtime.world import World


def share_with_deepspeed(loss: SummedLoss, config: DeepSpeedConfig, world: World) -> Engine:
    """Make ready for ``deepspeed.initialize``; raises UserError when the package is missing."""
    try:
        import deepspeed
    except ImportError:
        raise UserError(
            "parallel.type=deepspeed needs the package DeepSpeed: pip install -e '.[deepspeed]' in Osler's source tree. "
            "parallel.type=fsdp shares weights, gradients and optimizer without it."
        ) from None
    return DeepSpeedEngine(deepspeed, loss, config, world)


class DeepSpeedEngine(Engine):
    """ZeRO behind the interface of a plain engine."""

    leaves_gradients = False

    def __init__(self, deepspeed: Any, module: SummedLoss, config: DeepSpeedConfig, world: World) -> None:
        super().__init__(module, world, self._accumulating)
        self.deepspeed, self.module = deepspeed, module
        self.settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # the loss is normalised already, so DeepSpeed's counting changes nothing
            "gradient_accumulation_steps": 1,
            "bf16": {"enabled": module.model.compute_dtype == torch.bfloat16},
            "zero_optimization": {"stage": config.stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**31,
        }
        if config.config_file is not None:
            self.settings |= read_json(config.config_file)

    def bind(self, optimizer: torch.optim.Optimizer, clip_norm: float) -> None:
        # ZeRO replaces the parameters in these groups by flat parts of its own.
        self.groups = [list(group["params"]) for group in optimizer.param_groups]
        self.inner = self.deepspeed.initialize(
            model=self.module, optimizer=optimizer, config={**self.settings, "gradient_clipping": clip_norm}
        )[0]
        self.loss = with_few_shapes(self.inner)

    @contextmanager
    def _accumulating(self) -> Iterator[None]:
        self.inner.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.inner.set_gradient_accumulation_boundary(True)

    def backward(self, loss: Tensor) -> None:
        self.inner.backward(loss, scale_wrt_gas=False)

    def update(self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        self.inner.step()
        skipped = bool(getattr(self.inner.optimizer, "overflow", False))
        grad_norm = math.inf if skipped else float(self.inner.get_global_grad_norm())
        if not skipped and not 0.0 <= grad_norm < math.inf:  # -1 stands for NaN here
            raise UserError(
                "DeepSpeed made a step with a gradient that is not finite, and the weights are lost: its version "
                f"{self.deepspeed.__version__} does not skip such steps. Install a newer one, or use parallel.type=fsdp; the "
                "same command then goes on from the newest checkpoint."
            )
        return torch.tensor(grad_norm, device=self.inner.device), torch.tensor(float(skipped), device=self.inner.device)

    def parts(
        self, model: Transformer, optimizer: torch.optim.Optimizer, hold: Hold | None = None
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        self._link_moments()
        tools = self.deepspeed.utils
        weights = self.whole_weights(model)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups, state = [], {}
        entries: Mapping[str, Any] = next((entry for entry in optimizer.state.values() if entry), {})
        for group, members in zip(optimizer.param_groups, self.groups, strict=True):
            stand_ins = [weights[names[id(member)]] for member in members]
            groups.append({**group, "params": stand_ins})
            for member, stand_in in zip(members, stand_ins, strict=True):
                state[stand_in] = {
                    key: torch.as_tensor(float(value)) if key == "step" else tools.safe_get_full_optimizer_state(member, key)
                    for key, value in entries.items()
                }
        shadow: Any = SimpleNamespace(param_groups=groups, state=state)
        moments, described = flatten_optimizer(shadow, weights)
        return self._gathered({"model": weights, "optimizer": moments}, hold), described

    def restore(
        self,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
    ) -> None:
        tools, device = self.deepspeed.utils, self.inner.device
        for name, parameter in model.named_parameters():
            value = tensors["model"][name].to(device)
            with self.deepspeed.zero.GatheredParameters(parameter, modifier_rank=0), torch.no_grad():
                parameter.copy_(value)
            tools.safe_set_full_fp32_param(parameter, value)
        self._make_moments(optimizer)
        for name, parameter in model.named_parameters():
            for key in state["state"].get(name, {}):
                moment = tensors["optimizer"][f"{name}/{key}"]
                if key != "step":
                    tools.safe_set_full_optimizer_state(parameter, moment.to(device), key)
                    continue
                for entry in optimizer.state.values():
                    entry["step"] = torch.full_like(entry["step"], float(moment))

    def _make_moments(self, optimizer: torch.optim.Optimizer) -> None:
        """DeepSpeed makes the moments at the first step: make one that has neither gradient nor learning rate."""
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        ids = torch.zeros(1, 2, dtype=torch.int64, device=self.inner.device)
        self.backward(self.loss(ids, torch.full_like(ids, IGNORED), None))
        self.inner.step()
        self._link_moments()

    def _link_moments(self) -> None:
        """Stages 1 and 2 link weights to moments after the first group's first step, and so miss those of the other groups."""
        zero = self.inner.optimizer
        if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def whole_weights(self, model: Transformer) -> dict[str, Tensor]:
        weights = {}
        for name, parameter in model.named_parameters():
            shape = getattr(parameter, "ds_shape", parameter.shape)  # stage 3 leaves an empty parameter on the model
            weights[name] = self.deepspeed.utils.safe_get_full_fp32_param(parameter).view(shape)
        return weights
