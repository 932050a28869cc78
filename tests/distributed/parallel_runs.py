"""A program for test_parallel.py: forks the ranks of many small runs on gloo and compares how they end.

One process imports everything once and forks every rank, as torchrun would start it; it never computes itself. It prints
``ok <case>`` or ``FAILED <case>: why``.
"""

import contextlib
import functools
import importlib.util
import io
import json
import math
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._inductor.compile_fx
import torch._inductor.config
import torch.distributed.fsdp
import torchao.float8  # noqa: F401 - loaded once for every fork, like much of what stands here
from forks import codes, report, runs_on_two, said, start, train
from run_folders import STEPS, at, logged
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import osler.train.run  # noqa: F401
from osler.checkpoint import folders, store
from osler.cli.main import main
from osler.data.loader import Batch
from osler.deploy.launch import exit_code_of
from osler.model.config import ModelConfig
from osler.model.transformer import SummedLoss
from osler.optim.bf16 import keep_in_bf16
from osler.optim.build import build_optimizer
from osler.optim.config import AdamWConfig
from osler.parallel.config import DdpConfig, FsdpConfig
from osler.parallel.parallelize import parallelize
from osler.runs.micro_batch import VOTED_STEPS, MicroBatchLimit
from osler.runs.process import Learner, Machine
from osler.runtime.sharded import whole
from osler.runtime.world import EXIT_LOST, World, joined
from osler.tokenizer.config import BPEConfig
from osler.train.config import TrainConfig
from osler.train.setup import make_model
from osler.train.trainer import TrainStep
from tests.models import tiny_model

TOLERANCE = 1e-6
# In FP8 another order of a sum is enough for a weight to be rounded to its other neighbour, now and then. Under FSDP weights
# arrive in bf16, so each is rounded twice; half a bit of bf16 is 2 ** -9.
FP8_TOLERANCES = {"ddp": 1e-4, "fsdp": 2**-8}
# Muon's step depends on the direction of a gradient alone, however small, and so on how a sum was rounded.
MUON_TOLERANCES = {"ddp": 1e-5, "fsdp": 1e-5}
Same = Callable[[Path, Path], None]  # raises AssertionError when two runs differ
ZERO_AND_BACK = [(2, "fsdp"), (2, "deepspeed"), (2, "deepspeed"), (1, "none")]


def assert_logged_the_same(folder: Path, whole: Path, tolerance_of: Callable[[str], float | None]) -> None:
    """The same steps were logged, and the same numbers to the tolerance that their names have; None: they may differ."""
    found, expected = logged(folder), logged(whole)
    assert [line["step"] for line in found] == [line["step"] for line in expected], "other steps were logged"
    for line, other in zip(found, expected, strict=True):
        for name, value in other.items():
            if (tolerance := tolerance_of(name)) is not None:
                close = math.isclose(line[name], value, rel_tol=tolerance, abs_tol=tolerance)
                assert close, f"step {line['step']}: {name} is {line[name]} and with one process {value}"


def assert_tensors_near(found: store.Loaded, expected: store.Loaded, *, rtol: float, atol: float) -> None:
    for part, tensors in expected.tensors.items():
        assert tensors.keys() == found.tensors[part].keys(), f"{part} holds other tensors"
        for name, tensor in tensors.items():
            torch.testing.assert_close(found.tensors[part][name], tensor, rtol=rtol, atol=atol, msg=f"{part}: {name}")


def end(folder: Path) -> store.Loaded:
    return store.load(at(folder, STEPS))


def assert_same(folder: Path, whole: Path, tolerance: float = TOLERANCE) -> None:
    """The same steps logged, losses and gradient norms equal to the tolerance, and nearly the same weights at the end."""

    def tolerance_of(name: str) -> float | None:
        # A token that is likeliest by a rounding error counts or does not.
        compared = name.startswith(("train/", "eval/")) and name not in ("eval/seconds", "eval/token_accuracy")
        return tolerance if compared else None

    assert_logged_the_same(folder, whole, tolerance_of)
    assert_tensors_near(end(folder), end(whole), rtol=100 * tolerance, atol=10 * tolerance)
    assert end(folder).state["tokens"] == end(whole).state["tokens"]


