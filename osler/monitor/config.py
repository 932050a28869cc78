"""What is watched in a run, where the numbers go, and whom an alert reaches. Torch-free."""

from __future__ import annotations

from typing import Literal

from osler.config import config


@config
class MonitorConfig:
    """What a run measures of itself, and who is told."""

    # off: what training knows anyway; basic: what is nearly free; full: gradients, weights and activations by layer too
    level: Literal["off", "basic", "full"] = "basic"
    full_every_steps: int = 100  # with level=full: steps between two looks at everything, rounded up to lines of metrics
    webhook: str | None = None  # a command that is run for each alert, with the alert as JSON on its standard input
    tensorboard: bool = False  # also write for TensorBoard, into the run folder
    wandb: str | None = None  # project of Weights & Biases to log to as well
    clearml: str | None = None  # project of ClearML to log to as well

    def __post_init__(self) -> None:
        if self.full_every_steps < 1:
            raise ValueError(f"full_every_steps is {self.full_every_steps}; it must be at least 1")
