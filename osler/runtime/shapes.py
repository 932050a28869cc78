"""How many shapes a compiled function keeps code for.

``torch.compile`` with static shapes makes one version of a function for each shape, keeps them all, and gives up on a function
with more than dynamo's ``recompile_limit`` of them (8): with ``fullgraph=True`` by an error, in the middle of a run. A run whose
shapes come one after another, as the lengths of a curriculum do, needs the last few only. No state that a resume would need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

COMPILED_SHAPES = 4  # alive at once


def with_few_shapes(compiled: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function of a tensor and more, which lets go of all compiled code when a shape too many of the tensor comes.

    Everything that this process has compiled goes, and is compiled anew when it is next called, because torch has no public way
    to drop one function's code. It happens once in ``COMPILED_SHAPES`` new shapes, and never in a run with so few.
    """
    alive: set[torch.Size] = set()

    def call(first: Tensor, *others: Any) -> Tensor:
        if first.shape not in alive:
            if len(alive) == COMPILED_SHAPES:
                torch.compiler.reset()
                alive.clear()
            alive.add(first.shape)
        return compiled(first, *others)

    return call