def same_run(command: Sequence[str], whole: Path, folder: Path, size: int, strategy: str, same: Same = assert_same) -> None:
    assert train([*command, f"parallel.type={strategy}"], folder, size) == [0] * size, said(folder, 0)[-2000:]
    same(folder, whole)
    assert "Done" in said(folder, 0)
    if strategy != "deepspeed":  # which has a log of its own
        assert [said(folder, rank) for rank in range(1, size)] == [""] * (size - 1), "another rank than 0 spoke"


def continued(
    command: Sequence[str], whole: Path, folder: Path, starts: Sequence[tuple[int, str]], each: int = 3, same: Same = assert_same
) -> None:
    """Stop by a signal to one rank after ``each`` steps, and go on with another number of ranks or strategy."""
    for number, (size, strategy) in enumerate(starts, start=1):
        last = number == len(starts)
        fault = {} if last else {"fault_rank": size - 1, "fault": f"train-step:sigterm:{each}"}
        ended = train([*command, f"parallel.type={strategy}"], folder, size, **fault)
        assert ended == [0 if last else 130] * size, f"{strategy} on {size} ended with {ended}: {said(folder, 0)[-2000:]}"
        if not last:
            saved = folders.newest_good(folder / "checkpoints")[0]
            assert saved is not None and store.load(saved).step == each * number, f"{saved} was saved"
    same(folder, whole)


def from_earlier(whole: Path, root: Path) -> None:
    """Two ranks take a run back to its first checkpoint, or branch from it, and end where it ended."""
    first = min((whole / "checkpoints").glob("step-*"))
    back, step = Path(shutil.copytree(whole, root / "back")), str(int(first.name[5:]))
    assert train(["pretrain", "--from-step", step, "parallel.type=ddp"], back, 2) == [0, 0], said(back, 0)[-2000:]
    assert (back / "set-aside" / f"after-step-{step}" / "checkpoints" / folders.folder_name(STEPS)).is_dir()
    assert_same(back, whole)
    branch = root / "branch"
    assert train(["pretrain", "--branch", str(first), "parallel.type=fsdp"], branch, 2) == [0, 0], said(branch, 0)[-2000:]
    made_again = [line["step"] for line in logged(branch) if "eval/seconds" in line]  # the evaluation after the checkpoint too
    earlier = [line for line in logged(whole) if line["step"] <= int(step)]
    kept = [json.dumps(line) for line in earlier if not ("eval/seconds" in line and line["step"] in made_again)]
    (branch / "metrics.jsonl").write_text("\n".join([*kept, (branch / "metrics.jsonl").read_text()]))
    assert_same(branch, whole)
    assert [said(folder, 1) for folder in (back, branch)] == ["", ""], "another rank than 0 spoke"


def watched(command: Sequence[str], root: Path) -> None:
    """Full monitoring changes no bit, and finds the same gradients, weights and updates however they are sharded."""
    full = [*command, "monitor.level=full", "monitor.full_every_steps=5"]
    alone, of_all = root / "watched-1", ("grad/", "update/", "model/weight_norm", "model/effective_rank", "data/")
    assert train(full, alone, 1) == [0], said(alone, 0)[-2000:]
    looked = {line["step"]: line for line in logged(alone) if "grad/mean" in line}
    for strategy in ("ddp", "fsdp"):
        folder, plain = root / f"watched-{strategy}", root / f"pretrain-2-{strategy}"
        assert train([*full, f"parallel.type={strategy}"], folder, 2) == [0, 0], said(folder, 0)[-2000:]
        unwatched = end(plain).tensors["model"]
        assert all(torch.equal(value, unwatched[name]) for name, value in end(folder).tensors["model"].items()), strategy
        found = {line["step"]: line for line in logged(folder) if "grad/mean" in line}
        assert found.keys() == looked.keys() and found, f"looked in steps {list(found)}"
        for step, line in looked.items():
            assert found[step].keys() == line.keys(), f"{strategy}: {found[step].keys() ^ line.keys()}"
            for name in filter(lambda name: name.startswith(of_all), line):
                close = math.isclose(found[step][name], line[name], rel_tol=1e-4, abs_tol=1e-7)
                assert close, f"step {step}: {name} is {found[step][name]} by {strategy} and {line[name]} with one process"


