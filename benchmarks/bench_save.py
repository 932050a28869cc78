"""How much saving a checkpoint holds training up: in the background, in the foreground, and not at all.

    python benchmarks/bench_save.py [--recipe synth-tiny] [--batch-tokens 4096] [--rounds 3] [--out FILE]

Every measurement is a fresh process, and the modes take turns, so that a machine that slows down slows all of them. A process
makes optimizer steps of a recipe's model on random tokens and saves weights and moments after every ``--save-every`` of them,
with the ``Saver`` that a run has. The first save, which also makes the buffers, and the steps up to the second are a warm-up.

A step counts as quiet when nothing was saved in it or beside it. Against the median quiet step of its own process:
``save_step_ratio`` is the median step in which a save began (its wait is ``wait_seconds``), ``beside_ratio`` the median step
beside which the writer worked, ``stall_seconds`` what one save cost in all its steps together. ``throughput_ratio`` is tokens/s
against the mode without saves in the same round, and ``throughput_at_interval`` what the stall comes to when saves are
``--interval-seconds`` apart. Numbers are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from measuring import ROOT, measured, publish

MODES = ("none", "background", "foreground")
RESULT = ROOT / "benchmarks" / "results" / "bench_save.json"


def measure(mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """Time one mode in this process."""
    import torch

    from osler.checkpoint.saver import Saver
    from osler.config.recipe import load_recipe
    from osler.config.schema import decode
    from osler.data.loader import Batch
    from osler.model.config import ModelConfig
    from osler.model.transformer import Transformer
    from osler.optim.build import build_optimizer
    from osler.optim.config import AdamWConfig
    from osler.parallel.config import NoParallelConfig
    from osler.parallel.parallelize import parallelize
    from osler.runs.micro_batch import MicroBatchLimit
    from osler.runs.process import Learner, choose_machine
    from osler.runtime.device import keep_freed_memory
    from osler.runtime.world import World
    from osler.train.trainer import TrainStep

    keep_freed_memory()
    machine = choose_machine(args.device, args.precision, args.compile, steps=10**6)
    config = decode(ModelConfig, load_recipe(args.recipe)["model"])
    config = replace(config, num_layers=args.layers or config.num_layers)
    model = Transformer(config, compute_dtype=machine.dtype)
    model.init_weights(0)
    model.to(machine.device)
    optimizer = build_optimizer(model, AdamWConfig(lr=1e-4))
    engine = parallelize(model, NoParallelConfig(), World(), compile=machine.compile)
    learner = Learner(model, optimizer, engine, 1.0)
    step = TrainStep(learner, micro_batch_limit=MicroBatchLimit(learner, args.micro_batch_tokens))
    ids = torch.randint(0, config.vocab_size, (args.batch_tokens // args.seq_len, args.seq_len))
    batch = Batch(ids=ids, labels=ids.roll(-1, 1), document_ids=torch.zeros_like(ids))
    synchronize = torch.cuda.synchronize if machine.device.type == "cuda" else lambda: None

    steps: list[tuple[str, float]] = []
    waits = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        saver = Saver(Path(folder), keep_last=2, in_background=mode == "background")
        for number in range(args.save_every * (args.saves + 1)):
            synchronize()
            before = time.perf_counter()
            step(batch)
            kind = "beside" if saver.is_saving else "quiet"
            if mode != "none" and number % args.save_every == 0:
                synchronize()  # that the step is computed is no part of the wait
                kind, asked = "save", time.perf_counter()
                tensors, state = engine.parts(model, optimizer)
                saver.save(number, tensors=tensors, state={"optimizer": state}, files={})
                waits.append(time.perf_counter() - asked)
            synchronize()
            steps.append((kind, time.perf_counter() - before))
        saver.wait()
        files = max(Path(folder).glob("step-*"), default=Path(folder)).glob("*.safetensors")
        saved_bytes = sum(file.stat().st_size for file in files)
    steps = steps[args.save_every :]

    def median(kind: str) -> float | None:
        found = [seconds for name, seconds in steps if name == kind]
        return statistics.median(found) if found else None

    quiet = median("quiet")
    if quiet is None:
        raise SystemExit("a save was in flight in every step: make --save-every larger")
    return {
        "parameters": config.num_parameters,
        "dtype": str(machine.dtype).removeprefix("torch."),
        "compiled": machine.compile,
        "saved_bytes": saved_bytes,
        "quiet_step_seconds": quiet,
        "mean_step_seconds": statistics.fmean(seconds for _, seconds in steps),
        "tokens_per_second": args.batch_tokens * len(steps) / sum(seconds for _, seconds in steps),
        "save_step_ratio": (median("save") or quiet) / quiet,
        "beside_ratio": (median("beside") or quiet) / quiet,
        "wait_seconds": statistics.median(waits[1:]) if waits else 0.0,
        "stall_seconds": sum(seconds - quiet for kind, seconds in steps if kind != "quiet") / args.saves,
        "steps_beside_a_save": sum(kind == "beside" for kind, _ in steps) / args.saves,
    }


def compared(rounds: list[dict[str, dict[str, Any]]], mode: str, interval_seconds: float) -> dict[str, Any]:
    """The medians of one mode, and its throughput against the mode without saves in the same round."""
    varying = [name for name, value in rounds[0][mode].items() if isinstance(value, float)]
    found = {name: statistics.median(each[mode][name] for each in rounds) for name in varying}
    if mode != "none":
        ratios = [each[mode]["tokens_per_second"] / each["none"]["tokens_per_second"] for each in rounds]
        found["throughput_ratio"] = statistics.median(ratios)
        found["throughput_at_interval"] = interval_seconds / (interval_seconds + found["stall_seconds"])
    return {name: round(value, 4) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="synth-tiny")
    parser.add_argument("--layers", type=int, help="instead of the recipe's, for a short trial")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=4_096)
    parser.add_argument("--micro-batch-tokens", type=int)
    parser.add_argument("--save-every", type=int, default=20, help="steps between two saves")
    parser.add_argument("--saves", type=int, default=3, help="saves that are measured in each process")
    parser.add_argument("--interval-seconds", type=float, default=300, help="between the saves of a real run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"))
    parser.add_argument("--compile", default="auto", choices=("auto", "always", "never"))
    parser.add_argument("--folder", type=Path, help="where checkpoints are written (default: the system's temporary folder)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULT, help="also write the JSON here")
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.mode:
        print(json.dumps(measure(args.mode, args)))
        return

    child = [__file__, *sys.argv[1:], "--mode"]
    rounds = [{mode: measured([*child, mode], threads=args.threads) for mode in MODES} for _ in range(args.rounds)]
    first = rounds[0]["background"]
    same = ("parameters", "dtype", "compiled", "saved_bytes")
    result = {
        "benchmark": "bench_save",
        "recipe": args.recipe,
        **{name: first[name] for name in same},
        "seq_len": args.seq_len,
        "batch_tokens": args.batch_tokens,
        "steps_between_saves": args.save_every,
        "saves": args.saves,
        "rounds": args.rounds,
        "interval_seconds": args.interval_seconds,
        **{mode: compared(rounds, mode, args.interval_seconds) for mode in MODES},
        "threads": args.threads,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    publish(result, args.out)


if __name__ == "__main__":
    main()
