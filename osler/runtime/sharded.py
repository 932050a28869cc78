"""From tensors that are sharded over the ranks (``DTensor``) to whole ones and back, for checkpoints and initialisation.

Whole tensors make a checkpoint independent of the ranks and the strategy that wrote it. Plain tensors pass through unchanged.
Nothing is computed, so values stay exact. All ranks must call these functions together.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a rank holds only its shard."""
    # Importing torch.distributed.tensor to ask for the class would take a second.
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor that the shards of all ranks make together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def gather_whole(
    tensors: Mapping[str, Tensor], *, keep: bool, to_host: Callable[[str, Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """Return whole tensors, or none on a rank that does not ``keep`` them.

    Sharded ones are gathered and put on the host one at a time, by ``to_host(name, tensor)`` if it is given.
    """
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if keep and is_sharded(tensor):
            full = full.cpu() if to_host is None else to_host(name, full)
        if keep:
            kept[name] = full
    return kept


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor sharded like ``like``; every rank has the same ``value``, so nothing is sent."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def put_whole(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole ``value`` into a tensor that may be sharded."""
    if tensor.shape != value.shape:  # ``copy_`` would broadcast
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} cannot take one of {tuple(value.shape)}")
    tensor.copy_(shard_like(value, tensor))


@torch.no_grad()
def load_whole(model: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load a state dict of whole tensors into a model that may be sharded, one tensor at a time."""
    own = model.state_dict()
    if own.keys() != tensors.keys():
        raise ValueError(f"the model and what is loaded differ in {', '.join(sorted(own.keys() ^ tensors.keys()))}")
    for name, value in tensors.items():
        put_whole(own[name], value)
