"""What one process of a run holds: ``Run``, the folder and what goes into its checkpoints, and ``Learner``, what is trained."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from osler.model.transformer import Transformer
from osler.monitor.collect import Collector
from osler.monitor.config import MonitorConfig
from osler.parallel.engine import ParallelEngine
from osler.records.events import EventLog
from osler.runtime.files import RunFolder
from osler.runtime.world import World


@dataclass
class Run:
    """A run as one process knows it.

    ``files`` (model config, tokenizer and the like) and ``fingerprints`` go into every checkpoint. A checkpoint with other
    fingerprints is refused.
    """

    folder: RunFolder
    world: World
    files: Mapping[str, bytes] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    started: float = field(default_factory=lambda: time.monotonic())  # when this process began to work on the run
    earlier_seconds: float = 0.0  # spent by the processes before this one

    def __post_init__(self) -> None:
        self.events = EventLog(self.folder.events if self.world.is_first else os.devnull)

    @property
    def seconds(self) -> float:
        """Seconds that this process and the ones before it have spent on the run."""
        return self.earlier_seconds + time.monotonic() - self.started


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
        """Where the parameters lie."""
        return next(self.model.parameters()).device

    def collector(self, config: MonitorConfig, *, lines_every: int = 1) -> Collector:
        """Return a collector for the steps of this learner, which write a line of metrics every ``lines_every`` steps."""
        return Collector(
            config,
            self.model,
            self.device,
            lines_every=lines_every,
            world=self.engine.world,
            whole_weights=lambda: self.engine.whole_weights(self.model),
            has_gradients=self.engine.leaves_gradients,
        )
