"""A program for test_resume.py: forks runs, kills or interrupts them, and compares what they end in.

One process imports and reads everything once and forks for every start; it never computes itself. Prints ``ok <case>`` or
``FAILED <case>: why``.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch._dynamo  # noqa: F401 - torch.optim loads it, for seconds; here it is loaded once for every fork
from forks import codes, report, said, start, train
from run_folders import ENDLESS, LONG_STEP, TRAINERS, assert_same_run, has_begun, logged, newest_step, wait_for

import osler.rl.run
import osler.train.run  # noqa: F401
from osler.cli.main import main, program
from osler.runtime import stop
from osler.tasks.registry import load_clinic

# In the middle of a step, in every phase of a save, between a save and the mark that it is the best, in an evaluation.
KILLS = {
    "pretrain": ("train-step:kill:7", "save-manifest:kill:2", "save-rename:kill:3", "rotate:kill"),
    "sft": ("save-best:kill",),
    "grpo": ("save-state:kill:2", "evaluate:kill:2"),
}
RANDOM_KILLS = 2
ENDLESS_GRPO = ["steps=1_000_000", "eval_every_steps=1_000_000", "checkpoint.every_steps=1_000_000"]
LONG_STEP_GRPO = ["algorithm.prompts_per_step=60", "algorithm.samples_per_prompt=500", "eval_task=null"]


def fork_command(command: list[str], folder: Path, same_request_seconds: float) -> int:
    """Start the run in a forked child, which ends as the command does, and return its process id.

    No clock decides what counts as one request, but ``same_request_seconds``.
    """
    child = os.fork()
    if child:
        return child
    with open(folder.with_suffix(".log"), "a") as log:
        os.dup2(log.fileno(), 2)
    stop.SAME_REQUEST_SECONDS = same_request_seconds
    sys.argv = ["osler", *command, "--run", str(folder)]
    program()


def check(command: list[str], whole: Path, folder: Path, fault: str) -> None:
    """Kill once at a named place, or again and again at moments nobody chose, then let it finish and compare."""
    if fault:
        assert train(command, folder, 1, fault_rank=0, fault=fault) == [-signal.SIGKILL], "the fault did not strike"
    else:
        rng = random.Random(0)
        for _ in range(RANDOM_KILLS):
            children = start(functools.partial(main, [*command, "--run", str(folder)]), folder, 1)
            time.sleep(rng.uniform(0.1, 0.6))
            os.kill(children[0], signal.SIGKILL)
            codes(children)
    assert train(command, folder, 1) == [0], said(folder, 0)[-2000:]
    assert_same_run(folder, whole)


def interrupt(children: Sequence[int], log: Path, folder: Path, *, in_first_step: bool) -> list[int]:
    """Send Ctrl-C to all processes of a run, and from when it is heard again and again until they end; return their codes."""
    try:
        wait_for(lambda: has_begun(folder, in_first_step))
        for child in children:
            os.kill(child, signal.SIGINT)
        wait_for(lambda: "SIGINT: finishing this step and saving; once more to leave at once" in log.read_text())
    except AssertionError:
        for child in children:
            os.kill(child, signal.SIGKILL)
        codes(children)
        raise
    return codes(children, again=signal.SIGINT)  # the second request, or the same one, as a launcher passes it on


def interrupted(kind: str, command: list[str], folder: Path, *, twice: bool) -> None:
    """Ctrl-C on a run without end: once, and passed on to its last moment, saves and leaves; twice leaves at once; 130 always."""
    endless, long_step = (ENDLESS_GRPO, LONG_STEP_GRPO) if kind == "grpo" else (ENDLESS, LONG_STEP)
    child = fork_command([*command, *endless, *(long_step if twice else [])], folder, 0.0 if twice else math.inf)
    log = folder.with_suffix(".log")
    ended, said = interrupt([child], log, folder, in_first_step=twice), log.read_text()
    assert ended == [130], f"ended with {ended}: {said[-2000:]}"
    assert "Traceback" not in said and "ignored" not in said, said[-2000:]
    if twice:
        assert "osler: interrupted" in said and not (folder / "checkpoints").exists()
        return
    assert "Stopped and saved" in said and newest_step(folder) >= logged(folder)[-1]["step"]


def run_all(recipes: dict[str, list[str]], root: Path) -> None:
    load_clinic(split="train", limit=1)
    for kind, command in recipes.items():
        with contextlib.redirect_stdout(io.StringIO()):
            main([*command, "--dry-run"])
        whole = root / f"{kind}-whole"
        assert train(command, whole, 1) == [0], f"{kind} does not run"
        for number, fault in enumerate((*KILLS[kind], *([""] if kind != "sft" else []))):
            folder = root / f"{kind}-{number}"
            report(f"{kind} {fault or 'random kills'}", check, command, whole, folder, fault)
    for kind, command in ((kind, recipes[kind]) for kind in TRAINERS):
        for twice in (False, True):
            folder = root / f"interrupted-{kind}-{twice}"
            report(f"{kind} ctrl-c {'twice' if twice else 'once'}", interrupted, kind, command, folder, twice=twice)


if __name__ == "__main__":
    pretrain, sft, grpo, pretrained, tuned, folder = sys.argv[1:]
    run_all(
        {
            "pretrain": ["pretrain", pretrain],
            "sft": ["sft", sft, f"init_from={pretrained}"],
            "grpo": ["grpo", grpo, f"init_from={tuned}"],
        },
        Path(folder),
    )
