"""Time of an optimizer step on a recipe's matrices: fused AdamW, Osler's Muon, torch's Muon.

    python benchmarks/bench_optimizer.py [--recipe text-10min] [--dtype bfloat16] [--device cpu] [--rounds 3] [--out FILE]

Every measurement is a fresh process; the contestants take turns, so that a machine that slows down slows all of them. Only the
matrices between the embeddings and the head take part, with random gradients that stay the same. torch's Muon always computes in
bfloat16; Osler's in ``--dtype``, which in a run is the model's compute dtype. Numbers are medians over rounds of the median step;
ratios are taken round by round. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from measuring import measured, publish

CONTESTANTS = ("adamw", "muon", "torch_muon")
WARMUP_STEPS, TIMED_STEPS = 3, 12


def build(contestant: str, recipe: str, dtype_name: str, device: str) -> Any:
    """The optimizer with its matrices, which have random gradients."""
    import torch

    from osler.config.recipe import load_recipe
    from osler.config.schema import decode
    from osler.model.transformer import Transformer
    from osler.optim.build import group_of
    from osler.optim.muon import Muon
    from osler.train.config import TrainConfig

    model = Transformer(decode(TrainConfig, load_recipe(recipe)).model).to(device)
    model.init_weights(0)
    matrices = [parameter for name, parameter in model.named_parameters() if group_of(name) == "matrices"]
    torch.manual_seed(0)
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)
    options = {"lr": 1e-3, "weight_decay": 0.1}
    if contestant == "adamw":
        return torch.optim.AdamW(matrices, fused=True, **options)
    if contestant == "torch_muon":
        return torch.optim.Muon(matrices, **options)
    group = {"params": matrices, "name": "matrices", "momentum": 0.95, "newton_schulz_steps": 5, **options}
    return Muon([group], dtype=getattr(torch, dtype_name))


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Time one contestant in this process."""
    import torch

    from osler.runtime.device import keep_freed_memory

    keep_freed_memory()
    optimizer = build(args.contestant, args.recipe, args.dtype, args.device)
    matrices = optimizer.param_groups[0]["params"]
    optimizer.found_inf = torch.zeros((), device=args.device)  # as in training
    seconds = []
    for _ in range(WARMUP_STEPS + TIMED_STEPS):
        if args.device == "cuda":
            torch.cuda.synchronize()
        before = time.perf_counter()
        optimizer.step()
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - before)
    return {
        "step_milliseconds": statistics.median(seconds[WARMUP_STEPS:]) * 1000,
        "matrices": len(matrices),
        "parameters": sum(matrix.numel() for matrix in matrices),
    }


def fresh(contestant: str, args: argparse.Namespace) -> dict[str, float]:
    """Measure one contestant in a process of its own."""
    arguments = [__file__, "--contestant", contestant, "--recipe", args.recipe, "--dtype", args.dtype]
    return measured([*arguments, "--device", args.device], threads=args.threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="text-10min", help="whose model's matrices")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="what Osler's Muon computes in")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contestant:
        print(json.dumps(measure(args)))
        return

    import torch

    rounds = [{name: fresh(name, args) for name in CONTESTANTS} for _ in range(args.rounds)]
    milliseconds = {name: [each[name]["step_milliseconds"] for each in rounds] for name in CONTESTANTS}
    ratios = [theirs / ours for theirs, ours in zip(milliseconds["torch_muon"], milliseconds["muon"], strict=True)]
    on_gpu = {"gpu": torch.cuda.get_device_name()} if args.device == "cuda" else {}
    result: dict[str, Any] = {
        "benchmark": "optimizer",
        "recipe": args.recipe,
        "dtype": args.dtype,
        "device": args.device,
        **on_gpu,
        "threads": args.threads,
        "rounds": rounds,
        "median_step_milliseconds": {name: statistics.median(each) for name, each in milliseconds.items()},
        "torch_muon_over_muon": {"median": statistics.median(ratios), "each": ratios},
    }
    publish(result, args.out)


if __name__ == "__main__":
    main()
