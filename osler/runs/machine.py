"""Where and how a run computes: device, precision, whether it compiles; and ``versions.json``, which records it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from osler.parallel.compile import should_compile
from osler.parallel.config import ParallelConfig
from osler.runtime.device import describe_machine, pick_device, pick_dtype
from osler.runtime.files import RunFolder, indented, write_or_warn
from osler.runtime.world import World

PACKAGES = ("osler", "torch", "torchao", "numpy", "tokenizers", "safetensors", "pydantic", "pyarrow")
VERSIONS = "versions.json"  # packages and machine, in the run folder and in every checkpoint
PRECISION_OF_DTYPE = {"float32": "fp32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Machine:
    """Where and how a run computes."""

    device: torch.device
    dtype: torch.dtype
    compile: bool

    @property
    def eager_dtype(self) -> torch.dtype:
        """For evaluation and sampling, which are not compiled: eager bf16 operators are slow on a CPU."""
        return torch.float32 if self.device.type == "cpu" else self.dtype


def choose_machine(device: str, precision: str, compile_mode: str, *, steps: int) -> Machine:
    """Return device, dtype and whether to compile; ``auto`` tries it on this machine.

    On a CPU bf16 goes with compilation: eager bf16 operators are an order of magnitude slower than fp32 there.
    """
    chosen = pick_device(device)
    compile = should_compile(compile_mode, chosen, steps=steps)
    if precision == "auto" and chosen.type == "cpu" and not compile:
        precision = "fp32"
    return Machine(chosen, pick_dtype(precision, chosen), compile)


def agree_on_machine(
    world: World, checkpoint: Path | None, *, precision: str, compile_mode: str, steps: int
) -> Machine:
    """Return the machine of this rank. What ``auto`` comes to is a trial on rank 0, which might end differently on another.

    A run that goes on from ``checkpoint`` keeps the precision that it resolved when it began.
    """
    precision = stored_precision(checkpoint, precision)
    machine = world.broadcast_from_first(lambda: choose_machine(world.device, precision, compile_mode, steps=steps))
    return replace(machine, device=pick_device(world.device))


def stored_precision(checkpoint: Path | None, wanted: str) -> str:
    """Return the precision that a run chose when it began, because ``auto`` is a timing and might choose another one now."""
    if wanted != "auto" or checkpoint is None or not (checkpoint / VERSIONS).exists():
        return wanted
    machine = json.loads((checkpoint / VERSIONS).read_text(encoding="utf-8"))["machine"]
    return PRECISION_OF_DTYPE[machine["dtype"]]


def place_of(machine: Machine, parallel: ParallelConfig, world: World) -> str:
    """Return in words what a run computes on."""
    place = str(machine.device) if world.size == 1 else f"{world.size} x {machine.device.type} ({parallel.type})"
    return f"{place}, compiled" if machine.compile else place


def describe_run(run: RunFolder, machine: Machine) -> bytes:
    """Write ``versions.json``, the packages and the machine, and return its bytes."""
    versions: dict[str, Any] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    versions["machine"] = {
        **describe_machine(),
        "device": str(machine.device) if machine.device.type == "cpu" else torch.cuda.get_device_name(machine.device),
        "dtype": str(machine.dtype).removeprefix("torch."),
        "compiled": machine.compile,
    }
    text = indented(versions)
    write_or_warn(run.root / VERSIONS, text)
    return text.encode("utf-8")
