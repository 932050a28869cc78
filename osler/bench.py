"""``osler bench``: how fast a recipe trains here, alone or beside nanochat and Hugging Face at the same shape, batch and dtype.

Every measurement is a fresh process (``python -m osler.bench JSON`` prints one JSON object), and the contestants take turns, so
that a machine that slows down slows all of them. Numbers are medians over rounds; ratios are taken round by round. FLOPs are
counted by the PaLM convention. MFU is relative to the GPU's data sheet (``runtime/device.py``); on a CPU the rate is relative to
a matmul timed in the same rounds. The training step itself (``train/trainer.py``) is timed, over batches from the real loader of
random tokens, because zeros would flatter caches and branch predictors.

A contestant is a model and a function of (ids, labels, document ids or None) to the summed cross-entropy in nats. "The same
shape" means the same layers, width, heads, vocabulary, rows and row length, and nearly the same matrix parameters: nanochat's
feed-forward has two matrices of four times the width and SwiGLU three, so three times ``intermediate_size`` should be about eight
times ``hidden_size``.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import operator
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from osler.config.recipe import load_recipe, parse_overrides
from osler.config.schema import decode, encode
from osler.data.loader import Batch, Loader
from osler.data.order import Order
from osler.data.packing import StreamPacking
from osler.data.shards import ShardSet, ShardWriter
from osler.model.config import ModelConfig
from osler.model.transformer import SummedLoss, Transformer
from osler.optim.build import build_optimizer
from osler.parallel.config import NoParallelConfig
from osler.parallel.engine import LossFunction, ParallelEngine
from osler.parallel.parallelize import parallelize
from osler.runs.process import Learner, choose_machine
from osler.runtime.device import Stopwatch, describe_machine, keep_freed_memory, matmul_flops, peak_bytes, peak_flops, synchronize
from osler.runtime.errors import UserError
from osler.runtime.files import write_json
from osler.runtime.world import World, require_one_process
from osler.train.config import TrainConfig
from osler.train.setup import pass_tokens
from osler.train.trainer import TrainStep

logger = logging.getLogger(__name__)

CONVENTION = "PaLM: 6 x (matrices + head) + 12 x layers x heads x head_dim x seq_len FLOPs per token, non-causal"
STEPS_ALWAYS_COMPILED = 1_000_000
LAST_WORDS = 3000  # characters of a failed process's stderr that are worth showing
DOCUMENT_TOKENS = 700  # the length of a stand-in document; rows are cut across them
MATMUL_SIZES = (1024, 2048, 4096)
MATMUL_SECONDS = 0.5  # per size
Contestant = tuple[nn.Module, LossFunction]


def run(recipe: str | None, overrides: Sequence[str], *, peers: Sequence[str], rounds: int, steps: int, out: str | None) -> int:
    """Run the command ``bench``: print one JSON object, and write it to ``out`` too."""
    require_one_process("osler bench")
    if rounds < 1 or steps < 1:
        raise UserError(f"--rounds {rounds} and --steps {steps} must be at least 1.")
    given = load_recipe(recipe, overrides) if recipe else parse_overrides(overrides)
    kind = given.get("kind", "pretrain")
    if kind not in ("pretrain", "sft"):
        raise UserError(f"`{recipe}` is a recipe of kind {kind}: give one of `osler pretrain` or `osler sft`, or a model family.")
    config = decode(TrainConfig, {**given, "kind": kind}, source=recipe or "")
    if config.parallel.type != "none":
        logger.info(f"osler bench times one process, on which parallel.type={config.parallel.type} changes nothing.")
    result = compare(config, recipe or "defaults", peers=peers, rounds=rounds, steps=steps)
    print(json.dumps(result, indent=2))
    if out is not None:
        write_json(Path(out), result)
    return 0


def compare(config: TrainConfig, name: str, *, peers: Sequence[str], rounds: int, steps: int) -> dict[str, Any]:
    """Measure Osler and its peers in turn and put the numbers together."""
    contestants = {"osler": "", **{contestant_of(peer): peer for peer in peers}}
    if peers and config.model.embed_rank is not None:  # a peer with a whole embedding would be a larger model
        raise UserError(
            f"No peer has a factorized embedding (model.embed_rank={config.model.embed_rank}): leave --peer out, or compare "
            "with model.embed_rank=null."
        )
    machine = choose_machine(config.device, config.precision, config.compile, steps=STEPS_ALWAYS_COMPILED)
    spec = {
        "config": encode(config),
        "device": str(machine.device),
        "dtype": str(machine.dtype).removeprefix("torch."),
        "compile": machine.compile,
        "warmup": 3,
        "steps": steps,
    }
    turns = [*contestants, "matmul"]
    measured: dict[str, list[dict[str, Any]]] = {contestant: [] for contestant in turns}
    for number in range(rounds):
        for contestant in turns if number % 2 == 0 else reversed(turns):
            done = in_fresh_process({**spec, "contestant": contestant, "peer": contestants.get(contestant, "")})
            measured[contestant].append(done)
            rate = f"{done['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in done else "timed"
            logger.info(f"round {number + 1} of {rounds}: {contestant} {rate}")
    matmul = [done["flops_per_second"] for done in measured.pop("matmul")]
    device = str(machine.device) if machine.device.type == "cpu" else torch.cuda.get_device_name(machine.device)
    return {
        "benchmark": "train",
        "recipe": name,
        "config": spec["config"],
        "dtype": spec["dtype"],
        "compiled": machine.compile,
        "machine": {**describe_machine(), "device": device},
        "rounds": rounds,
        "steps": steps,
        "flops_convention": CONVENTION,
        "matmul_flops_per_second": matmul,
        **{contestant: summary(runs, matmul) for contestant, runs in measured.items()},
        **{f"osler_over_{peer}": ratio(measured["osler"], measured[peer]) for peer in list(contestants)[1:]},
    }


def contestant_of(peer: str) -> str:
    """Return the name of a peer, given as ``hf`` or a checkout of nanochat. Raises UserError when it is not there."""
    if peer == "hf":
        if importlib.util.find_spec("transformers") is None:
            raise UserError("--peer hf needs transformers: make test installs it, or pip install -e '.[test]' does.")
        return peer
    if not (Path(peer) / "nanochat" / "gpt.py").exists():
        raise UserError(f"--peer {peer} is neither hf nor a checkout of nanochat: nanochat/gpt.py is missing there.")
    return "nanochat"


def in_fresh_process(spec: dict[str, Any]) -> dict[str, Any]:
    """Run one measurement in a process of its own."""
    command = [sys.executable, "-m", "osler.bench", json.dumps(spec)]
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"Measuring {spec['contestant']} failed:\n{done.stderr[-LAST_WORDS:].strip()}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def summary(runs: Sequence[dict[str, Any]], matmul: Sequence[float]) -> dict[str, Any]:
    """Return the medians over the rounds, and each round's tokens per second; ``matmul`` are the rounds' FLOP/s of a matmul."""
    parts = {name: statistics.median(run["part_seconds"][name] for run in runs) for name in runs[0]["part_seconds"]}
    whole = sum(parts.values())
    peak = runs[0]["peak_flops_per_second"]
    achieved = [run["flops_per_second"] for run in runs]
    return {
        "tokens_per_second": statistics.median(run["tokens_per_second"] for run in runs),
        "step_milliseconds": {name: round(1000 * seconds, 3) for name, seconds in parts.items()},
        "step_share": {name: round(seconds / whole, 4) for name, seconds in parts.items()},
        "first_step_seconds": statistics.median(run["first_step_seconds"] for run in runs),
        "mfu": None if peak is None else statistics.median(achieved) / peak,
        "of_matmul_rate": statistics.median(map(operator.truediv, achieved, matmul)),
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
        "parameters": runs[0]["parameters"],
        "each_round": [round(run["tokens_per_second"], 1) for run in runs],
    }


def ratio(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compare tokens per second with a peer's, round by round."""
    each = [mine["tokens_per_second"] / other["tokens_per_second"] for mine, other in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(each), "each": [round(value, 3) for value in each]}


