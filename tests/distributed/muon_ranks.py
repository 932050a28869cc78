"""A program for test_parallel.py: two ranks that step Muon together and check it against Muon alone."""

import sys
from pathlib import Path
from typing import Any

import torch
from forks import report, runs_on_two
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from osler.optim.muon import Muon
from osler.runtime.sharded import whole
from osler.runtime.world import joined

# Three, four and one of a kind, so that two ranks share unevenly; five rows and one row do not shard evenly either.
MATRICES = [*[(8, 12)] * 3, *[(12, 8)] * 4, (5, 7), (1, 6)]
VECTORS = [(5,), (8,)]
STEPS = 4
SKIPPED = 2


def values(shapes: list[tuple[int, ...]], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def build(convert: Any, **options: Any) -> tuple[list[torch.Tensor], Muon]:
    parameters = [torch.nn.Parameter(convert(value)) for value in values([*MATRICES, *VECTORS], 0)]
    matrices, vectors = parameters[: len(MATRICES)], parameters[len(MATRICES) :]
    groups = [
        {"params": matrices, "name": "matrices", "lr": 0.1, "weight_decay": 0.1, "momentum": 0.9, "newton_schulz_steps": 5},
        {"params": vectors, "name": "vectors", "lr": 0.1, "weight_decay": 0.0, "betas": (0.9, 0.95), "eps": 1e-8},
    ]
    return parameters, Muon(groups, **options)


def train(parameters: list[torch.Tensor], optimizer: Muon, convert: Any) -> list[torch.Tensor]:
    """The parameters and state, whole, after some steps, of which one has a bad gradient."""
    for step in range(STEPS):
        gradients = values([*MATRICES, *VECTORS], 1 + step)
        if step == SKIPPED:
            gradients[0][0, 0] = float("nan")
        optimizer.found_inf = torch.tensor(float(step == SKIPPED))  # type: ignore[attr-defined]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = convert(gradient)
        optimizer.step()
    state = [value for parameter in parameters for value in optimizer.state[parameter].values()]
    return [whole(value).detach() for value in [*parameters, *state]]


def plain(value: torch.Tensor) -> torch.Tensor:
    return value.clone()


def muon_on_ranks() -> int:
    with joined("cpu") as world:
        mesh = init_device_mesh("cpu", (world.size,))

        def sharded(value: torch.Tensor) -> DTensor:
            return distribute_tensor(value, mesh, [Shard(0)])

        together = {"process_group": world.group}
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 0.02)):
            alone = train(*build(plain, dtype=dtype), plain)
            for convert, options in ((plain, together), (sharded, {}), (sharded, together)):
                found = train(*build(convert, dtype=dtype, **options), convert)
                for index, (one, other) in enumerate(zip(found, alone, strict=True)):
                    assert torch.isfinite(one).all()
                    # Sharded, the update is rounded to bf16 before it is normalised.
                    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, msg=f"{index}: {one} and {other}")
                everyone = world.all_gather([value.tolist() for value in found])
                assert all(each == everyone[0] for each in everyone), "the ranks drifted apart"
    return 0


if __name__ == "__main__":
    report("muon", runs_on_two, muon_on_ranks, Path(sys.argv[1]) / "muon")
