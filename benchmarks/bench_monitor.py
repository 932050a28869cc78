"""What watching a run costs: mean time of a training step with monitor.level=off, basic and full.

    python benchmarks/bench_monitor.py [--recipe pure-tiny] [--layers N] [--rows 16] [--seq-len 256] [--rounds 5] [--compile]

Every measurement is a fresh process, and the levels take turns, so that a machine that slows down slows all of them; each round
begins with another level. A process trains on random tokens with the real trainer, lines of metrics every ten steps, and times
``full_every_steps`` steps after the first ten: with level=full one of them looks at everything, so the mean is what a run pays.
Ratios to ``off`` are taken round by round, and their median is the result.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from measuring import measured, publish

LEVELS = ("off", "basic", "full")
LINES_EVERY = 10


def built(config: Any, args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Model, optimizer and step of a config."""
    import torch

    from osler.model.transformer import Transformer
    from osler.optim.build import build_optimizer
    from osler.parallel.parallelize import parallelize
    from osler.runtime.world import World
    from osler.train.step import TrainStep

    model = Transformer(config.model, compute_dtype=getattr(torch, args.dtype))
    model.init_weights(0)
    model.to(args.device)
    engine = parallelize(model, config.parallel, World(device=args.device), compile=args.compile)
    optimizer = build_optimizer(model, config.optim)
    step = TrainStep(
        model,
        optimizer,
        engine,
        micro_batch_tokens=None,
        clip_norm=config.clip_norm,
        document_mask=False,
        device=torch.device(args.device),
    )
    return model, optimizer, step


def measure(level: str, args: argparse.Namespace) -> dict[str, float]:
    """Train at one level in this process; seconds of a step, and the milliseconds a look took."""
    import torch

    from osler.bench.measure import stand_in
    from osler.config import decode, load_recipe
    from osler.data.delivered import Delivered
    from osler.data.loader import Batch, Loader, StagedLoader
    from osler.model.config import ModelConfig
    from osler.monitor.config import MonitorConfig
    from osler.runtime.device import keep_freed_memory
    from osler.runtime.files import RunFolder
    from osler.train.config import TrainConfig
    from osler.train.trainer import Trainer

    keep_freed_memory()
    device = torch.device(args.device)
    shape = decode(ModelConfig, load_recipe(args.recipe)["model"])
    shape = replace(shape, num_layers=args.layers or shape.num_layers, max_seq_len=max(args.seq_len, shape.max_seq_len))
    batch_tokens = args.rows * args.seq_len
    total_tokens = (LINES_EVERY + args.every + 1) * batch_tokens  # one more than is timed: the last one saves
    config = TrainConfig(
        model=shape,
        seq_len=args.seq_len,
        batch_tokens=batch_tokens,
        total_tokens=total_tokens,
        save_every_tokens=total_tokens,
        eval_every_tokens=total_tokens,
        log_every_steps=LINES_EVERY,
        monitor=MonitorConfig(level=level, full_every_steps=args.every),
    )
    model, optimizer, step = built(config, args)
    asked: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        loader = Loader(stand_in(config, Path(folder)), args.rows, workers=1, pin_memory=device.type == "cuda")
        staged = StagedLoader(config.timeline, [loader])

        def batches(first: int, skipped_tokens: int) -> Iterator[Batch]:
            for batch in staged.batches(first, skipped_tokens):
                asked.append(time.perf_counter())
                yield batch

        run = RunFolder.create(Path(folder) / "run")
        trainer = Trainer(
            config,
            model=model,
            optimizer=optimizer,
            train_step=step,
            batches=batches,
            delivered=Delivered(staged),
            evaluate=dict,
            probe=dict,
            run=run,
            files={},
            fingerprints={},
            started=time.monotonic(),
        )
        assert trainer.fit()
        lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    # Both ends lie just behind a line of metrics, which waits for the device.
    seconds = (asked[LINES_EVERY + args.every] - asked[LINES_EVERY]) / args.every
    looks = [LINES_EVERY * line["perf/monitor_ms"] / 1000 for line in lines if line.get("perf/monitor_ms")]
    return {"step_seconds": seconds, **({"look_seconds": looks[-1]} if looks else {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="pure-tiny", help="whose model")
    parser.add_argument("--layers", type=int, help="instead of the recipe's, for a short trial")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--every", type=int, default=100, help="full_every_steps, and the steps timed; a multiple of ten")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--level", choices=LEVELS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.level:
        print(json.dumps(measure(args.level, args)))
        return

    import torch

    rounds = []
    for number in range(args.rounds):
        order = LEVELS[number % len(LEVELS) :] + LEVELS[: number % len(LEVELS)]
        rounds.append({level: measured([__file__, *sys.argv[1:], "--level", level], threads=args.threads) for level in order})
    result: dict[str, Any] = {
        "benchmark": "monitor",
        "shape": {"recipe": args.recipe, "layers": args.layers, "rows": args.rows, "seq_len": args.seq_len},
        "full_every_steps": args.every,
        "lines_every_steps": LINES_EVERY,
        "dtype": args.dtype,
        "compiled": args.compile,
        "device": args.device if args.device == "cpu" else torch.cuda.get_device_name(args.device),
        "threads": args.threads,
        "machine": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "rounds": rounds,
        "median_step_seconds": {level: statistics.median(each[level]["step_seconds"] for each in rounds) for level in LEVELS},
        "median_look_seconds": statistics.median(each["full"]["look_seconds"] for each in rounds),
        "median_ratio_to_off": {
            level: statistics.median(each[level]["step_seconds"] / each["off"]["step_seconds"] for each in rounds)
            for level in LEVELS[1:]
        },
    }
    publish(result, args.out)


if __name__ == "__main__":
    main()