def build_osler(config: TrainConfig, dtype: torch.dtype, _: str = "") -> Contestant:
    """Build Osler's transformer and its chunked loss, as training runs them."""
    model = Transformer(config.model, compute_dtype=dtype)
    model.init_weights(config.seed)
    return model, SummedLoss(model)


def build_nanochat(config: TrainConfig, dtype: torch.dtype, checkout: str) -> Contestant:
    """Build nanochat's ``GPT`` from a checkout, with full attention in every layer; it casts fp32 weights itself."""
    shape = config.model
    if shape.tie_embeddings:
        raise UserError("nanochat's embedding and head are two matrices: compare with model.tie_embeddings=false.")
    if shape.head_dim * shape.num_heads != shape.hidden_size:
        raise UserError(
            f"nanochat's heads make up the width: head_dim {shape.head_dim} x num_heads {shape.num_heads} is not "
            f"hidden_size {shape.hidden_size}."
        )
    os.environ["NANOCHAT_DTYPE"] = str(dtype).removeprefix("torch.")
    sys.path.insert(0, checkout)
    gpt = importlib.import_module("nanochat.gpt")
    model = gpt.GPT(
        gpt.GPTConfig(
            sequence_len=config.seq_len,
            vocab_size=shape.vocab_size,
            n_layer=shape.num_layers,
            n_head=shape.num_heads,
            n_kv_head=shape.num_kv_heads,
            n_embd=shape.hidden_size,
            window_pattern="L",
        )
    )
    model.init_weights()
    return model, lambda ids, labels, _: model(ids, labels) * labels.numel()