def lost(command: Sequence[str], whole: Path, folder: Path, kill: int = 6, step: int = 4, same: Same = assert_same) -> None:
    """When one rank is killed, the other ends soon and says why; one process goes on from what was saved to the same end."""
    ended = train([*command, "parallel.type=ddp"], folder, 2, fault_rank=1, fault=f"train-step:kill:{kill}")
    assert ended == [75, -signal.SIGKILL], f"ended with {ended}"
    assert "Rank 0 of 2 lost the others" in said(folder, 0) and "Traceback" not in said(folder, 0)
    saved, skipped = folders.newest_good(folder / "checkpoints")
    assert saved is not None and not skipped and store.load(saved).step == step
    assert train(command, folder, 1) == [0]
    same(folder, whole)


def refused(command: Sequence[str], folder: Path, words: Sequence[str], *, times: int = 1, alone: bool = False) -> None:
    """An error is reported in one paragraph by the first rank that finds it, and every rank ends with 2.

    Each rank reports what it finds before it connects, because there is no launcher here that keeps a store. So where one rank
    finds it ``alone``, the other may only see that this one is gone, and ends with 75; the launcher's code is 2 even then.
    """
    ended = train(command, folder, 2)
    assert ended == [2, 2] or (alone and sorted(ended) == [2, EXIT_LOST] and exit_code_of(ended) == 2), ended
    told = said(folder, 0) + said(folder, 1)
    assert all(word in told for word in words), told
    assert told.count("osler: ") == times and "Traceback" not in told, told
    assert not folder.exists()


def mistaken(command: Sequence[str], folder: Path, everyone: bool) -> None:
    """An error that the last rank finds, alone or with the others, when all are connected: all end, and one reports it."""
    absent = str(folder.with_suffix(".absent"))

    def program() -> int:
        mine = [f"init_from={absent}"] if everyone or os.environ["RANK"] == "1" else []
        return main([*command, *mine, "parallel.type=ddp", "--run", str(folder)])

    assert codes(start(program, folder, 2)) == [2, 2]
    told = said(folder, 0) + said(folder, 1)
    assert told.count("osler: ") == told.count(absent) == 1, told
    assert "Traceback" not in told and "lost the others" not in told, told
    if not everyone:
        assert absent in said(folder, 1), "another rank than the one with the error reported it"


def spread(world: World, value: float) -> int:
    """How far apart the ranks' values are, in millionths."""
    least, most = world.all_reduce_min(round(value * 1e6), -round(value * 1e6))
    return -most - least


def accumulate() -> int:
    """Within ``accumulating`` gradients stay on their rank; the backward pass after it averages all of them, in fp32."""
    with joined("cpu") as world:
        for config, compute_dtype in ((DdpConfig(), torch.float32), (FsdpConfig(), torch.bfloat16)):
            model = tiny_model(compute_dtype=compute_dtype)
            engine = parallelize(model, config, world)
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
            assert (gradient != gradient.bfloat16()).any(), "averaged in bf16"
        add_up_in_bf16(world)
    return 0


def add_up_in_bf16(world: World) -> None:
    """Gradients of bf16 weights are added up over passes and ranks in fp32: they are rounded in each pass, and at the end."""
    passes = [torch.arange(8)[None] + number + 8 * world.rank for number in range(8)]
    model = tiny_model(compute_dtype=torch.bfloat16)
    keep_in_bf16(model)
    weight = model.layers[0].mlp.down_proj.weight
    exact = torch.zeros(weight.shape)
    for ids in passes:
        SummedLoss(model)(ids, ids + 1, None).backward()
        exact += weight.grad.float()
        model.zero_grad()
    engine = parallelize(model, DdpConfig(), world)
    engine.bind(build_optimizer(model, AdamWConfig()), 1.0)
    for ids in passes[:-1]:
        with engine.accumulating():
            engine.backward(engine.loss(ids, ids + 1, None))
        assert weight.grad is None
    engine.backward(engine.loss(passes[-1], passes[-1] + 1, None))
    exact = world.all_reduce_mean(exact)
    assert float((weight.grad.float() - exact).norm() / exact.norm()) < 2**-8 and weight.grad.dtype == torch.bfloat16


