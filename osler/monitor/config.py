"""Settings of a run's measurements, of the trackers that receive them, and of alerts. Torch-free."""

import re
from typing import Annotated, Literal

from osler.config.schema import Ge, PositiveFloat, PositiveInt, config

# A URL that alerts may be sent to, encrypted or to this machine: host, port, and the rest without spaces, in ASCII.
WEBHOOK = re.compile(r"(?ai)(https://(\[[\da-f:.]+\]|[\w.@-]+)|http://(localhost|127\.0\.0\.1|\[::1\]))(:\d{1,5})?([/?#][!-~]*)?")


@config
class MonitorConfig:
    """How much a run measures, which trackers receive the numbers, and who receives alerts."""

    # off: what training knows anyway; basic: what is nearly free; full: gradients, weights and activations by layer too
    level: Literal["off", "basic", "full"] = "basic"
    full_every_steps: PositiveInt = 100  # with level=full: steps between two probes of the model, rounded up to lines of metrics
    alert_command: str | None = None  # a command that is run for each alert, with the alert as JSON on its standard input
    webhook: str | None = None  # an https:// URL that each alert is sent to, as JSON in a POST request
    tensorboard: bool = False  # also write for TensorBoard, into the run folder
    wandb: str | None = None  # project of Weights & Biases to log to as well
    clearml: str | None = None  # project of ClearML to log to as well

    def __post_init__(self) -> None:
        if self.webhook is not None and not WEBHOOK.fullmatch(self.webhook):
            raise ValueError(
                "webhook must be an https:// URL (http:// for localhost alone). A command that gets each alert is alert_command."
            )


@config
class SpikeConfig:
    """When a loss counts as a spike, and what is done about it."""

    # report: warn and note it in events.jsonl; rollback: also go back to the last good checkpoint and skip the data since then
    action: Literal["report", "rollback"] = "report"
    threshold: PositiveFloat = 8.0  # robust standard deviations above the median of the losses before it
    window_steps: Annotated[int, Ge(4)] = 100  # losses that the median is taken over; the first half of a window is not judged