def build_hf(config: TrainConfig, dtype: torch.dtype, _: str = "") -> Contestant:
    """Build Hugging Face's Qwen3 with its own loss: fp32 weights under autocast, as its Trainer runs bf16."""
    transformers = importlib.import_module("transformers")
    shape = config.model
    model = transformers.Qwen3ForCausalLM(qwen3_config(transformers, shape))
    loss_function: Callable[..., Tensor] = model.loss_function

    def loss(ids: Tensor, labels: Tensor, documents: Tensor | None) -> Tensor:
        with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
            logits = model(input_ids=ids, use_cache=False).logits
        # Its loss shifts labels by itself unless they come shifted.
        return loss_function(logits, None, shape.vocab_size, shift_labels=labels) * labels.numel()

    return model, loss


def qwen3_config(transformers, shape: ModelConfig):  # type: ignore[no-untyped-def]  # an optional library's classes
    """Return Qwen3's configuration of the same shape."""
    return transformers.Qwen3Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_seq_len,
        rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=shape.tie_embeddings,
    )


BUILDERS: dict[str, Callable[..., Contestant]] = {"osler": build_osler, "hf": build_hf, "nanochat": build_nanochat}


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Time what ``spec`` asks for, in the process of its own."""
    keep_freed_memory()
    device = torch.device(spec["device"])
    if spec["contestant"] == "matmul":
        return {"flops_per_second": matmul_flops(device, getattr(torch, spec["dtype"]), MATMUL_SIZES, MATMUL_SECONDS)}
    config = decode(TrainConfig, spec["config"])
    stopwatch = Stopwatch(device)
    step, model = training_step(spec, config, device, mark=stopwatch.mark)
    with tempfile.TemporaryDirectory() as folder:
        rows = config.batch_tokens // config.seq_len  # of a curriculum the longest rows are timed
        packing = stand_in(config, Path(folder))
        loader = Loader(packing, rows, workers=config.loader_workers, pin_memory=device.type == "cuda")
        result = time_steps(step, loader.batches(), stopwatch, device, warmup=spec["warmup"], steps=spec["steps"])
    tokens_per_second = config.batch_tokens / result.pop("step_seconds")
    return {
        "tokens_per_second": tokens_per_second,
        "flops_per_second": tokens_per_second * config.model.flops_per_token(config.seq_len),
        "peak_flops_per_second": peak_flops(device),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "peak_memory_bytes": peak_bytes(device),
        **result,
    }


def training_step(
    spec: dict[str, Any], config: TrainConfig, device: torch.device, *, mark: Callable[[str], None] = lambda part: None
) -> tuple[TrainStep, nn.Module]:
    """Return the training step of a contestant and its model; ``mark`` is called when a part of a step ends."""
    torch.manual_seed(0)
    model, loss = BUILDERS[spec["contestant"]](config, getattr(torch, spec["dtype"]), spec.get("peer", ""))
    model.to(device)
    if isinstance(model, Transformer):
        engine = parallelize(
            model,
            NoParallelConfig(),
            World(device=str(device)),
            precision=config.precision,
            pass_tokens=pass_tokens(config, processes=1),
            recompute=config.recompute,
            compile=spec["compile"],
        )
        optimizer = build_optimizer(model, config.optim, seed=config.seed)
    else:  # whatever dtypes a peer keeps its weights in
        engine = ParallelEngine(torch.compile(loss, dynamic=False) if spec["compile"] else loss)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    learner = Learner(cast(Transformer, model), optimizer, engine, config.clip_norm)
    step = TrainStep(learner, micro_batch_tokens=config.micro_batch_tokens, document_mask=config.document_mask, mark=mark)
    return step, model


def stand_in(config: TrainConfig, folder: Path) -> StreamPacking:
    """Write shards of random tokens, enough for a few batches, and return the packing that training uses over them."""
    rng = np.random.default_rng(0)
    shape: ModelConfig = config.model
    writer = ShardWriter(folder / "shards", vocab_size=shape.vocab_size)
    for _ in range(4 * config.batch_tokens // DOCUMENT_TOKENS + 4):
        writer.add(rng.integers(0, shape.vocab_size, DOCUMENT_TOKENS).tolist(), None, DOCUMENT_TOKENS)
    writer.close()
    shards = ShardSet(folder / "shards", vocab_size=shape.vocab_size, tokenizer_fingerprint="", eos_id=0)
    return StreamPacking(Order(shards, config.seed), config.seq_len, prompt_loss=True)


def time_steps(
    step: TrainStep, batches: Iterator[Batch], stopwatch: Stopwatch, device: torch.device, *, warmup: int, steps: int
) -> dict[str, Any]:
    """Return the seconds of a step, of the first step (which compiles), and of the parts of a step.

    On a CPU a step's seconds are the median; on a GPU, where steps are only queued, the mean with one wait at the end.
    """
    began = time.perf_counter()
    step(next(batches))
    synchronize(device)
    first = time.perf_counter() - began
    for _ in range(warmup):
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


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
