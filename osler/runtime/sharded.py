"""Between tensors that are cut over the ranks (``DTensor``) and the whole ones that a checkpoint or an initialisation knows.

A checkpoint is the same whoever wrote it, so it goes on with any number of ranks and any strategy. Plain tensors pass through
unchanged. Exact: nothing is computed, parts are only put together and cut. The functions are collective.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a rank holds only its part (asked without importing ``torch.distributed.tensor``, which takes a second)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The tensor that all ranks' parts make together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def gathered(
    tensors: Mapping[str, Tensor], *, keep: bool, to_host: Callable[[str, Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """Whole tensors, for the rank that keeps them; sharded ones are put together one at a time and leave the device at once.

    ``to_host(name, tensor)`` says how such a one leaves it; without, by a copy that is waited for.
    """
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if keep and is_sharded(tensor):
            full = full.cpu() if to_host is None else to_host(name, full)
        if keep:
            kept[name] = full
    return kept


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, cut like ``like``; every rank gives the same ``value``, so none is sent."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    value = value.to(like.device)
    cut: Tensor = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return cut


@torch.no_grad()
def put_whole(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole ``value`` into a tensor that may be cut: each rank takes its part."""
    if tensor.shape != value.shape:  # would be broadcast
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} cannot take one of {tuple(value.shape)}")
    tensor.copy_(part_of(value, tensor))


@torch.no_grad()
def load_whole(model: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load a state dict of whole tensors into a model whose own may be cut, one tensor at a time."""
    own = model.state_dict()
    if own.keys() != tensors.keys():
        raise ValueError(f"the model and what is loaded differ in {', '.join(sorted(own.keys() ^ tensors.keys()))}")
    for name, value in tensors.items():
        put_whole(own[name], value)