class Sent(TorchDispatchMode):
    """Counts what a process sends to others, by the name of the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.times: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self.times[str(function).split(".")[1]] += 1
        return function(*args, **(kwargs or {}))


def send_once() -> int:
    """However many forward passes a step makes, its gradients travel once."""
    ids = torch.arange(32).view(4, 8)
    batch = Batch(ids, ids + 1, torch.zeros_like(ids))
    with joined("cpu") as world:
        for config in (DdpConfig(), FsdpConfig()):
            model = tiny_model(num_layers=1)
            engine = parallelize(model, config, world)
            optimizer = build_optimizer(model, AdamWConfig())
            for rows in (4, 2, 1):
                learner = Learner(model, optimizer, engine, 1.0)
                step = TrainStep(learner, micro_batch_limit=MicroBatchLimit(learner, rows * 8))
                for _ in range(VOTED_STEPS):
                    step(batch)
                with Sent() as sent:
                    step(batch)
                # One small tensor counts the learned tokens; DDP has one bucket, FSDP the block and what lies outside of it.
                reduced = (sent.times["allreduce_"], sent.times["_reduce_scatter_base_"])
                assert reduced == ((2, 0) if isinstance(config, DdpConfig) else (1, 2)), f"{rows} rows at once: {sent.times}"
    return 0


class Held(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, of those that operations made, and their most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (local := getattr(tensor, "_local_tensor", tensor)).device.type == "cpu":
                storage = local.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return result


def start_in_parts(checkpoint: Path) -> int:
    """FSDP's ranks start with the weights of one process to the bit, new or loaded, and new ones never lie on a rank whole."""
    shape = ModelConfig(
        num_layers=12, hidden_size=64, intermediate_size=128, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=512,
        head_init="normal", residual_init="scaled", max_seq_len=32, value_embeddings="alternate", copy_head_dim=16,
    )  # fmt: skip
    machine = Machine(torch.device("cpu"), torch.float32, False)
    given = {"seq_len": 32, "batch_tokens": 64, "parallel": FsdpConfig(), "tokenizer": BPEConfig(vocab_size=512)}
    with joined("cpu") as world:
        for start in (
            {"model": replace(shape, attention_init="mirrored")}, {"model": replace(shape, attention_init="induction")},
            {"init_from": str(checkpoint)},
        ):  # fmt: skip
            config = TrainConfig(**given, **start)
            alone, _, _ = make_model(config, machine, None)
            with Held() as held:
                model, _, fill = make_model(config, machine, None, processes=world.size)
                engine = parallelize(model, config.parallel, world)
                fill()
            weights = engine.whole_weights(model)
            assert all(torch.equal(weights[name], value) for name, value in alone.state_dict().items()), f"{start}: other weights"
            assert torch.equal(model.rope_cos, alone.rope_cos) and torch.equal(model.rope_sin, alone.rope_sin)
            sizes = [4 * value.numel() for value in weights.values()]
            if "model" in start:  # beside its parts a rank holds a tensor or two that are drawn, gathered and cut, and tables
                allowed = sum(sizes) / world.size + 3 * max(sizes) + 2**14
                assert held.most < allowed < sum(sizes), f"{start}: {held.most:,} of {sum(sizes):,} bytes, allowed {allowed:,}"
    return 0


def compare(
    name: str, command: Sequence[str], root: Path, starts: Sequence[tuple[int, str]], tolerances: Mapping[str, float] = {}
) -> None:
    """Run a command on one process, and report whether it is the same run on several."""
    whole = root / f"{name}-1"
    assert train(command, whole, 1) == [0], said(whole, 0)[-2000:]
    for size, strategy in starts:
        same = functools.partial(assert_same, tolerance=tolerances.get(strategy, TOLERANCE))
        report(f"{name} {strategy} {size}", same_run, command, whole, root / f"{name}-{size}-{strategy}", size, strategy, same)


