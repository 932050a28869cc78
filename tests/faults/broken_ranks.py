"""A program for test_ranks.py: forks the ranks of small runs on gloo and breaks one of them, or interrupts all.

Prints ``ok <case>`` or ``FAILED <case>: why``. What starts ranks and compares runs is that of ``tests/distributed``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch
from forks import report, said, start, train
from interrupted_runs import interrupt
from run_folders import ENDLESS, LONG_STEP, STEPS, assert_same_run, at, flip, logged, newest_step

import osler.rl.run  # noqa: F401 - loaded once for every fork
from osler.checkpoint import store
from osler.cli.main import main, program
from osler.runtime import stop

POISON = "train-loss:nan:9-10"


def end(folder: Path) -> store.Loaded:
    return store.load(at(folder, STEPS))


def one_of_four_killed(command: Sequence[str], whole: Path, folder: Path) -> None:
    """The other three end soon and say why; the same command goes on from the last save, to the bit."""
    ended = train(command, folder, 4, fault_rank=2, fault="train-step:kill:6")
    assert ended == [75, 75, -signal.SIGKILL, 75], f"ended with {ended}"
    told = "".join(said(folder, rank) for rank in range(4))
    assert told.count("of 4 lost the others") == 1 and "Traceback" not in told, told
    assert newest_step(folder) == 4
    assert train(command, folder, 4) == [0] * 4, said(folder, 0)[-2000:]
    assert_same_run(folder, whole)


def damaged(command: Sequence[str], whole: Path, folder: Path) -> None:
    """All ranks pass over a newest checkpoint that rots, which is told once, and go on from the one before, to the bit."""
    assert train(command, folder, 4, fault_rank=1, fault="train-step:sigterm:7") == [130] * 4, said(folder, 0)[-2000:]
    flip(at(folder, 7) / "optimizer.safetensors")
    assert train(command, folder, 4) == [0] * 4, said(folder, 0)[-2000:]
    told = "".join(said(folder, rank) for rank in range(4))
    assert " ".join(told.split()).count("step-000000007 is damaged") == 1, told
    assert_same_run(folder, whole)


def poisoned_rank(command: Sequence[str], folder: Path, offset: int = 2 * 512) -> None:
    """One rank's loss is NaN: all skip the step, all go back, all go on; and to the same end when one dies going back."""
    calm, cut = folder.with_name(f"{folder.name}-calm"), folder.with_name(f"{folder.name}-cut")
    assert train(command, calm, 2, fault_rank=1, fault=POISON) == [0, 0], said(calm, 0)[-2000:]
    state = end(calm).state["incidents"]
    assert (state["rollbacks"], state["data_offset"]) == (1, offset), state
    assert said(calm, 0).count("Going back from step 10 to step-000000008") == 1 and said(calm, 1) == ""
    if "parallel.type=fsdp" in command or command[0] == "grpo":
        return
    assert train(command, cut, 2, fault_rank=1, fault=f"{POISON},rollback:kill") == [75, -signal.SIGKILL]
    assert train(command, cut, 2) == [0, 0]
    assert_same_run(cut, calm)


def poisoned_for_ever(command: Sequence[str], folder: Path) -> None:
    """Every rank ends with 2, and one of them tells why."""
    assert train(command, folder, 2, fault_rank=1, fault="train-loss:nan:9-") == [2, 2]
    told = said(folder, 0) + said(folder, 1)
    assert told.count("gone back 2 times already") == 1 and "lost the others" not in told and "Traceback" not in told, told


def zero_skips(command: Sequence[str], folder: Path) -> None:
    """DeepSpeed leaves out a step whose gradient is not finite, in fp32 too."""
    assert train(command, folder, 2, fault_rank=1, fault="train-loss:nan:5") == [0, 0], said(folder, 0)[-2000:]
    assert sum(line.get("train/skipped_steps", 0) for line in logged(folder)) == 1
    assert all(torch.isfinite(value).all() for value in end(folder).tensors["model"].values())


def interrupted(command: Sequence[str], folder: Path, *, twice: bool) -> None:
    """Ctrl-C, as a terminal sends it to all ranks: once saves and leaves, twice leaves at once; nothing is torn."""
    endless = [*command, *ENDLESS, *(LONG_STEP if twice else []), "--run", str(folder)]

    def command_line() -> NoReturn:
        stop.SAME_REQUEST_SECONDS = 0.0 if twice else math.inf  # no clock decides what counts as one request
        sys.argv = ["osler", *endless]
        program()  # takes signals to its last moment, which `main` leaves to its caller

    ended = interrupt(start(command_line, folder, 2), folder.with_suffix(".rank0.log"), folder, in_first_step=twice)
    told = said(folder, 0)
    assert "Traceback" not in told, told
    if twice:
        # A rank that hears of the other's end before its own second signal says so, with its own code.
        assert set(ended) <= {130, 75} and 130 in ended, f"ended with {ended}: {told}"
        assert not (folder / "checkpoints").exists()
        return
    assert ended == [130, 130] and "Stopped and saved" in told, f"ended with {ended}: {told}"
    assert newest_step(folder) >= logged(folder)[-1]["step"]


def run_all(recipe: str, grpo: list[str], root: Path) -> None:
    intervals = ["total_tokens=6144", "checkpoint.every_tokens=2048", "eval_every_tokens=3072"]
    command = ["pretrain", recipe, "batch_tokens=512", *intervals, "recovery.max_skipped_steps=2", "parallel.type=ddp"]
    with contextlib.redirect_stdout(io.StringIO()):  # reads the recipe once for every fork
        main([*command, "--dry-run"])
    whole = root / "whole"
    assert train(command, whole, 4) == [0] * 4, said(whole, 0)[-2000:]
    report("one of four killed", one_of_four_killed, command, whole, root / "killed")
    report("damaged", damaged, command, whole, root / "damaged")
    for strategy in ("ddp", "fsdp"):
        sharing = [*command, f"parallel.type={strategy}"]
        report(f"poisoned {strategy}", poisoned_rank, sharing, root / f"poisoned-{strategy}")
    report("poisoned grpo", poisoned_rank, grpo, root / "poisoned-grpo", offset=2)
    report("poisoned for ever", poisoned_for_ever, command, root / "for-ever")
    for twice in (False, True):
        report(f"ctrl-c {twice}", interrupted, command, root / f"interrupted-{twice}", twice=twice)
    if importlib.util.find_spec("deepspeed"):
        for stage in (1, 3):
            zero = [*command, "parallel.type=deepspeed", f"parallel.stage={stage}"]
            report(f"ZeRO {stage}", zero_skips, zero, root / f"zero-{stage}")


if __name__ == "__main__":
    pretrain, grpo, start_of_grpo, folder = sys.argv[1:]
    resilient = ["recovery.max_skipped_steps=2", "parallel.type=ddp"]
    run_all(pretrain, ["grpo", grpo, f"init_from={start_of_grpo}", *resilient], Path(folder))
