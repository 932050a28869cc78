"""Manifests: what they are, that Kubernetes knows every key of them, and what is refused before a machine costs money."""

import json
import os
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
import schemas
import yaml
from kubelet import decided

from osler.cli.command import parser
from osler.cli.commands import COMMANDS
from osler.cli.main import main
from osler.deploy import kubernetes
from osler.deploy.config import DeployConfig
from osler.deploy.launch import exit_code_of
from osler.deploy.targets import TARGETS
from osler.deploy.workload import MOST_LOSSES

GOLDEN = Path(__file__).parent / "golden"
RECIPE = str(GOLDEN / "recipe.yaml")
OPTIONS = {  # `osler deploy render tests/deploy/golden/recipe.yaml --target TARGET OPTIONS --out tests/deploy/golden/TARGET.yaml`
    "k8s-job": ["--gpus", "2", "--token", "HF_TOKEN"],
    "jobset": ["--machines", "2", "--gpus", "8"],
    "trainjob": ["--machines", "2", "--gpus", "8", "--name", "pair"],
    "k8s-server": [],
    "slurm": ["--machines", "2", "--gpus", "8"],
    "skypilot": ["--machines", "2", "--gpus", "8", "--token", "HF_TOKEN"],
    "dstack": ["--token", "HF_TOKEN"],
}