def run_all(recipes: dict[str, list[str]], root: Path) -> None:
    for kind, command in recipes.items():
        with contextlib.redirect_stdout(io.StringIO()):  # reads the recipe once for every fork
            main([*command, "--dry-run"])
        compare(kind, command, root, [(2, "ddp"), (2, "fsdp"), (4, "fsdp" if kind == "pretrain" else "ddp")])
    pretrain = recipes["pretrain"]
    for name, starts in {
        "shrinks": [(4, "fsdp"), (2, "fsdp"), (1, "none")],
        "changes": [(4, "ddp"), (4, "fsdp"), (2, "ddp")],
        "grows": [(1, "none"), (2, "fsdp"), (4, "fsdp")],
        "alone again": [(4, "ddp"), (1, "none")],
    }.items():
        report(name, continued, pretrain, root / "pretrain-1", root / name, starts)
    report("sft shrinks", continued, recipes["sft"], root / "sft-1", root / "sft", [(2, "ddp"), (1, "none")])
    for strategy, recompute, compiled in (
        ("ddp", "selective", "never"), ("ddp", "full", "always"), ("fsdp", "selective", "never"), ("fsdp", "full", "always")
    ):  # fmt: skip
        name, settings = f"{strategy}-{recompute}-{compiled}", [f"recompute={recompute}", f"compile={compiled}"]
        report(name, same_run, [*pretrain, *settings], root / "pretrain-1", root / name, 2, strategy)
    compare("fp8", [*pretrain, "precision=fp8"], root, [(2, "ddp"), (2, "fsdp")], FP8_TOLERANCES)
    of_muon = "optim={type: muon, input_embedding_lr: 0.05, decay_embeddings: true}"
    muon = [*pretrain, of_muon, "model.embedding_init=bigrams"]  # what rank 0 counts is sent and cut
    compare("muon", muon, root, [(2, "ddp"), (2, "fsdp")], MUON_TOLERANCES)
    if importlib.util.find_spec("deepspeed"):
        for stage in (1, 2, 3):
            zero = [*pretrain, f"parallel.stage={stage}"]
            report(f"ZeRO {stage}", same_run, zero, root / "pretrain-1", root / f"zero-{stage}", 2, "deepspeed")
        report("to ZeRO and back", continued, pretrain, root / "pretrain-1", root / "zero", ZERO_AND_BACK)
    programs = {"accumulation": accumulate, "sent once": send_once}
    programs["start in parts"] = functools.partial(start_in_parts, root / "pretrain-1")
    for name, program in programs.items():
        report(name, runs_on_two, program, root / name.replace(" ", "-"))
    report("from earlier", from_earlier, root / "pretrain-1", root)
    report("watched", watched, pretrain, root)
    report("lost", lost, pretrain, root / "pretrain-1", root / "lost")
    report("none", refused, pretrain, root / "none", ["2 processes", "parallel.type=ddp"])
    uneven = [*pretrain, "parallel.type=ddp", "batch_tokens=192", "micro_batch_tokens=64"]
    for name, everyone in {"one rank's mistake": False, "every rank's mistake": True}.items():
        report(name, mistaken, recipes["sft"], root / name.replace(" ", "-"), everyone)
    report("rows", refused, uneven, root / "rows", ["3 rows", "multiple of 2"])


if __name__ == "__main__":
    pretrain, sft, folder = sys.argv[1:]
    # Eight rows a batch: two micro-batches on each of four ranks. In fine-tuning twelve rows, three on each of four ranks, in
    # micro-batches of two and one; whole documents, padded, share the learned tokens unevenly too.
    text = ["batch_tokens=512", "micro_batch_tokens=64", "total_tokens=6144", "exam={every_tokens: 3072, items: 7}"]
    text += ["model.value_embeddings=alternate", "model.copy_head_dim=16"]
    turns = ["batch_tokens=1536", "micro_batch_tokens=256", "total_tokens=18432"]
    pretrained = Path(folder) / "pretrain-1"
    # Graphs are what is tested; kernels of their own would take a minute of C++.
    if hasattr(torch._inductor.config, "fallback_by_default"):
        torch._inductor.config.fallback_by_default = True
    run_all({"pretrain": ["pretrain", pretrain, *text], "sft": ["sft", sft, f"init_from={pretrained}", *turns]}, Path(folder))
