"""What one process holds: device and dtype (``Machine``), run folder and ranks (``Run``), model and optimizer (``Learner``)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osler.inference.load import describing_files
from osler.model.config import MODEL_FILE, ModelConfig
from osler.model.init import is_of_indexer
from osler.model.transformer import Transformer
from osler.parallel.compile import should_compile
from osler.parallel.config import ParallelConfig
from osler.parallel.engine import ParallelEngine
from osler.records.jsonl import EventLog
from osler.runtime.device import describe_machine, pick_device, pick_dtype
from osler.runtime.files import RunFolder, indented, read_json, write_or_warn
from osler.runtime.world import World
from osler.tokenizer.bpe import Tokenizer

PACKAGES = ("osler", "torch", "torchao", "numpy", "tokenizers", "safetensors", "pydantic", "pyarrow")
VERSIONS = "versions.json"  # packages and machine, in the run folder and in every checkpoint


@dataclass(frozen=True)
class Machine:
    """The device and the dtype that a process computes with, and whether it compiles the model."""

    device: torch.device
    dtype: torch.dtype
    compile: bool

    @property
    def eager_dtype(self) -> torch.dtype:
        """The dtype for evaluation and sampling: fp32 on a CPU, because they run uncompiled and eager bf16 is slow there."""
        return torch.float32 if self.device.type == "cpu" else self.dtype

    def describe(self) -> dict[str, Any]:
        """Return everything that times and roundings depend on."""
        return {
            **describe_machine(),
            "device": str(self.device) if self.device.type == "cpu" else torch.cuda.get_device_name(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "compiled": self.compile,
        }


def choose_machine(device: str, precision: str, compile_mode: str, *, steps: int) -> Machine:
    """Return device, dtype and whether to compile; ``auto`` is decided by a trial on this machine.

    On a CPU, ``auto`` chooses bf16 only if the model is compiled: eager bf16 operators are an order of magnitude slower there.
    """
    chosen = pick_device(device)
    compile = should_compile(compile_mode, chosen, steps=steps)
    if precision == "auto" and chosen.type == "cpu" and not compile:
        precision = "fp32"
    return Machine(chosen, pick_dtype(precision, chosen), compile)


def agree_on_machine(world: World, checkpoint: Path | None, *, precision: str, compile_mode: str, steps: int) -> Machine:
    """Return the machine of this rank. Rank 0 resolves ``auto`` by a trial and broadcasts the result.

    A trial on another rank might end differently. A run resumed from ``checkpoint`` keeps the precision chosen at its start.
    """
    if precision == "auto" and checkpoint is not None and (checkpoint / VERSIONS).exists():
        precision = {"float32": "fp32", "bfloat16": "bf16"}[read_json(checkpoint / VERSIONS)["machine"]["dtype"]]
    machine = world.broadcast_from_first(lambda: choose_machine(world.device, precision, compile_mode, steps=steps))
    return replace(machine, device=pick_device(world.device))


def place_of(machine: Machine, parallel: ParallelConfig, world: World) -> str:
    """Return a description of the devices, for example ``cuda:0, compiled`` or ``8 x cuda (fsdp)``."""
    place = str(machine.device) if world.size == 1 else f"{world.size} x {machine.device.type} ({parallel.type})"
    return f"{place}, compiled" if machine.compile else place


@dataclass
class Run:
    """The folder, ranks, events and elapsed time of a run, in one process.

    ``files`` (model config, tokenizer and the like), ``more_files`` and ``fingerprints`` go into every checkpoint. A checkpoint
    whose fingerprints differ is refused.
    """

    folder: RunFolder
    world: World
    files: Mapping[str, bytes] = field(default_factory=dict)
    more_files: Callable[[], Mapping[str, bytes]] = dict  # files that become known while the run trains
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        self.started = self.began  # a resume moves it back by the time that earlier processes spent
        self.events = EventLog(self.folder.events if self.world.is_first else os.devnull)

    def describe(self, machine: Machine, model: ModelConfig, tokenizer: Tokenizer) -> None:
        """Write ``versions.json`` and ``model.json``, and collect the files that go into every checkpoint."""
        versions: dict[str, Any] = {}
        for package in PACKAGES:
            with suppress(PackageNotFoundError):
                versions[package] = version(package)
        text = self.world.broadcast_from_first(lambda: indented(versions | {"machine": machine.describe()}))
        describing = describing_files(model, tokenizer)
        if self.world.is_first:
            write_or_warn(self.folder.root / VERSIONS, text)
            write_or_warn(self.folder.model, describing[MODEL_FILE])
        self.files = {
            **describing, "config.yaml": self.folder.config.read_bytes(), VERSIONS: text.encode("utf-8"),
        }  # fmt: skip

    @property
    def seconds(self) -> float:
        """Seconds that this process and the ones before it have spent on the run."""
        return time.monotonic() - self.started


@dataclass
class Learner:
    """A model, its optimizer, and the engine that joins the ranks and clips gradients to ``clip_norm``."""

    model: Transformer
    optimizer: torch.optim.Optimizer
    engine: ParallelEngine
    clip_norm: float

    def __post_init__(self) -> None:
        self.engine.bind(self.optimizer, self.clip_norm)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.model.parameters()).device

    @property
    def clipped_parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        """The trained parameters without those of indexers, and those of indexers.

        Their gradients have nothing to do with each other, so neither may shrink the other's step (``ParallelEngine.update``).
        """
        others: list[Tensor] = []
        of_indexers: list[Tensor] = []
        for name, weight in self.model.named_parameters():
            if weight.requires_grad:
                (of_indexers if is_of_indexer(name) else others).append(weight)
        return others, of_indexers
