"""A program for test_parallel.py: forks the ranks of many small runs on gloo and compares what they end in.

One process imports everything once and forks for every rank, as torchrun would start it; it never computes itself. Prints
``ok <case>`` or ``FAILED <case>: why``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import json
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch._dynamo
import torch.distributed.fsdp

import osler.train.run  # noqa: F401 - loaded once for every fork
from osler.checkpoint import store
from osler.checkpoint.sharded import whole
from osler.cli import main
from osler.model.config import ModelConfig
from osler.model.transformer import Transformer
from osler.parallel.config import DdpConfig, FsdpConfig
from osler.parallel.parallelize import parallelize
from osler.runtime import faults
from osler.runtime.world import World, joined

TOLERANCE = 1e-6
PATIENCE_SECONDS = 60
ZERO_AND_BACK = [(2, "fsdp"), (2, "deepspeed"), (2, "deepspeed"), (1, "none")]
STEPS = 12


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(program: Callable[[], int], folder: Path, size: int, fault_rank: int = -1, fault: str = "") -> list[int]:
    """Fork the ranks of a program with torchrun's environment and return their process ids."""
    port, children = free_port(), []
    for rank in range(size):
        child = os.fork()
        if child:
            children.append(child)
            continue
        with open(folder.with_suffix(f".rank{rank}.log"), "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        if size > 1:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}}
        if rank == fault_rank:
            os.environ[faults.VARIABLE] = fault
        code = 1
        try:
            code = program()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return children


def codes(children: Sequence[int]) -> list[int]:
    """Exit codes in the order of the ranks, a signal as its negative number; kills what runs for too long."""
    deadline, found = time.monotonic() + PATIENCE_SECONDS, {}
    while len(found) < len(children):
        for child in children:
            done, status = (0, 0) if child in found else os.waitpid(child, os.WNOHANG)
            if done:
                found[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for child in set(children) - found.keys():
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            raise AssertionError(f"still running after {PATIENCE_SECONDS} s; ended: {found}")
        time.sleep(0.005)
    return [found[child] for child in children]


def train(command: Sequence[str], folder: Path, size: int, **fault: object) -> list[int]:
    return codes(start(functools.partial(main, [*command, "--run", str(folder)]), folder, size, **fault))  # type: ignore[arg-type]


def said(folder: Path, rank: int) -> str:
    return folder.with_suffix(f".rank{rank}.log").read_text()


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(folder: Path, whole: Path) -> None:
    """The same steps logged, losses and gradient norms equal to the tolerance, and nearly the same weights at the end."""
    found, expected = metrics(folder), metrics(whole)
    assert [line["step"] for line in found] == [line["step"] for line in expected], "other steps were logged"
    for line, other in zip(found, expected, strict=True):
        names = [name for name in other if name.startswith(("train/", "eval/")) and name != "eval/seconds"]
        for name in names:
            close = math.isclose(line[name], other[name], rel_tol=TOLERANCE, abs_tol=TOLERANCE)
            assert close, f"step {line['step']}: {name} is {line[name]} and with one process {other[name]}"
    ends = [store.load(path / "checkpoints" / store.folder_name(STEPS)) for path in (folder, whole)]
    for part, tensors in ends[0].tensors.items():
        assert tensors.keys() == ends[1].tensors[part].keys(), f"{part} holds other tensors"
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, ends[1].tensors[part][name], rtol=1e-4, atol=1e-5, msg=f"{part}: {name}")
    assert ends[0].state["tokens"] == ends[1].state["tokens"]


def same_run(command: Sequence[str], whole: Path, folder: Path, size: int, strategy: str) -> None:
    assert train([*command, f"parallel.type={strategy}"], folder, size) == [0] * size, said(folder, 0)[-2000:]
    assert_same(folder, whole)
    assert "Done" in said(folder, 0)
    if strategy == "deepspeed":  # has a log of its own
        return
    assert [said(folder, rank) for rank in range(1, size)] == [""] * (size - 1), "another rank than 0 spoke"


def continued(command: Sequence[str], whole: Path, folder: Path, starts: Sequence[tuple[int, str]]) -> None:
    """Stop by a signal to one rank after a few steps, each time going on with another number of ranks or strategy."""
    for number, (size, strategy) in enumerate(starts):
        last = number == len(starts) - 1
        fault = {} if last else {"fault_rank": size - 1, "fault": "train-step:sigterm:3"}
        ended = train([*command, f"parallel.type={strategy}"], folder, size, **fault)
        assert ended == [0 if last else 130] * size, f"{strategy} on {size} ended with {ended}: {said(folder, 0)[-2000:]}"
        if not last:
            saved = store.newest_good(folder / "checkpoints")[0]
            assert saved is not None and store.load(saved).step == 3 * (number + 1), f"{saved} was saved"
    assert_same(folder, whole)


def watched(command: Sequence[str], root: Path) -> None:
    """A look at everything changes no bit, and finds the same gradients, weights and updates however they are cut up."""
    full = [*command, "monitor.level=full", "monitor.full_every_steps=5"]
    alone, of_all = root / "watched-1", ("grad/", "update/", "model/weight_norm", "model/effective_rank", "data/")
    assert train(full, alone, 1) == [0], said(alone, 0)[-2000:]
    looked = {line["step"]: line for line in metrics(alone) if "grad/mean" in line}
    for strategy in ("ddp", "fsdp"):
        folder, plain = root / f"watched-{strategy}", root / f"pretrain-2-{strategy}"
        assert train([*full, f"parallel.type={strategy}"], folder, 2) == [0, 0], said(folder, 0)[-2000:]
        ends = [store.load(path / "checkpoints" / store.folder_name(STEPS)).tensors["model"] for path in (folder, plain)]
        assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items()), f"{strategy}: watching changed weights"
        found = {line["step"]: line for line in metrics(folder) if "grad/mean" in line}
        assert found.keys() == looked.keys() and found, f"looked in steps {list(found)}"
        for step, line in looked.items():
            assert found[step].keys() == line.keys(), f"{strategy}: {found[step].keys() ^ line.keys()}"
            for name in filter(lambda name: name.startswith(of_all), line):
                close = math.isclose(found[step][name], line[name], rel_tol=1e-4, abs_tol=1e-7)
                assert close, f"step {step}: {name} is {found[step][name]} by {strategy} and {line[name]} with one process"


