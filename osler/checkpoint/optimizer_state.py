"""The state of an optimizer as named tensors plus JSON, and back, bit for bit.

``torch.optim`` numbers the parameters and casts their state to the parameter's dtype on loading. Here every entry is stored
under the parameter's name and keeps its own dtype, so a resume is exact. Tensors are named ``<parameter>/<entry>``, for example
``layers.0.q_proj.weight/exp_avg``, and ``group.<index>/<entry>``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from osler.runtime.errors import UserError
from osler.runtime.sharded import shard_like

NamedParameters = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]

# These choose an implementation of the same update; the machine that resumes decides them for itself.
_IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable")


def flatten_optimizer(
    optimizer: torch.optim.Optimizer, named_parameters: NamedParameters
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state and hyperparameters of an optimizer as named tensors and JSON.

    ``named_parameters`` names every parameter of the optimizer, as ``model.named_parameters()`` does. The tensors are the
    optimizer's own and change with its next step.
    """
    names = {id(parameter): name for name, parameter in dict(named_parameters).items()}
    tensors: dict[str, Tensor] = {}
    groups, state = [], {}
    for index, group in enumerate(optimizer.param_groups):
        options = {key: value for key, value in group.items() if key != "params" and key not in _IMPLEMENTATION}
        group_names = [names[id(parameter)] for parameter in group["params"]]
        groups.append({"params": group_names, "options": _split(f"group.{index}", options, tensors)})
        for parameter, name in zip(group["params"], group_names, strict=True):
            if parameter in optimizer.state:
                state[name] = _split(name, optimizer.state[parameter], tensors)
    return tensors, {"groups": groups, "state": state}


def _split(prefix: str, entries: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Move the tensors among ``entries`` to ``tensors`` and return the rest as JSON, with tuples marked and tensors named."""
    plain: dict[str, Any] = {}
    for key, value in entries.items():
        if isinstance(value, Tensor):
            tensors[f"{prefix}/{key}"] = value
            plain[key] = {"tensor": f"{prefix}/{key}"}
        else:
            plain[key] = {"tuple": list(value)} if isinstance(value, tuple) else value
    return plain


def restore_optimizer(
    optimizer: torch.optim.Optimizer, named_parameters: NamedParameters, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    """Restore what ``flatten_optimizer`` returned; the optimizer's next step is then the same bit for bit.

    Tensors are copied to the devices of the parameters. Hyperparameters (learning rate, betas, weight decay) come from the
    checkpoint; the implementation of the update (fused or not) stays as built. Raises UserError, before anything is changed,
    when the checkpoint belongs to other parameters or groups them otherwise.
    """
    parameters = dict(named_parameters)
    names = {id(parameter): name for name, parameter in parameters.items()}
    found = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    saved = [group["params"] for group in state["groups"]]
    if found != saved:
        difference = sorted({*chain(*found)} ^ {*chain(*saved)})
        detail = f"they differ in {', '.join(difference[:3])}" if difference else "they are grouped or ordered differently"
        raise UserError(
            f"The parameters of the checkpoint's optimizer are not those of this one: {detail}. Resume with the model and "
            "optimizer of the saved run."
        )
    restored: dict[Tensor, dict[str, Any]] = {}
    for group, group_names in zip(optimizer.param_groups, found, strict=True):
        step_on_device = bool(group.get("fused") or group.get("capturable"))
        for name in filter(state["state"].__contains__, group_names):
            entries, parameter = _joined(state["state"][name], tensors), parameters[name]
            restored[parameter] = {key: _place(key, value, parameter, step_on_device) for key, value in entries.items()}
    for group, saved_group in zip(optimizer.param_groups, state["groups"], strict=True):
        for key, value in _joined(saved_group["options"], tensors).items():
            group[key] = value.clone() if isinstance(value, Tensor) else value
    optimizer.state.clear()
    optimizer.state.update(restored)


def _joined(entries: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what ``_split`` was given."""
    joined: dict[str, Any] = {}
    for key, value in entries.items():
        if not isinstance(value, dict):
            joined[key] = value
        elif "tuple" in value:
            joined[key] = tuple(value["tuple"])
        elif value["tensor"] in tensors:
            joined[key] = tensors[value["tensor"]]
        else:
            raise UserError(f"The checkpoint's optimizer lacks the tensor {value['tensor']!r}.")
    return joined


def _place(key: str, value: Any, parameter: Tensor, step_on_device: bool) -> Any:
    """Return a copy of a state entry on the device and in the memory order of its parameter, where the optimizer expects it."""
    if not isinstance(value, Tensor):
        return value
    if key == "step" and value.dim() == 0 and not step_on_device:
        return value.clone()  # unless fused, torch counts steps on the CPU
    if value.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(shard_like(value, parameter))
    return value.to(parameter.device, copy=True)
