"""A program for test_parallel.py: GRPO on one, two and four processes on gloo, and what it ends in; see ``parallel_runs.py``."""

import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import torch
from forks import report, said, train
from parallel_runs import assert_logged_the_same, assert_tensors_near, continued, lost, refused
from parallel_runs import same_run as same_start
from run_folders import logged
from vllm_contract import VllmContract

import osler.rl.run  # noqa: F401 - loaded once for every fork
from osler.checkpoint import folders, store
from osler.cli.main import main
from osler.inference.load import load_model

TOLERANCE = 1e-5
MAY_DIFFER = ("time", "perf/", "eval/seconds", "data/padding_frac")  # the clock, and how rows are shared and cut
DRAWN = ("reward", "completions/", "answer/", "filters/", "tasks/", "groups/", "frac_", "eval/", "tokens")  # no rounding in these


def assert_same(folder: Path, whole: Path) -> None:
    """The same completions and rewards in every step, losses equal to the tolerance, nearly the same tensors at the end."""

    def tolerance_of(name: str) -> float | None:
        return None if name.startswith(MAY_DIFFER) else 0.0 if name.startswith(DRAWN) else TOLERANCE

    assert_logged_the_same(folder, whole, tolerance_of)
    assert [line.keys() for line in logged(folder)] == [line.keys() for line in logged(whole)]
    found, expected = (store.load(folders.newest_good(path / "checkpoints")[0]) for path in (folder, whole))
    assert_tensors_near(found, expected, rtol=1e-5, atol=5e-6)
    remembered = [[each.state["incidents"].pop(name) for name in ("spikes", "before")] for each in (found, expected)]
    torch.testing.assert_close(*remembered, rtol=TOLERANCE, atol=TOLERANCE)
    assert found.state == expected.state


def same_run(command: Sequence[str], whole: Path, folder: Path, size: int, strategy: str) -> None:
    same_start(command, whole, folder, size, strategy, assert_same)
    assert "Sample 1 before training" in said(folder, 0)
    assert (folder / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


@contextmanager
def served(checkpoint: str) -> Iterator[str]:
    """The address of a server of this checkpoint, in a process of its own."""
    read, write = os.pipe()
    if not (process := os.fork()):
        os.write(write, VllmContract(load_model(checkpoint).model, [0]).url.encode())
        signal.pause()
    try:
        yield os.read(read, 100).decode()
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def run_all(grpo: list[str], root: Path) -> None:
    with redirect_stdout(io.StringIO()):  # reads the recipe once for every fork
        main([*grpo, "--dry-run"])
    # Three questions on four ranks: one asks none. In the other variant sampling masks stay with who drew them, and without a KL
    # term pairs of equal rewards, of which one refill leaves some, are not learned from: the ranks have other numbers of passes.
    options = ["beta=0", "top_k=40", "samples_per_prompt=2", "updates_per_batch=2", "dynamic_sampling=true", "max_refills=1"]
    # Where a gradient is nothing but rounding, AdamW would make a step of full size of it, which differs from rank to rank.
    uneven = [*grpo, *(f"algorithm.{option}" for option in options), "micro_batch_tokens=60", "steps=4", "optim.eps=1e-6"]
    cases = {"plain": (grpo, [(2, "ddp"), (4, "ddp"), (2, "fsdp")]), "uneven": (uneven, [(4, "ddp"), (2, "fsdp")])}
    for name, (command, sizes) in cases.items():
        whole = root / name
        assert train(command, whole, 1) == [0], said(whole, 0)[-2000:]
        for size, strategy in sizes:
            folder = root / f"{name}-{size}-{strategy}"
            report(f"{name} {strategy} {size}", same_run, command, whole, folder, size, strategy)
    assert {line.get("groups/effective") for line in logged(root / "uneven")} & {1.0, 2.0}, "no group was left out"
    for name, starts in {"shrinks": [(4, "ddp"), (2, "fsdp"), (1, "none")], "grows": [(1, "none"), (2, "ddp")]}.items():
        report(name, continued, grpo, root / "plain", root / name, starts, 2, assert_same)
    report("lost", lost, grpo, root / "plain", root / "lost", 3, 2, assert_same)
    report("none", refused, grpo, root / "none", ["2 processes", "parallel.type=ddp"])
    hopeless = [*grpo, "algorithm.max_new_tokens=1", "parallel.type=ddp"]
    report("taught nothing", refused, hopeless, root / "taught", ["Before training", "preflight=warn"])
    own = root / "own.py"
    only = 'return float("nan") if item.id.endswith("-000003") else 0.5'  # one rank finds it, and the other waits for that rank
    own.write_text(f"from osler.tasks.rewards import correct\ndef nan(item, completion): {only}\n")
    rewards = 'tasks=[{task: {type: clinic, split: train, limit: 60}, rewards: {"%s:%s": 1.0}}]'
    report("own reward", same_run, [*grpo, rewards % (own, "correct")], root / "plain", root / "own", 2, "ddp")
    wrong = [*grpo, rewards % (own, "nan"), "parallel.type=ddp"]
    report("wrong reward", refused, wrong, root / "wrong", ["own.py:nan returned nan", "for an answer to item"], alone=True)
    with served(next(word.partition("=")[2] for word in grpo if word.startswith("init_from="))) as url:
        server = ["rollout.type=server", f"rollout.urls=[{url}]", "rollout.retry_seconds=5"]
        report("servers", same_run, [*grpo, *server], root / "plain", root / "servers", 2, "ddp")
    zero = [*grpo, "parallel.type=deepspeed"]
    report("deepspeed", refused, zero, root / "zero", ["parallel", "deepspeed", "ddp"], times=2)


if __name__ == "__main__":
    grpo, start, folder = sys.argv[1:]
    shorter = ["steps=6", "checkpoint.every_steps=2", "eval_every_steps=3", "algorithm.reference_refresh_steps=2"]
    run_all(["grpo", grpo, f"init_from={start}", *shorter], Path(folder))
