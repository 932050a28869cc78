"""What is watched in a run, where the numbers go, and whom an alert reaches. Torch-free."""

from __future__ import annotations

from typing import Annotated, Literal

from osler.config import Ge, PositiveFloat, PositiveInt, config


@config
class MonitorConfig:
    """What a run measures of itself, and who is told."""

    # off: what training knows anyway; basic: what is nearly free; full: gradients, weights and activations by layer too
    level: Literal["off", "basic", "full"] = "basic"
    full_every_steps: PositiveInt = 100  # with level=full: steps between two looks at everything, rounded up to lines of metrics
    webhook: str | None = None  # a command that is run for each alert, with the alert as JSON on its standard input
    tensorboard: bool = False  # also write for TensorBoard, into the run folder
    wandb: str | None = None  # project of Weights & Biases to log to as well
    clearml: str | None = None  # project of ClearML to log to as well


@config
class SpikeConfig:
    """When a loss counts as a spike, and what is done about it."""

    # report: warn and note it in events.jsonl; rollback: also go back to the last good checkpoint and pass over the data since
    action: Literal["report", "rollback"] = "report"
    threshold: PositiveFloat = 8.0  # robust standard deviations above the median of the losses before it
    window_steps: Annotated[int, Ge(4)] = 100  # losses that the median is taken over; the first half of them is not judged
