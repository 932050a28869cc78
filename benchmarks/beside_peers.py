"""Times Osler's training step and that of its peers, nanochat's GPT and Hugging Face's Qwen3, at the same shape, batch and dtype.

Every measurement is a fresh process (``python benchmarks/beside_peers.py JSON`` prints one JSON object), and the contestants take
turns, so that a machine that slows down slows all of them. Numbers are medians over rounds; ratios are taken round by round. All
of them run the same ``TrainStep`` over the same batches (``osler/bench.py``), so models and losses are compared.

A contestant is a model and a function of (ids, labels, document ids or None) to the summed cross-entropy in nats. "The same
shape" means the same layers, width, heads, vocabulary, rows and row length, and nearly the same matrix parameters: nanochat's
feed-forward has two matrices of four times the width and SwiGLU three, so three times ``intermediate_size`` should be about eight
times ``hidden_size``.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import operator
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import measured
from torch import Tensor, nn

from osler.bench import CONVENTION, build_learner, machine_of, matmul_rate, measure
from osler.config.schema import decode, encode
from osler.model.config import ModelConfig
from osler.parallel.engine import LossFunction, ParallelEngine
from osler.runs.process import Learner, Machine
from osler.runtime.device import keep_freed_memory
from osler.train.config import TrainConfig


def compare(config: TrainConfig, name: str, *, peers: Sequence[str], rounds: int, steps: int) -> dict[str, Any]:
    """Measure Osler and its peers in turn and put the numbers together."""
    contestants = {"osler": "", **{contestant_of(peer): peer for peer in peers}}
    if peers and config.model.embed_rank is not None:  # a peer with a whole embedding would be a larger model
        raise SystemExit("No peer has a factorized embedding: leave --peer out, or compare with model.embed_rank=null.")
    if peers and config.model.value_embeddings != "none":  # nor has every peer the same value embeddings, or any
        raise SystemExit("The peers have no value embeddings like ours: leave --peer out, or set model.value_embeddings=none.")
    machine = machine_of(config)
    spec = {
        "config": encode(config),
        "machine": [str(machine.device), str(machine.dtype).removeprefix("torch."), machine.compile],
        "steps": steps,
    }
    turns = [*contestants, "matmul"]
    found: dict[str, list[dict[str, Any]]] = {contestant: [] for contestant in turns}
    for number in range(rounds):
        for contestant in turns if number % 2 == 0 else reversed(turns):
            asked = {**spec, "contestant": contestant, "peer": contestants.get(contestant, "")}
            found[contestant].append(measured([__file__, json.dumps(asked)]))
            rate = found[contestant][-1].get("tokens_per_second")
            print(f"round {number + 1} of {rounds}: {contestant} {f'{rate:,.0f} tokens/s' if rate else 'timed'}", file=sys.stderr)
    matmul = [run["flops_per_second"] for run in found.pop("matmul")]
    return {
        "benchmark": "train",
        "recipe": name,
        "config": spec["config"],
        "machine": machine.describe(),
        "rounds": rounds,
        "steps": steps,
        "flops_convention": CONVENTION,
        "matmul_flops_per_second": matmul,
        **{contestant: summary(runs, matmul) for contestant, runs in found.items()},
        **{f"osler_over_{peer}": ratio(found["osler"], found[peer]) for peer in list(contestants)[1:]},
    }


def contestant_of(peer: str) -> str:
    """Return the name of a peer, given as ``hf`` or a checkout of nanochat; end the script when it is not there."""
    if peer == "hf":
        if importlib.util.find_spec("transformers") is None:
            raise SystemExit("--peer hf needs transformers: make test installs it, or pip install -e '.[test]' does.")
        return peer
    if not (Path(peer) / "nanochat" / "gpt.py").exists():
        raise SystemExit(f"--peer {peer} is neither hf nor a checkout of nanochat: nanochat/gpt.py is missing there.")
    return "nanochat"


def summary(runs: Sequence[dict[str, Any]], matmul: Sequence[float]) -> dict[str, Any]:
    """Return the medians over the rounds, and each round's tokens per second; ``matmul`` are the rounds' FLOP/s of a matmul."""
    parts = {name: statistics.median(run["part_seconds"][name] for run in runs) for name in runs[0]["part_seconds"]}
    whole = sum(parts.values())
    achieved = [run["flops_per_second"] for run in runs]
    return {
        "tokens_per_second": statistics.median(run["tokens_per_second"] for run in runs),
        "step_milliseconds": {name: round(1000 * seconds, 3) for name, seconds in parts.items()},
        "step_share": {name: round(seconds / whole, 4) for name, seconds in parts.items()},
        "first_step_seconds": statistics.median(run["first_step_seconds"] for run in runs),
        "mfu": None if runs[0]["mfu"] is None else statistics.median(run["mfu"] for run in runs),
        "of_matmul_rate": statistics.median(map(operator.truediv, achieved, matmul)),
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
        "parameters": runs[0]["parameters"],
        "each_round": [round(run["tokens_per_second"], 1) for run in runs],
    }


def ratio(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compare tokens per second with a peer's, round by round."""
    each = [mine["tokens_per_second"] / other["tokens_per_second"] for mine, other in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(each), "each": [round(value, 3) for value in each]}


def build_nanochat(config: TrainConfig, dtype: torch.dtype, checkout: str) -> tuple[nn.Module, LossFunction]:
    """Build nanochat's ``GPT`` from a checkout, with full attention in every layer; it casts fp32 weights itself."""
    shape = config.model
    if shape.tie_embeddings:
        raise SystemExit("nanochat's embedding and head are two matrices: compare with model.tie_embeddings=false.")
    if shape.head_dim * shape.num_heads != shape.hidden_size:
        raise SystemExit("nanochat's heads make up the width: compare where head_dim x num_heads is hidden_size.")
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


def build_hf(config: TrainConfig, dtype: torch.dtype, _: str = "") -> tuple[nn.Module, LossFunction]:
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


def qwen3_config(transformers: Any, shape: ModelConfig) -> Any:
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


BUILDERS: dict[str, Callable[..., tuple[nn.Module, LossFunction]]] = {"hf": build_hf, "nanochat": build_nanochat}


def measure_contestant(spec: dict[str, Any]) -> dict[str, Any]:
    """Time what ``spec`` asks for, in the process of its own."""
    keep_freed_memory()
    device, dtype, compiles = spec["machine"]
    machine = Machine(torch.device(device), getattr(torch, dtype), compiles)
    if spec["contestant"] == "matmul":
        return {"flops_per_second": matmul_rate(machine)}
    config = decode(TrainConfig, spec["config"])
    torch.manual_seed(0)
    if spec["contestant"] == "osler":
        return measure(config, build_learner(config, machine), spec["steps"])
    model, loss = BUILDERS[spec["contestant"]](config, machine.dtype, spec["peer"])
    model.to(machine.device)
    engine = ParallelEngine(torch.compile(loss, dynamic=False) if machine.compile else loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)  # whatever dtypes a peer keeps its weights in
    return measure(config, Learner(model, optimizer, engine, config.clip_norm), spec["steps"])


if __name__ == "__main__":
    print(json.dumps(measure_contestant(json.loads(sys.argv[1]))))
