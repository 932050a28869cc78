"""What runs on the machines: a recipe, merged with its bases and overrides, and the command that runs it.

The recipe travels inside the manifest. So exactly the recipe that was checked runs, and a user's own file needs no new image.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from osler.config.recipe import dump_yaml
from osler.deploy.config import DeployConfig
from osler.runtime.errors import UserError

VOLUME = "/osler"  # where containers find the volume; relative paths of a recipe begin here
RECIPE_FOLDER = "/etc/osler"  # where containers find the recipe
SHUTDOWN_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # seconds that torchrun's processes have after a signal
# How often a machine that lost the others is started again before that counts as a failure; Slurm counts all starts.
MOST_LOSSES = 20
PORT = 29500  # where the machines of a run meet
TRAINING = ("pretrain", "sft", "grpo")
MAX_NAME_CHARS = 40  # JobSet makes a pod's name longer, and that may have 63
_CREDENTIALS = re.compile(r"://[^/@\s]+@")


class Meeting(NamedTuple):
    """How a machine learns its number within the run, and the address of the first machine: words for the target's shell."""

    node_rank: str
    master_addr: str


@dataclass(frozen=True)
class Workload:
    """A recipe, the kind of its command, and the deployment that it gets."""

    kind: str
    recipe: Mapping[str, Any]
    name: str
    deployment: DeployConfig

    @property
    def recipe_text(self) -> str:
        """The recipe as YAML."""
        return dump_yaml(dict(self.recipe))

    @property
    def run_folder(self) -> str:
        """The run folder, relative to the top of the volume."""
        return f"runs/{self.name}"

    @property
    def served_folder(self) -> str:
        """The run folder of the finished model; in a pipeline, that of the last stage that trains."""
        stages = [name for name, stage in self.recipe.items() if isinstance(stage, Mapping) and stage.get("kind") in TRAINING]
        return f"{self.run_folder}/{stages[-1]}" if self.kind == "pipeline" and stages else self.run_folder

    def command(self, recipe_file: str, meeting: Meeting | None = None) -> list[str]:
        """Return the command of one machine; a restart uses the same command."""
        words = [self.kind, recipe_file, "--run-dir", self.run_folder]
        processes, machines = self.deployment.processes_per_machine, self.deployment.machines
        if processes * machines == 1:
            return ["osler", *words]
        launch = ["python", "-m", "osler.deploy.launch", "--nproc-per-node", str(processes)]
        if meeting is not None and machines > 1:
            launch += ["--nnodes", str(machines), "--node-rank", meeting.node_rank]
            launch += ["--master-addr", meeting.master_addr, "--master-port", str(PORT)]
        return [*launch, "-m", "osler.cli", *words]


def workload_of(recipe: Mapping[str, Any], config: Any, source: str, deployment: DeployConfig) -> Workload:
    """Return the workload of a recipe and its decoded config; raises UserError for what cannot run on these machines."""
    kind = getattr(config, "kind", None)
    if kind is None:
        raise UserError(f"{source} is a model alone: add kind=pretrain, and what it is to read.")
    name = re.sub(r"[^a-z0-9]+", "-", (deployment.name or source).lower()).strip("-")
    if deployment.name not in (None, name) or not name[:1].isalpha() or len(name) > MAX_NAME_CHARS:
        raise UserError(
            f"{deployment.name or source} is no name for machines: give --name with small letters, digits and hyphens, beginning "
            f"with a letter, at most {MAX_NAME_CHARS}."
        )
    stages = config.stages if kind == "pipeline" else {"": config}
    trained = {stage: part for stage, part in stages.items() if part.kind in TRAINING}
    processes = deployment.processes_per_machine * deployment.machines
    alone = [f"{stage}.parallel.type=ddp".lstrip(".") for stage, part in trained.items() if part.parallel.type == "none"]
    if processes > 1 and alone:
        raise UserError(f"{processes} processes share the run, and the recipe is for one: add {' '.join(alone)} (or fsdp).")
    for stage, part in trained.items():
        if deployment.gpus == 0 and part.device.startswith("cuda"):
            raise UserError(f"{stage or source}: device={part.device}, but the machines have --gpus 0.")
    refuse_secrets(recipe)
    return Workload(kind, {"kind": kind, **recipe}, name, deployment)


def refuse_secrets(section: Any, path: str = "") -> None:
    """Raise UserError for a secret in the recipe, because many people read a manifest."""
    if isinstance(section, Mapping):
        for key, value in section.items():
            refuse_secrets(value, f"{path}.{key}".lstrip("."))
    elif isinstance(section, (list, tuple)):
        for number, value in enumerate(section):
            refuse_secrets(value, f"{path}[{number}]")
    elif isinstance(section, str) and (path.endswith("webhook") or _CREDENTIALS.search(section)):
        raise UserError(
            f"{path} is a secret, and a manifest is read by many. A program of yours can take it from the environment: "
            "monitor.alert_command=..., with --token NAME for the variable."
        )
