"""ClearML: the door to an optional library. Without a server set ``CLEARML_OFFLINE_MODE=1``.

The task's id is in the run folder, so that a run that is resumed is the same task there, with the run's count of steps.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from osler.monitor.alerts import Alert
from osler.monitor.tracker import Tracker
from osler.runtime.files import write_atomic

ID_FILE = "clearml.id"


class ClearmlTracker(Tracker):
    """One task of a project."""

    def __init__(self, project: str, folder: str, name: str, config: Mapping[str, Any]) -> None:
        from clearml import Task

        known = Path(folder) / ID_FILE
        self.task = Task.init(
            project_name=project,
            task_name=name,
            reuse_last_task_id=known.read_text(encoding="utf-8") if known.exists() else False,
            continue_last_task=0 if known.exists() else False,  # 0: our steps are not added to those that it has seen
            # What we report, and no arguments, frameworks, streams or load of the machine. (It also takes the state of Osler's
            # git checkout: clearml.conf, sdk.development, turns that off.)
            auto_connect_arg_parser=False,
            auto_connect_frameworks=False,
            auto_connect_streams=False,
            auto_resource_monitoring=False,
        )
        if not Task.is_offline():  # a task of an offline session cannot be gone on with
            write_atomic(known, self.task.id)
        self.task.connect_configuration(dict(config), name="config")
        self.logger = self.task.get_logger()

    def write(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            area, _, rest = name.partition("/")
            self.logger.report_scalar(area, rest or area, value, step)

    def alert(self, alert: Alert) -> None:
        level = logging.ERROR if alert.severity == "critical" else logging.WARNING
        self.logger.report_text(f"step {alert.step}: {alert.name}: {alert.message}", level=level, print_console=False)

    def close(self) -> None:
        self.task.close()
