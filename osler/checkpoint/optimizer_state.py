"""The state of an optimizer as named tensors plus JSON, and back, bit for bit.

``torch.optim`` numbers the parameters and casts their state to the parameter's dtype on loading. Here every entry is stored
under the parameter's name and keeps its own dtype, so a resume is exact. Tensors are named ``<parameter>/<entry>``, for example
``layers.0.q_proj.weight/exp_avg``. Hyperparameters are not stored, because they follow from the config and the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from osler.runtime.errors import UserError
from osler.runtime.sharded import shard_like

NamedParameters = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


def flatten_optimizer(
    optimizer: torch.optim.Optimizer, named_parameters: NamedParameters
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of an optimizer as named tensors and JSON.

    ``named_parameters`` names every parameter of the optimizer, as ``model.named_parameters()`` does. The tensors are the
    optimizer's own and change with its next step.
    """
    names = {id(parameter): name for name, parameter in dict(named_parameters).items()}
    tensors: dict[str, Tensor] = {}
    state: dict[str, dict[str, Any]] = {}
    for parameter, entries in optimizer.state.items():
        name = names[id(parameter)]
        state[name] = {}
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value
            state[name][key] = {"tensor": f"{name}/{key}"} if isinstance(value, Tensor) else value
    groups = [{"params": [names[id(parameter)] for parameter in group["params"]]} for group in optimizer.param_groups]
    return tensors, {"groups": groups, "state": state}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, named_parameters: NamedParameters, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    """Restore what ``flatten_optimizer`` returned; the optimizer's next step is then the same bit for bit.

    Tensors are copied to the devices of the parameters. Raises UserError, before anything is changed, when the checkpoint belongs
    to other parameters or groups them in another way.
    """
    parameters = dict(named_parameters)
    names = {id(parameter): name for name, parameter in parameters.items()}
    found = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    saved = [group["params"] for group in state["groups"]]
    if found != saved:
        difference = sorted({name for group in found for name in group} ^ {name for group in saved for name in group})
        detail = f"they differ in {', '.join(difference[:3])}" if difference else "they are grouped or ordered differently"
        raise UserError(
            f"The parameters of the checkpoint's optimizer are not those of this one: {detail}. Resume with the model and "
            "optimizer of the saved run."
        )
    restored: dict[Tensor, dict[str, Any]] = {}
    for name, saved_entries in state["state"].items():
        parameter = parameters[name]
        entries = restored[parameter] = dict(saved_entries)
        for key, value in saved_entries.items():
            if isinstance(value, dict):
                tensor = tensors[value["tensor"]]
                if tensor.shape == parameter.shape:  # copied, to have the memory layout of its parameter
                    like = torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False)
                    entries[key] = like.copy_(shard_like(tensor, parameter))
                else:
                    entries[key] = tensor.to(parameter.device, copy=True)
    optimizer.state.clear()
    optimizer.state.update(restored)
