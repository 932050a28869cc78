"""A program for test_kill.py: forks children that are killed while they save, and checks what is left.

One process imports torch once and forks for every case. Prints ``ok <case>`` or ``FAILED <case>: why``.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from osler.checkpoint.folders import mark_best, rotate
from osler.checkpoint.saver import Saver
from osler.checkpoint.store import CheckpointSaveError, load, newest_good, save
from osler.runtime import faults

STAGES = (
    "save-tensors:kill",
    "save-tensors:kill:2",
    "save-state:kill",
    "save-files:kill",
    "save-manifest:kill",
    "write-atomic:kill",
    "save-rename:kill",
    "save-verify:kill",
    "save-best:kill",
    "rotate:kill",
)


def content(step: int, version: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    model = {"weight": torch.full((300, 100), float(step)), "bias": torch.arange(7) + version}
    return {"model": model, "optimizer": {"weight/exp_avg": torch.full((300, 100), step / 3)}}


def put(root: Path, step: int, version: int = 0) -> None:
    files = {"tokenizer.json": b"{}" * 500}
    path = save(root, step, tensors=content(step, version), state={"step": step, "text": "x" * 1000}, files=files)
    mark_best(path, "eval/loss", 1 / (step + 1))
    rotate(root, path, keep_last=1)


def put_in_background(root: Path, step: int) -> None:
    with Saver(root, keep_last=1, in_background=True) as saver:
        saver.save(step, tensors=content(step, 1), state={"step": step}, files={})


def in_child(work: Callable[[], None]) -> int:
    """Run ``work`` in a forked child; returns the signal that ended it, or minus its exit code."""
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            work()
            code = 0
        os._exit(code)
    status = os.waitpid(child, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


def check(root: Path, steps: set[int]) -> None:
    """A good checkpoint of one of these steps is there with the right content, and the next save leaves no remnant."""
    found, skipped = newest_good(root)
    assert found is not None, f"no good checkpoint, skipped {skipped}"
    assert not skipped, f"a torn folder had to be skipped: {skipped}"
    loaded = load(found)
    assert loaded.step in steps, f"found step {loaded.step}"
    assert torch.equal(loaded.tensors["model"]["weight"], content(loaded.step)["model"]["weight"])
    assert loaded.state["step"] == loaded.step
    put(root, 1000)
    assert load(newest_good(root)[0]).step == 1000
    names = sorted(os.listdir(root))
    assert names == ["best.json", "step-000001000"], f"remnants: {names}"


def killed_at(root: Path, spec: str, next_step: int, *, in_background: bool = False) -> None:
    put(root, 1)

    def work() -> None:
        os.environ[faults.VARIABLE] = spec
        if in_background:
            put_in_background(root, next_step)
        else:
            put(root, next_step, version=1)

    ended_by = in_child(work)
    if spec.startswith("rotate") and next_step == 1:
        assert ended_by in (signal.SIGKILL, 0)
    else:
        assert ended_by == signal.SIGKILL, f"the fault did not strike ({ended_by})"
    check(root, {1, next_step})


def killed_at_random(root: Path) -> None:
    """Thirty kills from outside, at moments nobody chose; every time the run goes on from what it finds."""
    rng = random.Random(0)
    put(root, 1)
    for _ in range(30):
        child = os.fork()
        if child == 0:
            step = load(newest_good(root)[0]).step
            while True:
                step += 1
                put(root, step)
        time.sleep(rng.uniform(0.0, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found, skipped = newest_good(root)
        assert found is not None and not skipped, f"{found} {skipped}"
    check(root, set(range(10_000)))


def file_limit(root: Path) -> None:
    """A write that the system itself refuses, in the middle of a tensor."""
    put(root, 1)

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            put(root, 2)
        except CheckpointSaveError:
            assert sorted(os.listdir(root)) == ["best.json", "step-000000001"]
            return
        raise AssertionError

    assert in_child(work) == 0
    check(root, {1})


def best_survives(root: Path) -> None:
    """The best checkpoint is replaced under its own name and killed between the two renames: there, and still best."""
    put(root, 1)
    put(root, 2)
    mark_best(root / "step-000000002", "eval/loss", 0.1)

    def work() -> None:
        os.environ[faults.VARIABLE] = "save-rename:kill"
        put(root, 2)

    assert in_child(work) == signal.SIGKILL
    rotate(root, save(root, 3, tensors=content(3), state={"step": 3}), keep_last=1)
    assert (root / "step-000000002").is_dir() and (root / "step-000000003").is_dir()
    check(root, {3})


def main(folder: Path) -> None:
    cases: dict[str, Callable[[Path], None]] = {}
    for spec in STAGES:
        for next_step in (2, 1):
            cases[f"{spec} saving step {next_step} after 1"] = lambda root, s=spec, n=next_step: killed_at(root, s, n)
    for spec in ("save-tensors:kill:2", "save-manifest:kill", "save-rename:kill", "save-verify:kill"):
        name = f"{spec} saving step 2 after 1 in the background"
        cases[name] = lambda root, s=spec: killed_at(root, s, 2, in_background=True)
    cases["thirty random kills"] = killed_at_random
    cases["file size limit"] = file_limit
    cases["best survives"] = best_survives
    for number, (name, case) in enumerate(cases.items()):
        try:
            case(folder / str(number))
        except (AssertionError, OSError, RuntimeError) as error:
            print(f"FAILED {name}: {type(error).__name__} {error}")
        else:
            print(f"ok {name}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