def lost(command: Sequence[str], folder: Path) -> None:
    """When one rank is killed, the other ends soon, says why in a paragraph, and leaves nothing torn."""
    before = time.monotonic()
    ended = train([*command, "parallel.type=ddp"], folder, 2, fault_rank=1, fault="train-step:kill:6")
    assert ended == [2, -signal.SIGKILL], f"ended with {ended}"
    assert time.monotonic() - before < PATIENCE_SECONDS / 2
    assert "Rank 0 of 2 lost the others" in said(folder, 0) and "Traceback" not in said(folder, 0)
    saved, skipped = store.newest_good(folder / "checkpoints")
    assert saved is not None and not skipped and store.load(saved).step == 4


def refused(command: Sequence[str], folder: Path, words: Sequence[str]) -> None:
    """A mistake is told once and in one paragraph, and every rank ends with 2."""
    assert train(command, folder, 2) == [2, 2]
    told = said(folder, 0)
    assert all(word in told for word in words), told
    assert said(folder, 1) == "" and "Traceback" not in told
    assert not folder.exists()


def spread(world: World, value: float) -> int:
    """How far apart the ranks' values are, in millionths."""
    least, most = world.least(round(value * 1e6), -round(value * 1e6))
    return -most - least


def accumulate() -> int:
    """Within ``accumulating`` gradients stay on their rank; the backward pass after it averages all of them."""
    with joined("cpu") as world:
        for config in (DdpConfig(), FsdpConfig()):
            model = Transformer(ModelConfig(num_layers=1, hidden_size=32, vocab_size=64, head_init="normal"))
            model.init_weights(0)
            engine = parallelize(model, config, world, compile=False)
            ids = torch.arange(8)[None] + 10 * world.rank
            with engine.accumulating():
                engine.backward(engine.loss(ids, ids + 1, None))
            gradient = model.layers[0].mlp.down_proj.weight.grad
            if isinstance(config, DdpConfig):
                assert spread(world, float(gradient.abs().sum())) > 0, "DDP has averaged"
            else:
                assert gradient is None, "FSDP has reduced"
            engine.backward(engine.loss(ids, ids + 1, None))
            gradient = whole(model.layers[0].mlp.down_proj.weight.grad)
            assert float(gradient.abs().sum()) > 0 and spread(world, float(gradient.abs().sum())) == 0, "not averaged"
    return 0


