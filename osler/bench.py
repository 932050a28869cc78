"""``osler bench``: how fast a recipe trains on this machine.

The training step itself (``train/trainer.py``) is timed, over batches of random tokens from the real loader: batches of zeros
would be faster, by caches and branch predictors. FLOPs are counted by the PaLM convention. MFU is relative to the GPU's data
sheet (``config/devices.yaml``) and missing on a CPU. The speed is also given relative to that of a large matmul.
``benchmarks/beside_peers.py`` times other libraries' models in the same way.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from osler.config.devices import peak_flops_of
from osler.config.recipe import load_recipe, override
from osler.config.schema import decode, encode
from osler.data.curriculum import lay_out
from osler.data.loader import Batch, Loader
from osler.data.mixture import Mixture
from osler.data.order import Order
from osler.data.packing import MixedPacking, StreamPacking
from osler.data.shard_set import ShardSet
from osler.data.shards import ShardWriter
from osler.model.config import model_in
from osler.model.transformer import Transformer
from osler.optim.build import build_optimizer
from osler.parallel.config import NoParallelConfig
from osler.parallel.parallelize import parallelize
from osler.runs.micro_batch import MicroBatchLimit
from osler.runs.process import Learner, Machine, choose_machine
from osler.runtime.device import Stopwatch, gpu_name, keep_freed_memory, matmul_flops, peak_bytes, synchronize
from osler.runtime.errors import UserError
from osler.runtime.world import World, require_one_process
from osler.train.config import TrainConfig
from osler.train.setup import pass_tokens
from osler.train.trainer import TrainStep

CONVENTION = "PaLM: 6 x (matrices + head) + 12 x layers x heads x head_dim x seq_len FLOPs per token, non-causal"
STEPS_ALWAYS_COMPILED = 1_000_000  # the steps of a run that compile=auto is sure to compile
WARMUP_STEPS = 3
DOCUMENT_TOKENS = 700  # the length of a stand-in document; rows cut such documents anywhere
MATMUL_SIZES = (1024, 2048, 4096)
MATMUL_SECONDS = 0.5  # per size


def run(recipe: str | None, overrides: Sequence[str], *, steps: int) -> str:
    """Run the command ``bench``; return one JSON object."""
    require_one_process("osler bench")
    if steps < 1:
        raise UserError(f"--steps {steps} must be at least 1.")
    given = load_recipe(recipe, overrides) if recipe else override({}, overrides)
    kind = given.get("kind", "pretrain")
    if kind not in ("pretrain", "sft"):
        raise UserError(f"`{recipe}` is a recipe of kind {kind}: give one of `osler pretrain` or `osler sft`, or a model family.")
    config = decode(TrainConfig, {**given, "kind": kind}, source=recipe or "")
    if config.teacher is not None:
        raise UserError("osler bench times a step without a teacher: give teacher=null.")
    model_in(encode(config), recipe or "defaults")  # checks the recipe's own model, which is timed even with init_from
    machine = machine_of(config)
    keep_freed_memory()
    measured = measure(config, build_learner(config, machine), steps)
    matmul = matmul_rate(machine)
    result = {
        "benchmark": "train",
        "recipe": recipe or "defaults",
        "config": encode(config),
        "machine": machine.describe(),
        "steps": steps,
        "flops_convention": CONVENTION,
        "matmul_flops_per_second": matmul,
        "of_matmul_rate": measured["flops_per_second"] / matmul,
        **measured,
    }
    return json.dumps(result, indent=2)


def machine_of(config: TrainConfig) -> Machine:
    """Return the device and dtype that a long run of this config would use."""
    return choose_machine(config.device, config.precision, config.compile, steps=STEPS_ALWAYS_COMPILED)


def matmul_rate(machine: Machine) -> float:
    """Return the FLOP/s of a large matrix product."""
    return matmul_flops(machine.device, machine.dtype, MATMUL_SIZES, MATMUL_SECONDS)


def build_learner(config: TrainConfig, machine: Machine) -> Learner:
    """Return a new model with its optimizer and engine, as training in one process builds them."""
    model = Transformer(config.model, compute_dtype=machine.dtype)
    model.init_weights(config.seed)
    model.to(machine.device)
    engine = parallelize(
        model,
        NoParallelConfig(),
        World(device=str(machine.device)),
        precision=config.precision,
        pass_tokens=pass_tokens(config, processes=1),
        recompute=config.recompute,
        compile=machine.compile,
    )
    return Learner(model, build_optimizer(model, config.optim, seed=config.seed), engine, config.clip_norm)


def training_step(config: TrainConfig, learner: Learner, mark: Callable[[str], None] = lambda part: None) -> TrainStep:
    """Return the training step of a config; ``mark`` is called when a part of a step ends."""
    limit = MicroBatchLimit(learner, config.micro_batch_tokens)
    return TrainStep(learner, micro_batch_limit=limit, document_mask=config.document_mask, mark=mark)


def measure(config: TrainConfig, learner: Learner, steps: int) -> dict[str, Any]:
    """Return tokens and FLOPs per second of training, the seconds of a step and of its parts, and the peak memory in bytes."""
    device = learner.device
    stopwatch = Stopwatch(device)
    with tempfile.TemporaryDirectory() as folder:
        loader = stand_in(config, Path(folder), pin_memory=device.type == "cuda")
        step = training_step(config, learner, stopwatch.mark)
        times = time_steps(step, loader.batches(), stopwatch, device, steps)
    tokens_per_second = config.batch_tokens / times["step_seconds"]
    flops = tokens_per_second * config.model.flops_per_token(config.seq_len)
    peak = peak_flops_of(gpu_name(device))
    return {
        "tokens_per_second": tokens_per_second,
        "flops_per_second": flops,
        "mfu": None if peak is None else flops / peak,
        "peak_memory_bytes": peak_bytes(device),
        "parameters": sum(parameter.numel() for parameter in learner.model.parameters()),
        **times,
    }


def stand_in(config: TrainConfig, folder: Path, *, pin_memory: bool = False) -> Loader:
    """Write shards of random tokens, enough for a few batches, and return the loader that training would use for them.

    For a curriculum the loader gives the longest rows.
    """
    rng = np.random.default_rng(0)
    vocab_size = config.model.vocab_size
    writer = ShardWriter(folder / "shards", vocab_size=vocab_size)
    for _ in range(4 * config.batch_tokens // DOCUMENT_TOKENS + 4):
        writer.add(rng.integers(0, vocab_size, DOCUMENT_TOKENS).tolist(), None, DOCUMENT_TOKENS)
    writer.close()
    shards = ShardSet(folder / "shards", vocab_size=vocab_size, tokenizer_fingerprint="", eos_id=0)
    packing = MixedPacking({"random": StreamPacking(Order(shards, config.seed), config.seq_len, prompt_loss=True)}, Mixture([1]))
    timeline = lay_out([], seq_len=config.seq_len, batch_tokens=config.batch_tokens)
    return Loader(timeline, [packing], workers=config.loader_workers, pin_memory=pin_memory)


def time_steps(
    step: TrainStep, batches: Iterator[Batch], stopwatch: Stopwatch, device: torch.device, steps: int
) -> dict[str, Any]:
    """Return the seconds of a step, of the first step (which compiles), and of the parts of a step.

    On a CPU the time of a step is the median. A GPU only queues steps, so there it is the mean, with one wait at the end.
    """
    began = time.perf_counter()
    step(next(batches))
    synchronize(device)
    first = time.perf_counter() - began
    for _ in range(WARMUP_STEPS):
        step(next(batches))
    synchronize(device)
    stopwatch.read()
    times = [time.perf_counter()]
    for _ in range(steps):
        stopwatch.start()
        batch = next(batches)
        stopwatch.mark("data")
        step(batch)
        times.append(time.perf_counter())
    synchronize(device)
    mean = (time.perf_counter() - times[0]) / steps
    return {
        "step_seconds": float(np.median(np.diff(times))) if device.type == "cpu" else mean,
        "first_step_seconds": first,
        "part_seconds": {name: total / steps for name, total in stopwatch.read().items()},
    }
