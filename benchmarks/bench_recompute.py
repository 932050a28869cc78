"""What recomputing activations costs and saves: peak memory and time of a training step, off / selective / full.

    python benchmarks/bench_recompute.py [--recipe synth-baguette] [--layers N] [--rows 4] [--seq-len 256] [--rounds 3]

Every measurement is a fresh process, and the modes take turns, so that a machine that slows down slows all of them. A step is
forward, backward and fused AdamW on random tokens. ``step_bytes`` is the most that one step has allocated at a time beyond
weights and moments: gradients, activations and what operators need; on a CPU it is added up from torch's profiler in a step that
is not timed. ``process_bytes`` is the most that the process had resident, libraries and compiler included. Numbers are medians
over rounds of the median step; ratios to ``off`` are taken round by round. Without --compile the step is eager, and on a CPU it
should then be in fp32, because eager bf16 operators are slow there. Few tokens show little: the gradients of the weights, which
grow while the activations go, have to be outweighed first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from measuring import measured, publish

MODES = ("off", "selective", "full")
WARMUP_STEPS = 1


def peak_step_bytes(step: Callable[[], None], on_gpu: bool) -> int:
    """The most bytes that ``step`` has allocated at a time beyond those that lay there before."""
    import torch

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def measure(mode: str, args: argparse.Namespace) -> dict[str, float]:
    """Time one mode in this process."""
    import torch

    from osler.config.recipe import load_recipe
    from osler.config.schema import decode
    from osler.model.config import ModelConfig
    from osler.model.transformer import SummedLoss, Transformer
    from osler.optim.build import build_optimizer
    from osler.optim.config import AdamWConfig
    from osler.parallel.activation_checkpoint import set_recompute
    from osler.runtime.device import keep_freed_memory, peak_bytes

    keep_freed_memory()
    torch.manual_seed(0)
    device = torch.device(args.device)
    config = decode(ModelConfig, load_recipe(args.recipe)["model"])
    config = replace(config, num_layers=args.layers or config.num_layers)
    model = Transformer(config, compute_dtype=getattr(torch, args.dtype))
    model.init_weights(0)
    model.to(device)
    set_recompute(model, mode)
    optimizer = build_optimizer(model, AdamWConfig(lr=1e-4))
    loss = SummedLoss(model)
    if args.compile:
        loss = torch.compile(loss, fullgraph=True, dynamic=False)
    ids, labels = (torch.randint(0, config.vocab_size, (args.rows, args.seq_len), device=device) for _ in range(2))

    def step() -> None:
        (loss(ids, labels, None) / labels.numel()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    started = time.perf_counter()
    step()
    first_seconds = time.perf_counter() - started
    for _ in range(WARMUP_STEPS):
        step()
    seconds = []
    for _ in range(args.steps):
        before = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - before)
    return {
        "step_bytes": peak_step_bytes(step, device.type == "cuda"),
        "process_bytes": peak_bytes(torch.device("cpu")),
        "step_seconds": statistics.median(seconds),
        "first_step_seconds": first_seconds,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def fresh(mode: str, argv: list[str], threads: int) -> dict[str, float]:
    """Measure one mode in a process of its own."""
    return measured([__file__, *argv, "--mode", mode], threads=threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="synth-baguette")
    parser.add_argument("--layers", type=int, help="instead of the recipe's, for a short trial")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.mode:
        print(json.dumps(measure(args.mode, args)))
        return

    import torch

    rounds = [{mode: fresh(mode, sys.argv[1:], args.threads) for mode in MODES} for _ in range(args.rounds)]
    names = ("step_bytes", "process_bytes", "step_seconds")
    result: dict[str, Any] = {
        "benchmark": "recompute",
        "shape": {"recipe": args.recipe, "layers": args.layers, "rows": args.rows, "seq_len": args.seq_len},
        "dtype": args.dtype,
        "compiled": args.compile,
        "device": args.device if args.device == "cpu" else torch.cuda.get_device_name(args.device),
        "threads": args.threads,
        "steps": args.steps,
        "rounds": rounds,
        "median": {mode: {name: statistics.median(each[mode][name] for each in rounds) for name in names} for mode in MODES},
        "median_ratio_to_off": {
            mode: {name: statistics.median(each[mode][name] / each["off"][name] for each in rounds) for name in names}
            for mode in MODES[1:]
        },
    }
    publish(result, args.out)


if __name__ == "__main__":
    main()
