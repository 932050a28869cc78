"""What watching a run costs: the share of a training step that monitor.level=basic and full add.

    python benchmarks/bench_monitor.py [--recipe pure-tiny] [--layers N] [--rows 16] [--seq-len 256] [--cycles 20] [--compile]

One percent is less than two processes differ by on a shared machine, so the levels take turns within a process: a run of the
real trainer, on random tokens and with a line of metrics every ten steps, changes its level at every line, in cycles of off,
basic, full and a rest without watching, in which what a look does to caches and memory still shows. A phase's time is taken step
by step: the median, over the cycles, of the first step behind a line, of the second, and so on to the tenth, which has the line
(and the look) in it; these ten are added up. What a look costs, its own ten steps and the ten behind it less twenty without, is
shared out over ``full_every_steps``. Every round is a fresh process; the results are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from measuring import measured, publish

PHASES = ("off", "basic", "full", "rest")
LINES_EVERY = 10


def built(config: Any, args: argparse.Namespace) -> Any:
    """The learner of a config."""
    import torch

    from osler.model.transformer import Transformer
    from osler.optim.build import build_optimizer
    from osler.parallel.parallelize import parallelize
    from osler.runs.process import Learner
    from osler.runtime.world import World

    model = Transformer(config.model, compute_dtype=getattr(torch, args.dtype))
    model.init_weights(0)
    model.to(args.device)
    engine = parallelize(model, config.parallel, World(device=args.device), compile=args.compile)
    optimizer = build_optimizer(model, config.optim)
    return Learner(model, optimizer, engine, config.clip_norm)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Train in this process; seconds of ten steps at each level, and of a look by the trainer's own clock."""
    import torch

    from osler.bench import stand_in
    from osler.config.recipe import load_recipe
    from osler.config.schema import decode
    from osler.data.loader import Batch, Loader
    from osler.model.config import ModelConfig
    from osler.monitor.config import MonitorConfig
    from osler.records.jsonl import read_metrics
    from osler.runs.loop import Loop
    from osler.runs.process import Run
    from osler.runtime.device import keep_freed_memory
    from osler.runtime.files import RunFolder
    from osler.runtime.world import World
    from osler.train.config import TokenCheckpoints, TrainConfig
    from osler.train.trainer import SupervisedTrainer

    keep_freed_memory()
    device = torch.device(args.device)
    shape = decode(ModelConfig, load_recipe(args.recipe)["model"])
    shape = replace(shape, num_layers=args.layers or shape.num_layers, max_seq_len=max(args.seq_len, shape.max_seq_len))
    batch_tokens = args.rows * args.seq_len
    phases = ["rest", *PHASES * args.cycles]
    total_tokens = (len(phases) + 1) * LINES_EVERY * batch_tokens  # ten more than are timed: the last one saves
    config = TrainConfig(
        model=shape,
        seq_len=args.seq_len,
        batch_tokens=batch_tokens,
        total_tokens=total_tokens,
        checkpoint=TokenCheckpoints(every_tokens=total_tokens),
        eval_every_tokens=total_tokens,
        log_every_steps=LINES_EVERY,
        monitor=MonitorConfig(level="off", full_every_steps=LINES_EVERY),
    )
    given: list[float] = []  # when the trainer got the batch of each step
    with tempfile.TemporaryDirectory() as folder:
        plain = stand_in(config, Path(folder), pin_memory=device.type == "cuda")

        class Watched(Loader):
            def batches(self, start_step: int = 0, skipped_tokens: int = 0) -> Iterator[Batch]:
                for number, batch in enumerate(super().batches(start_step, skipped_tokens)):
                    phase = (*phases, "rest")[number // LINES_EVERY]
                    trainer.collector.level = "off" if phase == "rest" else phase
                    given.append(time.perf_counter())
                    yield batch

        run = RunFolder.create(Path(folder) / "run")
        trainer = SupervisedTrainer(config, Run(run, World(device=args.device)), built(config, args), Watched(**vars(plain)))
        assert Loop(trainer).fit()
        times = [line.values["perf/monitor_ms"] for line in read_metrics(run.metrics, having="perf/monitor_ms")]
    looks = [LINES_EVERY * ms / 1000 for ms in times if ms]
    assert len(looks) == args.cycles
    windows = {phase: [number for number, each in enumerate(phases) if each == phase and number] for phase in PHASES}
    return {
        "ten_steps_seconds": {phase: ten_steps(given, windows[phase]) for phase in PHASES},
        "look_seconds": statistics.median(looks),
    }


def ten_steps(given: list[float], windows: list[int]) -> float:
    """Seconds from one line of metrics to the next: the sum, over the steps between, of each one's median over ``windows``.

    On a GPU steps are only queued, and the line waits for all of them.
    """
    starts = [LINES_EVERY * window for window in windows]
    return sum(statistics.median(given[s + n + 1] - given[s + n] for s in starts) for n in range(LINES_EVERY))


def overhead(seconds: dict[str, float], full_every_steps: int) -> dict[str, float]:
    """The share of the step time without watching that each level adds."""
    step = seconds["off"] / LINES_EVERY
    basic = (seconds["basic"] - seconds["off"]) / seconds["off"]
    look = seconds["full"] - seconds["basic"] + seconds["rest"] - seconds["off"]
    return {"basic": basic, "full": basic + look / (step * full_every_steps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="pure-tiny", help="whose model")
    parser.add_argument("--layers", type=int, help="instead of the recipe's, for a short trial")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--cycles", type=int, default=20, help="turns of every level in each process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args)))
        return

    import torch

    from osler.monitor.config import MonitorConfig

    every = MonitorConfig().full_every_steps
    rounds = [measured([__file__, *sys.argv[1:], "--measure"], threads=args.threads) for _ in range(args.rounds)]
    overheads = [overhead(each["ten_steps_seconds"], every) for each in rounds]
    result: dict[str, Any] = {
        "benchmark": "monitor",
        "shape": {"recipe": args.recipe, "layers": args.layers, "rows": args.rows, "seq_len": args.seq_len},
        "full_every_steps": every,
        "lines_every_steps": LINES_EVERY,
        "cycles": args.cycles,
        "dtype": args.dtype,
        "compiled": args.compile,
        "device": args.device if args.device == "cpu" else torch.cuda.get_device_name(args.device),
        "threads": args.threads,
        "rounds": rounds,
        "median_step_seconds_off": statistics.median(each["ten_steps_seconds"]["off"] for each in rounds) / LINES_EVERY,
        "median_look_seconds": statistics.median(each["look_seconds"] for each in rounds),
        "overhead_each_round": overheads,
        "median_overhead": {level: statistics.median(each[level] for each in overheads) for level in ("basic", "full")},
    }
    publish(result, args.out)


if __name__ == "__main__":
    main()
