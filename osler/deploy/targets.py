"""The targets: what is rendered for each, and the calls of the program that drives it (kubectl, sbatch, sky, dstack)."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from osler.config.recipe import dump_yaml
from osler.deploy import kubernetes, scripts
from osler.deploy.workload import Workload
from osler.runtime.errors import UserError

FILE = "{file}"  # stands in a call for the rendered file; a call without it gets the text on standard input


class Target(NamedTuple):
    """How a target is rendered, and the call for each verb."""

    render: Callable[[Workload], str]
    calls: Callable[[Workload, bool], Mapping[str, list[str]]]  # the second argument: whether to follow the logs


def _kubernetes(render: Callable[[Workload], list[kubernetes.Manifest]], *kinds: str, suffix: str = "") -> Target:
    """Return a target of Kubernetes; ``kinds`` are the kinds of objects that a run has besides its pods and its volume."""

    def rendered(workload: Workload) -> str:
        return kubernetes.secret_template(workload) + "---\n".join(map(dump_yaml, render(workload)))

    def calls(workload: Workload, follow: bool) -> dict[str, list[str]]:
        namespace = ["--namespace", workload.deployment.namespace]
        chosen = [*namespace, "--selector", f"{kubernetes.INSTANCE}={workload.name}{suffix}"]
        return {
            "apply": ["kubectl", "apply", *namespace, "--filename", "-"],
            "status": ["kubectl", "get", ",".join([*kinds, "pods"]), *chosen],
            "logs": ["kubectl", "logs", *chosen, "--tail=-1", "--max-log-requests=64", *(["--follow"] if follow else [])],
            "stop": ["kubectl", "delete", ",".join(kinds), *chosen],
        }

    return Target(rendered, calls)


def _slurm_calls(workload: Workload, follow: bool) -> dict[str, list[str]]:
    mine = ["--me", f"--name={workload.name}"]
    return {
        "apply": ["sbatch"],
        "status": ["squeue", *mine],
        "logs": ["tail", "--lines=+1", *(["--follow=name"] if follow else []), scripts.log_file(workload)],
        "stop": ["scancel", *mine],
    }


def _skypilot_calls(workload: Workload, follow: bool) -> dict[str, list[str]]:
    tokens = [word for token in workload.deployment.tokens for word in ("--secret", token)]
    return {
        "apply": ["sky", "jobs", "launch", "--yes", "--detach-run", *tokens, FILE],
        "status": ["sky", "jobs", "queue"],
        "logs": ["sky", "jobs", "logs", "--name", workload.name, "--follow" if follow else "--no-follow"],
        "stop": ["sky", "jobs", "cancel", "--yes", "--name", workload.name],
    }


def _dstack_calls(workload: Workload, follow: bool) -> dict[str, list[str]]:
    return {
        "apply": ["dstack", "apply", "--yes", "--detach", "--file", "-"],
        "status": ["dstack", "ps", "--all"],
        "logs": ["dstack", "attach", "--logs", workload.name] if follow else ["dstack", "logs", workload.name],
        "stop": ["dstack", "stop", "--yes", workload.name],
    }


TARGETS: dict[str, Target] = {
    "k8s-job": _kubernetes(kubernetes.job, "jobs", "configmaps"),
    "jobset": _kubernetes(kubernetes.jobset, "jobsets", "configmaps"),
    "trainjob": _kubernetes(kubernetes.trainjob, "trainjobs", "trainingruntimes", "configmaps"),
    "k8s-server": _kubernetes(kubernetes.server, "deployments", "services", suffix="-server"),
    "slurm": Target(scripts.slurm, _slurm_calls),
    "skypilot": Target(lambda workload: dump_yaml(scripts.skypilot(workload)), _skypilot_calls),
    "dstack": Target(lambda workload: dump_yaml(scripts.dstack(workload)), _dstack_calls),
}


def call(target: str, verb: str, workload: Workload, *, follow: bool = False) -> None:
    """Call the program that drives a target, with this terminal as its own; raises UserError when it is missing or fails."""
    words = TARGETS[target].calls(workload, follow)[verb]
    program = words[0]
    if shutil.which(program) is None:
        rendered = f"`osler deploy render` writes what it would be given, to be carried to where `{program}` is."
        raise UserError(f"--target {target} is driven by `{program}`, which is not installed here. {rendered}")
    given = TARGETS[target].render(workload) if verb == "apply" else ""
    sys.stdout.flush()
    with tempfile.TemporaryDirectory() as folder:
        if FILE in words:
            file = Path(folder) / f"{workload.name}.yaml"
            file.write_text(given, encoding="utf-8")
            words, given = [str(file) if word == FILE else word for word in words], ""
        done = subprocess.run(words, input=given, text=True, check=False)
    if done.returncode:
        raise UserError(f"`{' '.join(words)}` ended with {done.returncode}; what it says is above.")
