"""The command of a rendered Job with two processes, stopped and killed as in Kubernetes, ends as if nothing had happened."""

import json
import os
import signal
import subprocess
from pathlib import Path

import kubelet
import pytest
import yaml
from run_folders import assert_same_run, wait_for

from osler.cli.main import main

SLOWLY = {"OSLER_FAULT": "train-step:slow:1-"}  # so that a step is not over before the signal comes
SHORT = {"total_tokens": 8 * 512, "eval_every_tokens": 10**6, "checkpoint": {"every_tokens": 2 * 512}}


@pytest.fixture
def rehearsed(tiny, tmp_path, capsys):
    """The Job of a chain of pretraining, fine-tuning and GRPO on two processes, and the folder of its recipe."""
    stages = {kind: json.loads(Path(getattr(tiny, kind)).read_text()) for kind in ("pretrain", "sft", "grpo")}
    for kind in ("pretrain", "sft"):
        stages[kind] |= SHORT | {"batch_tokens": 512}
    stages["sft"] |= {"init_from": "pretrain"}
    stages["grpo"] |= {"init_from": "sft", "steps": 4, "checkpoint": {"every_steps": 2}, "preflight": "warn", "eval_task": None}
    for stage in stages.values():
        stage["parallel"] = {"type": "ddp"}
    recipe = tmp_path / "chain.yaml"
    recipe.write_text(json.dumps({"kind": "pipeline", **stages}))
    words = ["--target", "k8s-job", "--gpus", "0", "--processes", "2", "--grace-seconds", "60"]
    assert main(["deploy", "render", str(recipe), *words]) == 0
    manifests = {manifest["kind"]: manifest for manifest in yaml.safe_load_all(capsys.readouterr().out)}
    for name, text in manifests["ConfigMap"]["data"].items():
        (tmp_path / "recipe").mkdir()
        (tmp_path / "recipe" / name).write_text(text)
    return manifests["Job"]["spec"], tmp_path / "recipe"


def workers(launcher: subprocess.Popen) -> list[int]:
    """The processes that torchrun has started, each in a session of its own."""
    threads = Path(f"/proc/{launcher.pid}/task").iterdir()
    return [int(child) for thread in threads for child in (thread / "children").read_text().split()]


def lose(launcher: subprocess.Popen) -> None:
    """Kill all processes of the container at once, as a machine that is gone does."""
    for process in [launcher.pid, *workers(launcher)]:
        os.kill(process, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for the processes of torchrun in /proc")
def test_a_chain_that_is_evicted_and_killed_ends_as_if_nothing_had_happened(rehearsed, tmp_path):
    job, recipe = rehearsed
    pod, log = job["template"]["spec"], tmp_path / "log"
    assert pod["containers"][0]["command"][:3] == ["python", "-m", "osler.deploy.launch"]
    calm, struck = tmp_path / "calm", tmp_path / "struck"
    for volume in (calm, struck):
        volume.mkdir()
    assert kubelet.start(pod, {"volume": calm, "recipe": recipe}, log).wait() == 0, log.read_text()[-3000:]

    def broken(stage: str, step: int, strike) -> int:
        """Start the pod, strike when the stage has saved the step, and return the exit code that its container has."""
        launcher = kubelet.start(pod, {"volume": struck, "recipe": recipe}, log, **SLOWLY)
        saved = struck / "runs" / "chain" / stage / "checkpoints" / f"step-{step:09}"
        try:
            wait_for(lambda: saved.exists() or launcher.poll() is not None)
            assert launcher.poll() is None, log.read_text()[-3000:]
            strike(launcher)
            code = launcher.wait()
        finally:
            if launcher.poll() is None:
                lose(launcher)
        return code if code >= 0 else 128 - code

    evicted = broken("pretrain", 2, subprocess.Popen.terminate)
    assert evicted == 130 and kubelet.decided(job, evicted, disrupted=True) == "Ignore"
    assert log.read_text().count("Stopped and saved") == 1
    node_lost = broken("sft", 2, lose)
    assert kubelet.decided(job, node_lost, disrupted=True) == "Ignore"
    out_of_memory = broken("grpo", 2, lambda launcher: os.kill(workers(launcher)[1], signal.SIGKILL))
    assert out_of_memory == 137 and kubelet.decided(job, out_of_memory) == "Count"
    assert kubelet.start(pod, {"volume": struck, "recipe": recipe}, log).wait() == 0, log.read_text()[-3000:]
    (recipe / "recipe.yaml").write_text("{kind: pipeline, read: {kind: pretrain, total_token: 5}}")
    wrong = kubelet.start(pod, {"volume": struck, "recipe": recipe}, log).wait()
    assert wrong == 2 and kubelet.decided(job, wrong) == "FailJob", log.read_text()[-3000:]
    for stage in ("pretrain", "sft", "grpo"):
        assert_same_run(struck / "runs" / "chain" / stage, calm / "runs" / "chain" / stage)
