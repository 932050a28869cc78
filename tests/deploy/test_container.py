"""Dockerfile and compose files: what they name is there, and a linter has nothing to say. No image is built here."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from osler.cli.command import parser
from osler.cli.commands import COMMANDS

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
SERVICE = {"image", "build", "command", "environment", "volumes", "shm_size", "stop_grace_period", "ports", "depends_on"}
SERVICE |= {"healthcheck", "restart", "deploy"}


def test_the_dockerfile_passes_the_linter():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}")
    if hadolint is None:
        pytest.skip("hadolint is not installed; it is in the extra `test`")
    done = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_image_is_pinned_has_two_stages_and_does_not_run_as_root():
    assert re.search(r"^ARG BASE=\S+:[\d.]+-\S+@sha256:[0-9a-f]{64}$", DOCKERFILE, re.MULTILINE)
    assert re.findall(r"^FROM (.*)$", DOCKERFILE, re.MULTILINE) == ["${BASE} AS build", "${BASE}"]
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE) == ["1000:1000"]
    extras = re.search(r"'\.\[(.*)\]'", DOCKERFILE)[1].split(",")
    project = (ROOT / "pyproject.toml").read_text()
    assert all(f"\n{extra} = [" in project for extra in extras)
    pinned = re.search(r"grep '(.*?)' constraints.txt", DOCKERFILE)[1]
    assert len(re.findall(pinned, (ROOT / "constraints.txt").read_text(), re.MULTILINE)) == 1


def test_what_is_copied_is_there_and_not_ignored():
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    copied = [word for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE) for word in line.split()[:-1]]
    assert sorted(copied) == sorted(line.removeprefix("!") for line in ignored if line.startswith("!"))
    assert ignored[0] == "*" and all((ROOT / name).exists() for name in copied)


def test_the_compose_files_know_their_keys_and_their_commands_exist():
    services: dict = {}
    for file in ("compose.yaml", "compose.cuda.yaml"):
        content = yaml.safe_load((ROOT / file).read_text())
        assert content.keys() <= {"services", "volumes", "x-gpus"}
        for name, service in content["services"].items():
            assert service.keys() <= SERVICE, service.keys() - SERVICE
            services.setdefault(name, {}).update(service)
    commands = {command.name: command for command in COMMANDS}
    for service in services.values():
        name, *words = service["command"]
        parser(commands[name]).parse_intermixed_args(words)
        assert all("=" not in variable for variable in service["environment"]), "a value of a secret would stand in the file"
        assert service["volumes"] == ["osler:/osler"] and service["image"] == "osler:cuda"
    assert services["server"]["depends_on"] == {"trainer": {"condition": "service_completed_successfully"}}
    assert services["server"]["command"][1].startswith(services["trainer"]["command"][-1])
    assert "/health" in services["server"]["healthcheck"]["test"][-1]
