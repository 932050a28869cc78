"""Muon for the matrices and AdamW for everything else, in one optimizer.

Muon (Keller Jordan, 2024, kellerjordan.github.io/posts/muon) moves a matrix along its Nesterov momentum with all singular values
made equal, so that a few directions cannot take the whole step. A quintic Newton-Schulz iteration approximates that with matmuls:
singular values end between about 0.7 and 1.2, which learns as well as exactly 1. An update is scaled by ``sqrt(max(1, rows /
columns))``, which makes its effect on the outputs the same for every shape, so one learning rate serves all matrices and widths
(arXiv 2310.17813). Embeddings, head and vectors do not map hidden states to each other and stay with AdamW.

Matrices of equal shape are orthogonalised in one batched call. The ranks of a process group share its work and gather the same
bits; sharded parameters (DTensor, from FSDP2) are gathered before it. A step with ``found_inf`` = 1 changes nothing, and the host
does not wait for that tensor.

Shapes: S matrices of a stack, M rows, N columns (of the shard, where parameters are sharded).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.sgd import sgd

from osler.runtime.sharded import shard_like, whole

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # chosen for the steepest rise at zero, not for convergence to 1
EPS = 1e-7
STACK_ELEMENTS = 1 << 26  # bounds the memory beside parameters and state: a step holds a handful of stacks at once
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in newer versions of torch


def orthogonalize(matrices_SMN: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Return each matrix with its singular values pulled towards 1, in ``dtype``; zero stays zero."""
    a, b, c = NEWTON_SCHULZ
    norm_S11 = torch.linalg.vector_norm(matrices_SMN, dim=(1, 2), keepdim=True, dtype=torch.float32)
    x_SMN = (matrices_SMN / norm_S11.clamp(min=EPS)).to(dtype)
    tall = x_SMN.shape[1] > x_SMN.shape[2]
    for _ in range(steps):  # x ← a x + b (xxᵀ) x + c (xxᵀ)² x, with the smaller of the two Gram matrices
        gram = x_SMN.mT @ x_SMN if tall else x_SMN @ x_SMN.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x_SMN = torch.baddbmm(x_SMN, *((x_SMN, polynomial) if tall else (polynomial, x_SMN)), beta=a)
    return x_SMN


