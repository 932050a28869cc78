"""Where sparse attention pays: tokens a second in training and decoding, and the memory of a training step, against dense.

    python benchmarks/bench_sparse.py [--lengths 2048 8192 16384 32768] [--threads 2] [--out FILE]

Every measurement is a fresh process. The model is small (--layers, --hidden-size, heads of 64 and half as many key/value heads)
with an untrained index of the default size, which costs what a trained one does; ``gather`` is what a model takes in long rows,
``mask`` the reference. Training is one row in fp32, eager, with recompute=full: forward, backward and fused AdamW; dense and
mask are left out where they would not fit into 24 GB. Decoding draws for --decode-rows rows whose cache holds as many tokens as
the length says, random ones. ``memory`` is one attention layer of two heads, forward and backward at --memory-length: the most
bytes that were allocated at a time beyond those before, added up from torch's profiler. ``crossover`` names the first of the
lengths at which sparse is faster, or null.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from bench_recompute import peak_step_bytes
from measuring import measured, publish

HEAD_DIM = 64
TRAINED_LONGEST = {"mask": 8_192, "dense": 16_384}  # four heads of longer rows take more than 24 GB


def model_of(kind: str, length: int, args: argparse.Namespace, *, heads: int | None = None, layers: int | None = None) -> Any:
    from osler.model import sparse_attention
    from osler.model.config import DenseAttentionConfig, ModelConfig, SparseAttentionConfig
    from osler.model.transformer import Transformer
    from osler.ops.sparse_attention import mask_attention

    if kind == "mask":  # no model uses the reference by itself
        sparse_attention.gather_attention = mask_attention
    heads = heads or args.hidden_size // HEAD_DIM
    config = ModelConfig(
        num_layers=layers or args.layers,
        hidden_size=args.hidden_size,
        intermediate_size=3 * args.hidden_size,
        num_heads=heads,
        num_kv_heads=heads // 2,
        head_dim=HEAD_DIM,
        max_seq_len=length + args.decode_steps + 8,
        residual_init="scaled",
        attention=DenseAttentionConfig() if kind == "dense" else SparseAttentionConfig(top_k=args.top_k),
    )
    model = Transformer(config)
    model.init_weights(0)
    return model


def train(kind: str, length: int, args: argparse.Namespace) -> dict[str, float]:
    import torch

    from osler.model.transformer import SummedLoss
    from osler.optim.build import build_optimizer
    from osler.optim.config import AdamWConfig
    from osler.parallel.activation_checkpoint import set_recompute
    from osler.runtime.device import keep_freed_memory, peak_bytes

    keep_freed_memory()
    model = model_of(kind, length, args)
    set_recompute(model, "full")
    optimizer, loss = build_optimizer(model, AdamWConfig(lr=1e-4)), SummedLoss(model)

    def step(tokens: int) -> float:
        ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
        began = time.perf_counter()
        (loss(ids, ids, None).view(-1)[-1] / tokens).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began

    step(2 * args.top_k)  # what the first step makes once
    seconds = statistics.median(step(length) for _ in range(max(1, args.steps * 2_048 // length)))
    return {"tokens_per_second": length / seconds, "process_bytes": peak_bytes(torch.device("cpu"))}


def decode(kind: str, length: int, args: argparse.Namespace) -> dict[str, float]:
    import torch

    from osler.model.decoder import Decoder
    from osler.model.layers import Layout

    model, rows = model_of(kind, length, args), args.decode_rows
    with torch.inference_mode():
        decoder = Decoder(model, Layout(torch.float32, rows))
        cache = decoder.new_cache(rows, length + args.decode_steps)
        for stored in cache.stored:
            stored.normal_()
        cache.length_B.fill_(length)
        cache.bias_BKS[..., :length] = 0.0
        cache.filled = length
        token_B, running_B, seconds = torch.zeros(rows, dtype=torch.int64), torch.ones(rows, dtype=torch.bool), []
        for _ in range(args.decode_steps):
            began = time.perf_counter()
            decoder.step(token_B, cache, running_B)
            seconds.append(time.perf_counter() - began)
    return {"tokens_per_second": rows / statistics.median(seconds)}


def memory(kind: str, length: int, args: argparse.Namespace) -> dict[str, float]:
    import torch

    model = model_of(kind, length, args, heads=2, layers=1)
    layer, x_BTD = model.layers[0].self_attn, torch.randn(1, length, args.hidden_size, requires_grad=True)
    rope = (model.rope_cos[:length, None], model.rope_sin[:length, None])
    ids_BT = torch.zeros(1, length, dtype=torch.int64)

    def step() -> None:
        out_BTD, measured_BTM = layer(x_BTD, rope, ids_BT)
        (out_BTD.sum() if measured_BTM is None else out_BTD.sum() + measured_BTM[..., 0].sum()).backward()

    return {"bytes": peak_step_bytes(step, on_gpu=False)}


MEASUREMENTS = {"train": train, "decode": decode, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2_048, 8_192, 16_384, 32_768])
    parser.add_argument("--memory-length", type=int, default=16_384)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4, help="timed training steps at 2,048 tokens; fewer of longer rows")
    parser.add_argument("--decode-rows", type=int, default=4)
    parser.add_argument("--decode-steps", type=int, default=24)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        what, kind, length = args.case
        print(json.dumps(MEASUREMENTS[what](kind, int(length), args)))
        return

    def fits(what: str, kind: str, length: int) -> bool:
        return what == "decode" or length <= TRAINED_LONGEST.get(kind, length)

    def fresh(what: str, kind: str, length: int) -> dict[str, float]:
        return measured([__file__, *sys.argv[1:], "--case", what, kind, str(length)], threads=args.threads)

    shape = {"layers": args.layers, "hidden_size": args.hidden_size, "heads": args.hidden_size // HEAD_DIM}
    result: dict[str, Any] = {
        "benchmark": "sparse",
        "model": {**shape, "head_dim": HEAD_DIM, "top_k": args.top_k},
        "threads": args.threads,
        "decode_rows": args.decode_rows,
    }
    for what in ("train", "decode"):
        kinds = ("dense", "gather", "mask") if what == "train" else ("dense", "gather")
        result[what] = {
            length: {kind: fresh(what, kind, length) for kind in kinds if fits(what, kind, length)}
            for length in args.lengths
        }
        speeds = {length: {kind: each["tokens_per_second"] for kind, each in row.items()} for length, row in result[what].items()}
        faster = [length for length, speed in speeds.items() if "dense" in speed and speed["gather"] > speed["dense"]]
        result[f"{what}_crossover"] = min(faster, default=None)
    sizes = {kind: fresh("memory", kind, args.memory_length)["bytes"] for kind in ("dense", "gather", "mask")}
    result["memory"] = {"length": args.memory_length, **sizes, "gather_to_mask": sizes["gather"] / sizes["mask"]}
    publish(result, args.out)


if __name__ == "__main__":
    main()
