"""Weights & Biases: the door to an optional library. Without a network set ``WANDB_MODE=offline``, and ``wandb sync`` later.

The run's id is in the run folder, so that a run that is resumed is the same run there. Charts are over ``step``, which is logged
as a metric, because W&B's own counter refuses a step that is made again after a resume.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from osler.monitor.alerts import Alert
from osler.monitor.tracker import Tracker
from osler.runtime.files import write_atomic

ID_FILE = "wandb.id"


class WandbTracker(Tracker):
    """One run of a project."""

    def __init__(self, project: str, folder: str, name: str, config: Mapping[str, Any]) -> None:
        import wandb

        known = Path(folder) / ID_FILE
        if not known.exists():
            write_atomic(known, secrets.token_hex(4))
        self.wandb = wandb
        self.run = wandb.init(
            project=project,
            id=known.read_text(encoding="utf-8"),
            name=name,
            resume="allow",
            dir=folder,
            config=dict(config),
            settings=wandb.Settings(console="off", disable_code=True),  # what we log, and nothing of this process
        )
        self.run.define_metric("*", step_metric="step")

    def write(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        self.run.log({"step": step, "tokens": tokens, **metrics})

    def alert(self, alert: Alert) -> None:
        level = self.wandb.AlertLevel.ERROR if alert.severity == "critical" else self.wandb.AlertLevel.WARN
        self.run.alert(title=alert.name, text=f"step {alert.step}: {alert.message}", level=level)

    def close(self) -> None:
        self.run.finish()
