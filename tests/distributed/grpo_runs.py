"""A program for test_grpo.py: GRPO on one, two and four processes on gloo, and what it ends in; see ``parallel_runs.py``."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import torch
from forks import report, said, train
from parallel_runs import continued, lost, metrics, refused

import osler.rl.run  # noqa: F401 - loaded once for every fork
from osler.checkpoint import store
from osler.cli.main import main

TOLERANCE = 1e-5
CLOCKED = ("time", "perf/", "eval/seconds")
SHARED = ("data/padding_frac",)  # depends on how rows are shared and cut
DRAWN = ("reward", "completions/", "answer/", "filters/", "tasks/", "groups/", "frac_", "eval/", "tokens")  # no rounding in these


def assert_same(folder: Path, whole: Path) -> None:
    """The same completions and rewards in every step, losses equal to the tolerance, nearly the same tensors at the end."""
    found, expected = metrics(folder), metrics(whole)
    assert [line["step"] for line in found] == [line["step"] for line in expected], "other steps were logged"
    for line, other in zip(found, expected, strict=True):
        assert line.keys() == other.keys()
        for name in other:
            if not name.startswith(CLOCKED + SHARED):
                tolerance = 0.0 if name.startswith(DRAWN) else TOLERANCE
                close = math.isclose(line[name], other[name], rel_tol=tolerance, abs_tol=tolerance)
                assert close, f"step {line['step']}: {name} is {line[name]} and with one process {other[name]}"
    ends = [store.load(store.newest_good(path / "checkpoints")[0]) for path in (folder, whole)]
    for part, tensors in ends[1].tensors.items():
        assert tensors.keys() == ends[0].tensors[part].keys(), f"{part} holds other tensors"
        for name, tensor in tensors.items():
            torch.testing.assert_close(ends[0].tensors[part][name], tensor, rtol=1e-5, atol=5e-6, msg=f"{part}: {name}")
    remembered = [[end.state["incidents"].pop(name) for name in ("spikes", "before")] for end in ends]  # losses, norms
    torch.testing.assert_close(*remembered, rtol=TOLERANCE, atol=TOLERANCE)
    assert ends[0].state == ends[1].state


def same_run(command: Sequence[str], whole: Path, folder: Path, size: int, strategy: str) -> None:
    assert train([*command, f"parallel.type={strategy}"], folder, size) == [0] * size, said(folder, 0)[-2000:]
    assert_same(folder, whole)
    told = said(folder, 0)
    assert "Done" in told and "Sample 1 before training" in told
    assert ("some of them draw nothing" in told) == (size > 3)
    assert (folder / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    assert [said(folder, rank) for rank in range(1, size)] == [""] * (size - 1), "another rank than 0 spoke"


def taught_nothing(command: Sequence[str], folder: Path) -> None:
    """A model from which nothing can be learned is refused by every rank and reported by one, and nothing is left behind."""
    assert train([*command, "parallel.type=ddp"], folder, 2) == [2, 2]
    told = said(folder, 0) + said(folder, 1)
    assert told.count("osler: ") == told.count("preflight=warn") == told.count("Before training") == 1, told
    assert not folder.exists()


def run_all(grpo: list[str], root: Path) -> None:
    with redirect_stdout(io.StringIO()):  # reads the recipe once for every fork
        main([*grpo, "--dry-run"])
    # Three questions on four ranks: one asks none. In the other variant sampling masks stay with who drew them, and without a KL
    # term pairs of equal rewards, of which one refill leaves some, are not learned from: the ranks have other numbers of passes.
    options = ["beta=0", "top_k=40", "samples_per_prompt=2", "updates_per_batch=2", "dynamic_sampling=true", "max_refills=1"]
    uneven = [*grpo, *(f"algorithm.{option}" for option in options), "micro_batch_tokens=60", "steps=4"]
    cases = {"plain": (grpo, [(2, "ddp"), (4, "ddp"), (2, "fsdp")]), "uneven": (uneven, [(4, "ddp"), (2, "fsdp")])}
    for name, (command, sizes) in cases.items():
        whole = root / name
        assert train(command, whole, 1) == [0], said(whole, 0)[-2000:]
        for size, strategy in sizes:
            folder = root / f"{name}-{size}-{strategy}"
            report(f"{name} {strategy} {size}", same_run, command, whole, folder, size, strategy)
    assert {line.get("groups/effective") for line in metrics(root / "uneven")} & {1.0, 2.0}, "no group was left out"
    for name, starts in {"shrinks": [(4, "ddp"), (2, "fsdp"), (1, "none")], "grows": [(1, "none"), (2, "ddp")]}.items():
        report(name, continued, grpo, root / "plain", root / name, starts, 2, assert_same)
    report("lost", lost, grpo, root / "plain", root / "lost", 3, 2, assert_same)
    report("none", refused, grpo, root / "none", ["2 processes", "parallel.type=ddp"])
    report("taught nothing", taught_nothing, [*grpo, "algorithm.max_new_tokens=1"], root / "taught")
    zero = [*grpo, "parallel.type=deepspeed"]
    report("deepspeed", refused, zero, root / "zero", ["parallel", "deepspeed", "ddp"], times=2)


if __name__ == "__main__":
    grpo, start, folder = sys.argv[1:]
    shorter = ["steps=6", "checkpoint.every_steps=2", "eval_every_steps=3", "algorithm.reference_refresh_steps=2"]
    run_all(["grpo", grpo, f"init_from={start}", *shorter], Path(folder))