def holds_back(folder: Path) -> None:
    assert codes(start(accumulate, folder, 2)) == [0, 0], said(folder, 0) + said(folder, 1)


def report(name: str, case: Callable[[], None]) -> None:
    before = time.monotonic()
    try:
        case()
    except (AssertionError, OSError) as error:
        print(f"FAILED {name}: {error}", flush=True)
    else:
        print(f"ok {name} {time.monotonic() - before:.1f}", flush=True)


def run_all(recipes: dict[str, list[str]], root: Path) -> None:
    for kind, command in recipes.items():
        with contextlib.redirect_stdout(io.StringIO()):  # reads the recipe once for every fork
            main([*command, "--dry-run"])
        whole = root / f"{kind}-1"
        assert train(command, whole, 1) == [0], said(whole, 0)[-2000:]
        for size, strategy in ((2, "ddp"), (2, "fsdp"), (4, "fsdp" if kind == "pretrain" else "ddp")):
            folder = root / f"{kind}-{size}-{strategy}"
            report(f"{kind} {strategy} {size}", functools.partial(same_run, command, whole, folder, size, strategy))
    pretrain = recipes["pretrain"]
    for name, starts in {
        "shrinks": [(4, "fsdp"), (2, "fsdp"), (1, "none")],
        "changes": [(4, "ddp"), (4, "fsdp"), (2, "ddp")],
        "grows": [(1, "none"), (2, "fsdp"), (4, "fsdp")],
    }.items():
        report(name, functools.partial(continued, pretrain, root / "pretrain-1", root / name, starts))
    if importlib.util.find_spec("deepspeed"):
        for stage in (1, 2, 3):
            zero = [*pretrain, f"parallel.stage={stage}"]
            folder = root / f"zero-{stage}"
            report(f"ZeRO {stage}", functools.partial(same_run, zero, root / "pretrain-1", folder, 2, "deepspeed"))
        report("to ZeRO and back", functools.partial(continued, pretrain, root / "pretrain-1", root / "zero", ZERO_AND_BACK))
    report("accumulation", functools.partial(holds_back, root / "accumulation"))
    report("watched", functools.partial(watched, pretrain, root))
    report("lost", functools.partial(lost, pretrain, root / "lost"))
    report("none", functools.partial(refused, pretrain, root / "none", ["2 processes", "parallel.type=ddp"]))
    uneven = [*pretrain, "parallel.type=ddp", "batch_tokens=192", "micro_batch_tokens=64"]
    report("rows", functools.partial(refused, uneven, root / "rows", ["3 rows", "multiple of 2"]))


if __name__ == "__main__":
    pretrain, sft, folder = sys.argv[1:]
    # Eight rows a batch: two micro-batches on each of four ranks. In fine-tuning twelve rows, three on each of four ranks, in
    # micro-batches of two and one; whole documents, padded, share the learned tokens unevenly too.
    text = ["batch_tokens=512", "micro_batch_tokens=64", "total_tokens=6144", "exam={every_tokens: 3072, items: 7}"]
    turns = ["batch_tokens=1536", "micro_batch_tokens=256", "total_tokens=18432"]
    pretrained = Path(folder) / "pretrain-1"
    run_all({"pretrain": ["pretrain", pretrain, *text], "sft": ["sft", sft, f"init_from={pretrained}", *turns]}, Path(folder))
