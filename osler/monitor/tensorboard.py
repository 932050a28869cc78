"""TensorBoard: the door to an optional library. Event files in the run folder, for ``tensorboard --logdir RUN/trackers``.

On resume ``purge_step`` takes what lies after the checkpoint off the charts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from osler.monitor.alerts import Alert
from osler.monitor.tracker import Tracker

FOLDER = "tensorboard"


class TensorBoardTracker(Tracker):
    """Writes scalars and alerts to event files, whole after each line."""

    def __init__(self, folder: str, first_step: int) -> None:
        """``first_step``: the first that this process writes."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(log_dir=str(Path(folder) / FOLDER), purge_step=first_step)

    def write(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def alert(self, alert: Alert) -> None:
        self.writer.add_text(f"alerts/{alert.name}", f"**{alert.severity}** {alert.message}", alert.step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
