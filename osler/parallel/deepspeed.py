"""DeepSpeed's ZeRO (arXiv 1910.02054), an optional library, behind the interface of ``ParallelEngine``.

DeepSpeed averages and clips gradients and makes the step; ZeRO 2 and 3 reduce gradients in every micro-batch. Checkpoints are
Osler's, so a run may change to ZeRO and back. DeepSpeed itself skips a step whose gradient is not finite, and waits for the
device to know. A trial before the first batch finds versions that make such a step, and Osler refuses them.
https://deepspeed.readthedocs.io
"""

import importlib.util
import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from osler.checkpoint.optimizer_state import flatten_optimizer
from osler.model.transformer import SummedLoss, Transformer
from osler.ops.labels import IGNORED
from osler.parallel.config import DeepSpeedConfig
from osler.parallel.engine import ParallelEngine, Tensors, switched_off
from osler.runtime.errors import UserError
from osler.runtime.files import read_json
from osler.runtime.world import World

logger = logging.getLogger(__name__)

# Keys of DeepSpeed's own JSON that the recipe sets.
DECIDED = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"}
DECIDED |= {"optimizer", "scheduler", "bf16", "fp16"}


def read_settings(config: DeepSpeedConfig) -> dict[str, Any]:
    """Return the user's settings of DeepSpeed; raises UserError without the package and for settings that the run decides."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "parallel.type=deepspeed needs the package DeepSpeed: pip install -e '.[deepspeed]' in Osler's source tree. "
            "parallel.type=fsdp shares weights, gradients and optimizer without it."
        )
    settings: dict[str, Any] = {"zero_optimization": {"stage": config.stage}}
    if config.config_file is None:
        return settings
    given = read_json(config.config_file)
    if not isinstance(given, dict):
        raise UserError(f"parallel.config_file {config.config_file} holds no JSON object with DeepSpeed's settings.")
    if twice := DECIDED & given.keys():
        keys = ", ".join(sorted(twice))
        raise UserError(f"parallel.config_file {config.config_file} sets {keys}: leave that out, the recipe decides it.")
    return settings | given


class DeepSpeedEngine(ParallelEngine):
    """Training by DeepSpeed's engine, which exists from ``bind`` on."""

    leaves_gradients = False

    def __init__(self, loss: SummedLoss, config: DeepSpeedConfig, world: World) -> None:
        """Prepare for ``deepspeed.initialize``, which needs the optimizer; raises UserError where ``read_settings`` does."""
        super().__init__(lambda *rows: self.inner(*rows), world)
        own = read_settings(config)
        stage = own["zero_optimization"].get("stage")
        if stage != config.stage:
            logger.info(f"{config.config_file} sets ZeRO stage {stage}, in place of parallel.stage={config.stage}.")
        import deepspeed

        self.deepspeed, self.module = deepspeed, loss
        self.settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # the loss is normalised already, so DeepSpeed's counting changes nothing
            "gradient_accumulation_steps": 1,
            "bf16": {"enabled": loss.model.compute_dtype == torch.bfloat16, "check_grad_overflow": True},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**31,
            **own,
        }

    def bind(self, optimizer: torch.optim.Optimizer, clip_norm: float) -> None:
        # ZeRO replaces the parameters in these groups by flat shards of its own.
        self.groups = [list(group["params"]) for group in optimizer.param_groups]
        self.inner = self.deepspeed.initialize(
            model=self.module, optimizer=optimizer, config={**self.settings, "gradient_clipping": clip_norm}
        )[0]
        self.accumulating = partial(switched_off, self.inner.set_gradient_accumulation_boundary)
        self._require_skipping(optimizer)
        self._make_moments(optimizer)

    def backward(self, loss: Tensor) -> None:
        self.inner.backward(loss, scale_wrt_gas=False)

    def update(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], apart: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor]:
        self.inner.step()
        skipped = not self.inner.was_step_applied()
        grad_norm = math.inf if skipped else float(self.inner.get_global_grad_norm())
        return torch.tensor(grad_norm, device=self.inner.device), torch.tensor(float(skipped), device=self.inner.device)

    def _tensors(self, model: Transformer, optimizer: torch.optim.Optimizer) -> tuple[Tensors, Tensors, dict[str, Any]]:
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
        return weights, *flatten_optimizer(shadow, weights)

    def restore(
        self, model: Transformer, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensors], state: Mapping[str, Any]
    ) -> None:
        tools, device = self.deepspeed.utils, self.inner.device
        for name, parameter in model.named_parameters():
            value = tensors["model"][name].to(device)
            with self.deepspeed.zero.GatheredParameters(parameter, modifier_rank=0), torch.no_grad():
                parameter.copy_(value)
            tools.safe_set_full_fp32_param(parameter, value)
        self._try_step(optimizer, 1.0)  # DeepSpeed makes the moments and connects them in the first step
        for name, parameter in model.named_parameters():
            for key in state["state"].get(name, {}):
                moment = tensors["optimizer"][f"{name}/{key}"]
                if key != "step":
                    tools.safe_set_full_optimizer_state(parameter, moment.to(device), key)
                    continue
                for entry in optimizer.state.values():
                    entry["step"] = torch.full_like(entry["step"], float(moment))

    def _try_step(self, optimizer: torch.optim.Optimizer, scale: float) -> None:
        """Make a step with a learning rate of 0 and a gradient of zero times ``scale``."""
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        ids = torch.zeros(1, 2, dtype=torch.int64, device=self.inner.device)
        with torch.compiler.set_stance("force_eager"):  # this shape does not come again
            self.backward(self.inner(ids, torch.full_like(ids, IGNORED), None) * scale)
        self.inner.step()

    def _require_skipping(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise UserError when DeepSpeed makes a step with a gradient of NaN, which would destroy the weights."""
        log = self.deepspeed.utils.logger
        level = log.level
        log.setLevel("ERROR")  # DeepSpeed warns of every step that it skips
        self._try_step(optimizer, math.nan)
        log.setLevel(level)
        if self.inner.was_step_applied():
            raise UserError(
                f"DeepSpeed {self.deepspeed.__version__} does not skip a step whose gradient is not finite, so one such step "
                "would cost the run its weights: install a newer version (pip install -U deepspeed), or use parallel.type=fsdp."
            )

    def _make_moments(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the moments, all zero, of the flat shards of stages 1 and 2 before the first step; the trial's learning rate is 0.

        DeepSpeed connects weights and moments once, after the first step of the first parameter group, so moments of the other
        groups must exist by then. Stage 3 has no such flat shards.
        """
        flats = [flat for group in optimizer.param_groups for flat in group["params"]]
        kept = [flat.grad for flat in flats]
        for flat in flats:
            flat.grad = torch.zeros_like(flat)
        optimizer.step()
        for flat, grad in zip(flats, kept, strict=True):
            flat.grad = grad
            optimizer.state[flat]["step"].zero_()

    def whole_weights(self, model: Transformer) -> dict[str, Tensor]:
        weights = {}
        for name, parameter in model.named_parameters():
            shape = getattr(parameter, "ds_shape", parameter.shape)  # stage 3 leaves an empty parameter on the model
            weights[name] = self.deepspeed.utils.safe_get_full_fp32_param(parameter).view(shape)
        return weights