@pytest.fixture
def render(capsys):
    def run(recipe: str, target: str, *words: str) -> str:
        assert main(["deploy", "render", recipe, "--target", target, *words]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_is_rendered_as_before(target, render, tmp_path):
    text = render(RECIPE, target, *OPTIONS[target])
    assert text == (GOLDEN / f"{target}.yaml").read_text()
    if target == "slurm":
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
        return
    for manifest in yaml.safe_load_all(text):
        if "apiVersion" in manifest:
            schemas.check(manifest)


def test_a_misspelt_key_is_found_at_any_depth(render):
    """So the check of the manifests can fail."""
    for target in ("k8s-job", "jobset", "trainjob", "k8s-server"):
        for manifest in yaml.safe_load_all(render(RECIPE, target, *OPTIONS[target])):
            text = json.dumps(manifest)
            for key in ("volumeMounts", "resources", "onExitCodes", "storage", "immutable", "targetPort", "maxRestarts", "torch"):
                if f'"{key}": ' in text and key != "storage":
                    with pytest.raises(ValueError):
                        schemas.check(json.loads(text.replace(f'"{key}": ', f'"{key}s": ')))


def test_the_secret_is_a_template_without_a_value(render, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_not_to_be_seen")
    text = render(RECIPE, "k8s-job", "--gpus", "2", "--token", "HF_TOKEN", "--token", "WANDB_API_KEY")
    commented = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")]
    secret = yaml.safe_load("\n".join(commented[2:]))
    schemas.check(secret)
    assert secret["stringData"] == {"HF_TOKEN": "", "WANDB_API_KEY": ""}
    for target in TARGETS:
        assert "hf_not_to_be_seen" not in render(RECIPE, target, *OPTIONS[target], *(["--token", "HF_TOKEN"] * 2))


def test_a_pipeline_is_one_job_and_its_last_stage_is_served(render):
    ddp = [f"{stage}.parallel.type=ddp" for stage in ("pretrain", "sft", "grpo")]
    manifests = {item["kind"]: item for item in yaml.safe_load_all(render("quickstart", "k8s-job", "--gpus", "2", *ddp))}
    command = manifests["Job"]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[-4:] == ["pipeline", "/etc/osler/recipe.yaml", "--run-dir", "runs/quickstart"]
    assert list(yaml.safe_load(manifests["ConfigMap"]["data"]["recipe.yaml"]))[-4:] == ["pretrain", "sft", "grpo", "exam"]
    served = {item["kind"]: item for item in yaml.safe_load_all(render("quickstart", "k8s-server"))}["Deployment"]
    assert served["spec"]["template"]["spec"]["containers"][0]["command"][:3] == ["osler", "serve", "runs/quickstart/grpo"]


def test_what_is_rendered_is_the_recipe_that_was_checked(render, tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text("{kind: pretrain, total_tokens: 5, data: {type: clinic}}")
    (tmp_path / "Mine_2.yaml").write_text("{base: base.yaml, seed: 3}")
    text = render(str(tmp_path / "Mine_2.yaml"), "k8s-job", "total_tokens=7")
    recipe = next(item for item in yaml.safe_load_all(text) if item["kind"] == "ConfigMap")
    assert recipe["metadata"]["name"] == "mine-2" and recipe["immutable"] is True
    assert yaml.safe_load(recipe["data"]["recipe.yaml"]) == {
        "kind": "pretrain", "total_tokens": 7, "data": {"type": "clinic"}, "seed": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["debug", "total_token=5"], "total_token: unknown key; did you mean `total_tokens`?"),
        (["no-such-recipe"], "there is no recipe `no-such-recipe`"),
        ([], "which recipe?"),
        (["pure-tiny"], "pure-tiny is a model alone: add kind=pretrain"),
        (["debug", "--gpus", "-1"], "gpus: must be at least 0"),
        (["debug", "--gpus", "8"], "8 processes share the run, and the recipe is for one: add parallel.type=ddp"),
        (["quickstart", "--gpus", "8"], "add pretrain.parallel.type=ddp sft.parallel.type=ddp grpo.parallel.type=ddp"),
        (["debug", "parallel.type=ddp", "--machines", "2"], "--target k8s-job is one machine"),
        (["debug", "device=cuda", "--gpus", "0"], "device=cuda, but the machines have --gpus 0"),
        (["debug", "--name", "My_Run"], "My_Run is no name for machines"),
        (["debug", "--name", "a" * 41], "at most 40"),
        (["debug", "monitor.webhook=https://example.org/hooks/1"], "monitor.webhook is a secret"),
        (["debug", "monitor.alert_command=curl https://me:word@host"], "monitor.alert_command is a secret"),
        (["debug", "--token", "hf_abc"], "a token is given by the name of its variable, such as HF_TOKEN, never by its value"),
        (["debug", "--follow"], "`osler deploy render` has no --follow"),
    ],
)
def test_what_could_not_run_is_refused_before_a_machine_costs_money(words, told, capsys):
    assert main(["deploy", "render", *words, "--target", "k8s-job"]) == 2
    said = capsys.readouterr().err
    assert told in said and "hf_abc" not in said


def test_every_field_is_an_option_whose_help_says_its_default():
    (deploy,) = [command for command in COMMANDS if command.name == "deploy"]
    actions = {action.dest: action for action in parser(deploy)._actions}
    assert tuple(actions["target"].choices) == tuple(TARGETS)
    for field in fields(DeployConfig):
        told = field.default if field.default else {"name": "the recipe's", "processes": "one for each GPU"}.get(field.name)
        assert told is None or f"(default: {told})" in actions[field.name].help, field.name


@pytest.mark.parametrize(
    ("codes", "disrupted", "alone", "together"),
    [
        ([130], True, "Ignore", "Ignore"),  # evicted, and saved
        ([137], True, "Ignore", "Ignore"),  # evicted, and killed before it had saved
        ([2], True, "Ignore", "Ignore"),
        ([130], False, "Ignore", "Ignore"),  # the pod was deleted
        ([2], False, "FailJob", "FailJob"),  # a wrong recipe
        ([-15, 2, 75], False, "FailJob", "FailJob"),  # torchrun told the others to end
        ([75, 75], False, "Count", "Count"),  # another machine was evicted: of several this one is started again, not endlessly
        ([75, -9], False, "Count", "FailIndex"),  # the system killed one for its memory
        ([1, 75], False, "Count", "FailIndex"),
        ([-6, -6], False, "Count", "FailIndex"),  # NCCL gave up
    ],
)
def test_an_eviction_is_started_again_and_a_wrong_recipe_is_not(codes, disrupted, alone, together, render):
    for target, action in (("k8s-job", alone), ("jobset", together)):
        text = render(RECIPE, target, *OPTIONS[target])
        spec = list(yaml.safe_load_all(text))[-1]["spec"]
        if target == "jobset":
            policy = spec["failurePolicy"]
            assert policy["maxRestarts"] == 3, "all machines start again when one crashed, or was started again too often"
            (rule,) = policy["rules"]
            assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
            spec = spec["replicatedJobs"][0]["template"]["spec"]
            assert (spec["backoffLimitPerIndex"], spec["maxFailedIndexes"]) == (MOST_LOSSES, 0)
        assert spec["podFailurePolicy"]["rules"][1]["onExitCodes"]["containerName"] == kubernetes.CONTAINER
        assert decided(spec, exit_code_of(codes), disrupted=disrupted) == action


def test_the_server_leaves_the_volume_to_the_run_whose_access_mode_it_does_not_know(render):
    kinds = [item["kind"] for item in yaml.safe_load_all(render(RECIPE, "k8s-server"))]
    assert kinds == ["Deployment", "Service"]


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Puts a shell script first on the path, by name and text."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def put(name: str, text: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)

    return put


@pytest.mark.parametrize("target", ["dstack", "skypilot"])
@pytest.mark.parametrize(("codes", "runs"), [([75, 75, 130], 3), ([2], 1), ([137], 1), ([0], 1), ([75], 1 + MOST_LOSSES)])
def test_a_shell_starts_a_run_again_that_lost_the_others_but_not_endlessly(target, codes, runs, render, programs, tmp_path):
    for place, code in enumerate(codes):
        (tmp_path / f"code{place}").write_text(str(code))
    last = len(codes) - 1
    ends = f"exit $(cat code$((n - 1)) 2> /dev/null || cat code{last})"
    programs("osler", f"echo run >> runs.log; n=$(grep -c run runs.log); {ends}")
    programs("sleep", "")
    task = yaml.safe_load(render(RECIPE, target))
    (text,) = task["commands"] if target == "dstack" else [task["run"].replace("cd /osler", "")]
    done = subprocess.run(["sh", "-c", text], cwd=tmp_path, check=False)
    assert done.returncode == codes[-1] and (tmp_path / "runs.log").read_text().count("run") == runs


def test_a_shell_passes_on_the_signal_and_waits_until_the_run_has_saved(render, programs, tmp_path):
    programs("osler", "trap 'sleep 0.2; echo saved; exit 130' TERM; echo begun; while :; do sleep 0.05; done")
    (text,) = yaml.safe_load(render(RECIPE, "dstack"))["commands"]
    process = subprocess.Popen(["sh", "-c", text], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.terminate()
    assert process.stdout.read() == "saved\n" and process.wait() == 130


def test_a_shell_that_is_stopped_between_two_runs_starts_none(render, programs, tmp_path):
    programs("osler", "echo run; exit 75")
    programs("sleep", "echo pause; exec /bin/sleep 20")
    (text,) = yaml.safe_load(render(RECIPE, "dstack"))["commands"]
    process = subprocess.Popen(["sh", "-c", text], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and [process.stdout.readline() for _ in range(2)] == ["run\n", "pause\n"]
    process.terminate()
    assert process.stdout.read() == "" and process.wait() == 75


@pytest.mark.parametrize(
    ("code", "restarts", "state", "again"),
    [
        (130, 99, "RUNNING", True),  # its time was up
        (130, 0, "CANCELLED", False),
        (75, 0, "RUNNING", True),  # a machine lost the others
        (75, MOST_LOSSES, "RUNNING", False),
        (75, 0, "CANCELLED", False),
        (2, 0, "RUNNING", False),
        (1, 0, "RUNNING", False),
    ],
)
def test_slurm_queues_a_run_again_that_can_go_on(code, restarts, state, again, render, programs, tmp_path, monkeypatch):
    programs("srun", f"exit {code}")
    programs("squeue", f"echo {state}")
    programs("scontrol", 'echo "$@" >> calls.log')
    for name, value in (("JOB_ID", "7"), ("JOB_NODELIST", "a,b"), ("CPUS_PER_TASK", "1"), ("RESTART_COUNT", str(restarts))):
        monkeypatch.setenv(f"SLURM_{name}", value)
    done = subprocess.run(["bash", "-c", render(RECIPE, "slurm", *OPTIONS["slurm"])], cwd=tmp_path, check=False)
    assert done.returncode == code
    assert ("requeue 7" in (tmp_path / "calls.log").read_text()) == again
