"""The configuration that all kinds of training share. Torch-free."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

from osler.config.schema import NonNegativeInt, PositiveFloat, PositiveInt, Seed, config
from osler.model.config import ModelConfig
from osler.monitor.config import MonitorConfig, SpikeConfig
from osler.optim.config import AdamWConfig, OptimConfig
from osler.optim.schedule import ConstantConfig, ScheduleConfig


@config
class CheckpointConfig:
    """How checkpoints are written, and which are kept."""

    keep_last: PositiveInt = 2  # checkpoints kept besides the best and the milestones
    # whether a checkpoint is written from a copy in memory while training goes on; its content is the same
    in_background: bool = True


@config
class RecoveryConfig:
    """When a run in trouble goes back to its last good checkpoint and continues with later data, and when it gives up."""

    # this many steps in a row with a non-finite gradient send the run back, when the next line of metrics is due
    max_skipped_steps: PositiveInt = 20
    max_rollbacks: NonNegativeInt = 2  # times that a run goes back, in all; after that it ends with a diagnosis
    spike: SpikeConfig = SpikeConfig()


@config
class RunConfig(ABC):
    """The part of a configuration that all kinds of training share."""

    kind: str  # pretrain, sft or grpo; the command sets it
    description: str = ""  # for the reader; changes nothing
    seed: Seed = 0
    init_from: str | None  # run folder or checkpoint to start from
    # checkpoint of another run that this run continues, with its optimizer and its place in the data; --branch sets it, and takes
    # the config of that run
    branch_from: str | None = None
    optim: OptimConfig = AdamWConfig()
    schedule: ScheduleConfig = ConstantConfig()
    clip_norm: PositiveFloat = 1.0  # norm that the gradient is scaled down to when it is larger
    precision: str = "auto"
    recompute: Literal["off", "selective", "full"] = "off"  # activations computed again in the backward pass, to save memory
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    # the run ends after this many evaluations in a row without a better result; null: it goes on to its last step
    early_stopping_patience: PositiveInt | None = None
    checkpoint: CheckpointConfig = CheckpointConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    allow_data_change: bool = False  # whether a started run may go on with other data, never with another tokenizer
    monitor: MonitorConfig = MonitorConfig()

    def model_from(self, model: ModelConfig, trained_seq_len: int) -> ModelConfig:
        """Return the shape of the model of a run that starts from ``model``, trained on rows of ``trained_seq_len`` tokens."""
        return model

    def trained_after(self, trained_seq_len: int) -> int:
        """Return the tokens of the longest rows that the weights have learned after this run; before it, ``trained_seq_len``."""
        return trained_seq_len

    @abstractmethod
    def numbers(self, model: ModelConfig | None = None) -> dict[str, str]:
        """Return in words what follows from the config; ``model`` is the shape that the run starts from, None for a new model."""