class Muon(torch.optim.Optimizer):
    """Muon on the group named ``matrices``, torch's fused AdamW on all others; these have AdamW's options.

    Newton-Schulz runs in ``dtype``. The ranks of ``process_group`` hold the same parameters and gradients, whole or
    sharded, and share the work; without a group every rank does all of it.
    """

    found_inf: Tensor | None = None

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, dtype: torch.dtype, process_group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__(groups, {})
        self.dtype = dtype
        self.process_group = process_group
        self.world_size = 1 if process_group is None else dist.get_world_size(process_group)
        self.matrices = [group for group in self.param_groups if group["name"] == "matrices"]
        for parameter in (parameter for group in self.matrices for parameter in group["params"]):
            if parameter.dim() != 2:
                raise ValueError(f"Muon takes matrices, not a parameter of shape {tuple(parameter.shape)}")
        others = [group for group in self.param_groups if group["name"] != "matrices"]
        self.adamw = torch.optim.AdamW(others, fused=True) if others else None
        if self.adamw is not None:
            self.adamw.state = self.state  # the groups are shared too

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, or none where the tensor ``self.found_inf`` is 1."""
        found_inf = None if self.found_inf is None else whole(self.found_inf)
        for group in self.matrices:
            waiting: list[tuple[list[Tensor], Callable[[], Tensor]]] = []
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for stack in equal_shapes(parameters, self.world_size):
                waiting.append((stack, self._orthogonalize(stack, self._advance(stack, group, found_inf), group)))
                if len(waiting) > 1:  # a stack is gathered from the ranks while the next one is computed
                    self._apply(*waiting.pop(0), group, found_inf)
            for last in waiting:
                self._apply(*last, group, found_inf)
        if self.adamw is not None:
            self.adamw.found_inf = found_inf  # type: ignore[attr-defined]
            self.adamw.step()

    def _advance(self, stack: Sequence[Tensor], group: dict[str, Any], found_inf: Tensor | None) -> Tensor:
        """Add the gradients of a stack to its momenta, and return the Nesterov updates."""
        for parameter in stack:
            if parameter not in self.state:
                self.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
        momenta = [local(self.state[parameter]["momentum_buffer"]) for parameter in stack]
        gradients = [local(parameter.grad) for parameter in stack]
        # A step of ascent with full decay moves the momentum towards the gradient by a share of the distance.
        fused_descent(momenta, gradients, 1 - group["momentum"], 1.0, found_inf, maximize=True)
        return torch.stack(torch._foreach_lerp(gradients, momenta, group["momentum"]))

    def _orthogonalize(self, stack: Sequence[Tensor], update_SMN: Tensor, group: dict[str, Any]) -> Callable[[], Tensor]:
        """Orthogonalise a stack, or this rank's share of it, and return a function that waits for the whole stack."""
        like = stack[0]
        if isinstance(like, DTensor):
            sharded: Callable[..., DTensor] = partial(DTensor.from_local, shape=like.shape, stride=like.stride())
            shards_SMN = update_SMN.to(self.dtype)  # cast first: half the bytes to send
            update_SMN = torch.stack([sharded(shard, like.device_mesh, like.placements).full_tensor() for shard in shards_SMN])
        steps = group["newton_schulz_steps"]
        if self.world_size == 1:
            done_SMN = orthogonalize(update_SMN, steps, self.dtype)
            return lambda: done_SMN
        share = -(-len(stack) // self.world_size)
        first = share * dist.get_rank(self.process_group)
        own = update_SMN[first : first + share]
        own_SMN = update_SMN.new_zeros(share, *update_SMN.shape[1:], dtype=self.dtype)  # the last ranks may have less
        own_SMN[: len(own)] = orthogonalize(own, steps, self.dtype)
        all_SMN = own_SMN.new_empty(share * self.world_size, *own_SMN.shape[1:])
        work = all_gather(all_SMN, own_SMN, group=self.process_group, async_op=True)

        def gathered() -> Tensor:
            work.wait()  # on a GPU the stream waits, not the host
            return all_SMN

        return gathered

    def _apply(
        self, stack: Sequence[Tensor], directions: Callable[[], Tensor], group: dict[str, Any], found_inf: Tensor | None
    ) -> None:
        """Decay the weights of a stack and move them against their directions."""
        weights = [local(parameter) for parameter in stack]
        directions_SMN = directions().to(weights[0].dtype)
        matrices = [local(shard_like(matrix, like)) for matrix, like in zip(directions_SMN[: len(stack)], stack, strict=True)]
        rows, columns = stack[0].shape
        scale = math.sqrt(max(1.0, rows / columns))
        fused_descent(weights, matrices, group["lr"] * scale, group["weight_decay"] / scale, found_inf)


def fused_descent(
    weights: list[Tensor], directions: list[Tensor], lr: float, weight_decay: float, found_inf: Tensor | None, **how: bool
) -> None:
    """Compute ``weights -= lr · (directions + weight_decay · weights)`` in one kernel; ``maximize`` negates directions.

    The kernel is torch's fused SGD, because that leaves everything as it is where ``found_inf`` is 1.
    """
    no_momentum: dict[str, Any] = {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "maximize": False}
    options = no_momentum | how | {"lr": lr, "weight_decay": weight_decay, "found_inf": found_inf}
    sgd(weights, directions, [None] * len(weights), fused=True, **options)


def equal_shapes(parameters: Iterable[Tensor], multiple: int) -> Iterator[list[Tensor]]:
    """Yield lists of matrices that can be stacked: equal shape, dtype and device.

    A list has at most ``STACK_ELEMENTS``, but at least ``multiple`` matrices if there are that many. Its length is a multiple of
    ``multiple``, except for the last list of a shape.
    """
    by_shape: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        by_shape.setdefault((parameter.shape, parameter.dtype, parameter.device), []).append(parameter)
    for found in by_shape.values():
        size = max(1, STACK_ELEMENTS // found[0].numel() // multiple) * multiple
        yield from (found[start : start + size] for start in range(0, len(found), size))


def local(tensor: Tensor | None) -> Tensor:
    """Return this rank's part of a tensor, in the same memory."""
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
