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


@config
class SpikeConfig:
    """When a loss counts as a spike, and what is done about it."""

    # report: warn and note it in events.jsonl; rollback: also go back to the last good checkpoint and pass over the data since
    action: Literal["report", "rollback"] = "report"
    threshold: float = 8.0  # robust standard deviations above the median of the losses before it
    window_steps: int = 100  # losses that the median is taken over; nothing is judged before half of them were seen

    def __post_init__(self) -> None:
        if self.threshold <= 0:
            raise ValueError(f"threshold is {self.threshold}; it must be above 0")
        if self.window_steps < 4:
            raise ValueError(f"window_steps is {self.window_steps}; it must be at least 4 for a median to mean anything")
