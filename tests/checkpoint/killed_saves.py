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
from functools import partial
from pathlib import Path

import torch
from forks import codes, report, said, start

from osler.checkpoint.folders import mark_best, newest_good, rotate
from osler.checkpoint.saver import Saver
from osler.checkpoint.store import CheckpointSaveError, load, save
from tests.checkpoint.conftest import folder, put, steps, tensors_of

KILLS = (
    "save-tensors:kill", "save-tensors:kill:2", "save-state:kill", "save-files:kill", "save-manifest:kill", "write-atomic:kill",
    "save-rename:kill", "save-verify:kill", "save-best:kill", "rotate:kill",
)  # fmt: skip
IN_BACKGROUND = ("save-tensors:kill:2", "save-manifest:kill", "save-rename:kill", "save-verify:kill")

put_best = partial(put, keep_last=1, best=True)


def put_in_background(root: Path, step: int) -> None:
    with Saver(root, keep_last=1, in_background=True) as saver:
        saver.save(step, tensors=tensors_of(step), state={"step": step}, files={})


def in_child(work: Callable[[Path, int], object], root: Path, step: int, fault: str) -> int:
    """Save a step in a child in which a fault strikes; returns its exit code, or minus the signal that ended it."""

    def save() -> int:
        work(root, step)
        return 0

    return codes(start(save, root, 1, 0, fault))[0]


def check(root: Path, allowed: set[int]) -> None:
    """A good checkpoint of one of these steps is there with the right content, and the next save leaves no remnant."""
    found, skipped = newest_good(root)
    assert found is not None, f"no good checkpoint, skipped {skipped}"
    assert not skipped, f"a torn folder had to be skipped: {skipped}"
    loaded = load(found)
    assert loaded.step in allowed and loaded.state["step"] == loaded.step, f"found step {loaded.step}"
    assert torch.equal(loaded.tensors["model"]["weight"], tensors_of(loaded.step)["model"]["weight"])
    put_best(root, 1000)
    assert newest_good(root) == (folder(root, 1000), [])
    names = sorted(os.listdir(root))
    assert names == ["best.json", "step-000001000"], f"remnants: {names}"


def killed_at(root: Path, spec: str, next_step: int, work: Callable[[Path, int], object] = put_best) -> None:
    put_best(root, 1)
    ended = in_child(work, root, next_step, spec)
    may_end = spec.startswith("rotate") and next_step == 1  # there may be nothing to rotate
    assert ended == -signal.SIGKILL or (may_end and ended == 0), f"the fault did not strike ({ended})"
    check(root, {1, next_step})


def killed_at_random(root: Path) -> None:
    """Thirty kills from outside, at moments nobody chose; every time the run goes on from what it finds."""
    rng = random.Random(0)
    put_best(root, 1)

    def save_on() -> int:
        step = load(newest_good(root)[0]).step
        while True:
            step += 1
            put_best(root, step)

    for _ in range(30):
        (child,) = children = start(save_on, root, 1)
        time.sleep(rng.uniform(0.0, 0.06))
        os.kill(child, signal.SIGKILL)
        codes(children)
        found, skipped = newest_good(root)
        assert found is not None and not skipped, f"{found} {skipped}"
    check(root, set(range(10_000)))


def file_limit(root: Path) -> None:
    """A write that the system itself refuses, in the middle of a tensor."""
    put_best(root, 1)

    def work() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        with contextlib.suppress(CheckpointSaveError):
            put_best(root, 2)
            raise AssertionError
        assert sorted(os.listdir(root)) == ["best.json", "step-000000001"]
        return 0

    assert codes(start(work, root, 1)) == [0], said(root, 0)
    check(root, {1})


def best_survives(root: Path) -> None:
    """The best checkpoint is replaced under its own name and killed between the two renames: there, and still best."""
    put_best(root, 1)
    put_best(root, 2)
    mark_best(folder(root, 2), "eval/loss", 0.1)
    assert in_child(put_best, root, 2, "save-rename:kill") == -signal.SIGKILL
    rotate(root, save(root, 3, tensors=tensors_of(3), state={"step": 3}), keep_last=1)
    assert steps(root) == [2, 3]
    check(root, {3})


def main(top: Path) -> None:
    cases: dict[str, Callable[[Path], None]] = {}
    for spec in KILLS:
        for step in (2, 1):
            cases[f"{spec} saving step {step} after 1"] = partial(killed_at, spec=spec, next_step=step)
    for spec in IN_BACKGROUND:
        cases[f"{spec} in the background"] = partial(killed_at, spec=spec, next_step=2, work=put_in_background)
    cases |= {"thirty random kills": killed_at_random, "file size limit": file_limit, "best survives": best_survives}
    for number, (name, case) in enumerate(cases.items()):
        report(name, case, top / str(number))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
