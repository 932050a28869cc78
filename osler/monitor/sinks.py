"""The destinations of metrics and alerts besides the run folder, each in a separate process (``tracker.py``).

TensorBoard, Weights & Biases and ClearML need optional libraries; without a network set ``WANDB_MODE=offline`` (and ``wandb
sync`` later) or ``CLEARML_OFFLINE_MODE=1``. A resumed run continues in each as the same run: its id is in the run folder, and
TensorBoard's charts are cut to the checkpoint. A command and a webhook get each alert as one JSON object:

    {"run": "runs/mine", "step": 120, "name": "exploding-gradient", "severity": "critical", "message": "..."}
"""

import json
import logging
import secrets
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import HTTPRedirectHandler, Request, build_opener

from osler.config.recipe import load_yaml
from osler.monitor.alerts import Alert
from osler.monitor.tracker import Tracker, UndeliveredError
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder, write_atomic

TIMEOUT_SECONDS = 30.0


class TensorBoard(Tracker):
    """Writes event files, which are whole after each line, for ``tensorboard --logdir RUN/trackers``."""

    def __init__(self, is_wanted: bool, run: str, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(log_dir=str(RunFolder(Path(run)).trackers / "tensorboard"), purge_step=first_step)

    def write(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def alert(self, alert: Alert) -> None:
        self.writer.add_text(f"alerts/{alert.name}", f"**{alert.severity}** {alert.message}", alert.step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb(Tracker):
    """One run of a project.

    Charts are over ``step``, which is logged as a metric, because W&B's own counter refuses a step that is made again.
    """

    def __init__(self, project: str, run: str, first_step: int) -> None:
        import wandb

        folder = RunFolder(Path(run)).trackers
        id_file = folder / "wandb.id"
        if not id_file.exists():
            write_atomic(id_file, secrets.token_hex(4))
        self.wandb = wandb
        self.run = wandb.init(
            project=project,
            id=id_file.read_text(encoding="utf-8"),
            name=Path(run).resolve().name,
            resume="allow",
            dir=str(folder),
            config=_config(run),
            settings=wandb.Settings(console="off", disable_code=True),  # W&B gets what we log, and nothing of this process
        )
        self.run.define_metric("*", step_metric="step")

    def write(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        self.run.log({"step": step, "tokens": tokens, **metrics})

    def alert(self, alert: Alert) -> None:
        level = self.wandb.AlertLevel.ERROR if alert.severity == "critical" else self.wandb.AlertLevel.WARN
        self.run.alert(title=alert.name, text=f"step {alert.step}: {alert.message}", level=level)

    def close(self) -> None:
        self.run.finish()


class Clearml(Tracker):
    """One task of a project."""

    def __init__(self, project: str, run: str, first_step: int) -> None:
        from clearml import Task

        id_file = RunFolder(Path(run)).trackers / "clearml.id"
        self.task = Task.init(
            project_name=project,
            task_name=Path(run).resolve().name,
            reuse_last_task_id=id_file.read_text(encoding="utf-8") if id_file.exists() else False,
            continue_last_task=0 if id_file.exists() else False,  # 0: our steps are not added to the task's earlier ones
            # ClearML gets what we report, and no arguments, frameworks, streams or load of the machine. (It also takes the state
            # of Osler's git checkout, which sdk.development in clearml.conf turns off.)
            auto_connect_arg_parser=False,
            auto_connect_frameworks=False,
            auto_connect_streams=False,
            auto_resource_monitoring=False,
        )
        if not Task.is_offline():  # a task of an offline session cannot be continued
            write_atomic(id_file, self.task.id)
        self.task.connect_configuration(_config(run), name="config")
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


class AlertCommand(Tracker):
    """Runs a command for each alert, without a shell, and gives it the JSON on its standard input."""

    def __init__(self, command: str, run: str, first_step: int) -> None:
        self.words, self.run = parse_command(command), run

    def alert(self, alert: Alert) -> None:
        message = to_json(self.run, alert) + b"\n"
        try:
            subprocess.run(self.words, input=message, check=True, timeout=TIMEOUT_SECONDS, capture_output=True)
        except (OSError, subprocess.SubprocessError) as error:
            printed = getattr(error, "stderr", None) or b""
            raise UndeliveredError(printed.decode("utf-8", "replace").strip()[-300:] or str(error)) from error


class Webhook(Tracker):
    """Sends each alert to a URL, as the JSON body of a POST request."""

    def __init__(self, url: str, run: str, first_step: int) -> None:
        self.url, self.run = url, run
        self.opener = build_opener(NoRedirects)

    def alert(self, alert: Alert) -> None:
        headers = {"Content-Type": "application/json", "User-Agent": "osler"}
        try:
            self.opener.open(Request(self.url, to_json(self.run, alert), headers), timeout=TIMEOUT_SECONDS).close()
        except (OSError, HTTPException) as error:
            raise UndeliveredError(str(error)) from error


class NoRedirects(HTTPRedirectHandler):
    """Makes a redirect an error, because it would turn the POST into a GET without the alert."""

    def redirect_request(self, *_: Any) -> None:
        """Follow no redirect."""


def _config(run: str) -> dict[str, Any]:
    """Return the run's config without the section that may hold the URL of a webhook, which is a secret."""
    path = RunFolder(Path(run)).config
    config = load_yaml(path.read_text(encoding="utf-8"), str(path)) if path.exists() else {}
    return {key: value for key, value in config.items() if key != "monitor"}


def to_json(run: str, alert: Alert) -> bytes:
    """Return the JSON object that the command and the webhook receive."""
    return json.dumps({"run": run, **asdict(alert)}, ensure_ascii=False).encode("utf-8")


def parse_command(command: str) -> list[str]:
    """Return the words of an alert command; raises UserError when it cannot be split or the program is not there."""
    try:
        words = shlex.split(command) or [""]
    except ValueError as error:
        raise UserError(f"monitor.alert_command is {command!r}, which cannot be split into words: {error}.") from error
    if shutil.which(words[0]) is None:
        raise UserError(
            f"monitor.alert_command is {command!r}, but there is no program {words[0]!r} here. The command is started without a "
            "shell: write pipes and variables into a script and name the script, or give null for none."
        )
    return words
