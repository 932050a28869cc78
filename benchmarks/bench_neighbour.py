"""What another process on the same CPUs costs: training and sampling alone, and beside one process that never rests.

    python benchmarks/bench_neighbour.py [--workloads text-10min quickstart sampling] [--rounds 3] [--nice 19] [--out FILE]

Three ways of waiting take turns in fresh processes: "plain" is torch's own, "passive" is OMP_WAIT_POLICY=passive, and "osler" is
`osler/runtime/neighbours.py`, as every command uses it. Each process compiles and warms up, then times a stretch alone and a
stretch beside a spinning process (at equal priority unless --nice says otherwise), each as often as there are stretches. The
figures are medians over rounds. Speeds are in tokens/s; "alone" divides by "plain" alone, "beside" by the same process alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from measuring import measured, publish

WORKLOADS = ("text-10min", "quickstart", "sampling")
WAYS: dict[str, dict[str, str]] = {"plain": {}, "passive": {"OMP_WAIT_POLICY": "passive"}, "osler": {}}
WARM_SECONDS, SECONDS, STRETCHES = 4.0, 6.0, 2
SETTLE_SECONDS = 3.0  # between stretches: the watch has seen by then who came or went
SPIN = "while True: pass"


def training(recipe: str) -> Callable[[], int]:
    """One training step of a recipe; returns its tokens."""
    from osler.bench import build_learner, machine_of, stand_in, training_step
    from osler.config.recipe import load_recipe
    from osler.config.schema import decode
    from osler.runtime.device import keep_freed_memory
    from osler.train.config import TrainConfig

    keep_freed_memory()
    tree = load_recipe("quickstart", [])["pretrain"] if recipe == "quickstart" else load_recipe(recipe, ["data.path=."])
    config = decode(TrainConfig, {**tree, "device": "cpu"})
    step = training_step(config, build_learner(config, machine_of(config)))
    folder = Path(tempfile.mkdtemp())
    batches = stand_in(config, folder).batches()

    def call() -> int:
        step(next(batches))
        return config.batch_tokens

    return call


def sampling() -> Callable[[], int]:
    """A call of the sampler as `bench_sample.py` makes it: 64 rows of 32 new tokens, in fp32."""
    import torch
    from bench_sample import MODELS, PROMPT_TOKENS, ROWS, build_model

    from osler.inference.engine import InferenceEngine
    from osler.ops.sampling_params import SamplingParams

    engine = InferenceEngine(build_model(MODELS["tiny"], torch.float32))
    prompts = torch.randint(MODELS["tiny"]["vocab"], (ROWS, PROMPT_TOKENS), generator=torch.Generator().manual_seed(2)).tolist()
    return lambda: sum(map(len, engine.generate(prompts, SamplingParams(max_new_tokens=32)).completions))


def rate(call: Callable[[], int], seconds: float) -> float:
    """Tokens per second of calls made for about so long."""
    tokens, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        tokens += call()
    return tokens / (time.perf_counter() - began)


def measure(workload: str, way: str, nice: int) -> dict[str, float]:
    """Speeds of this process alone and beside a spinning one."""
    from osler.runtime.neighbours import sharing_cpus

    call = sampling() if workload == "sampling" else training(workload)
    alone, beside = [], []
    with sharing_cpus() if way == "osler" else nullcontext():
        rate(call, WARM_SECONDS)
        for _ in range(STRETCHES):
            alone.append(rate(call, SECONDS))
            neighbour = subprocess.Popen(["nice", "-n", str(nice), sys.executable, "-c", SPIN])
            try:
                rate(call, SETTLE_SECONDS)
                beside.append(rate(call, SECONDS))
            finally:
                neighbour.kill()
                neighbour.wait()
            rate(call, SETTLE_SECONDS)
    return {"alone": statistics.median(alone), "beside": statistics.median(beside)}


def compare(workload: str, rounds: int, nice: int) -> dict[str, Any]:
    """Every way of waiting in turns."""
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for index in range(rounds):
        for way, environment in WAYS.items() if index % 2 == 0 else reversed(WAYS.items()):
            runs[way].append(measured([__file__, "--child", workload, way, str(nice)], **environment))
            print(f"{workload} round {index + 1} {way}: {runs[way][-1]}", file=sys.stderr)
    plain = [run["alone"] for run in runs["plain"]]
    return {
        "workload": workload,
        "tokens_per_second": {
            way: {name: round(statistics.median(run[name] for run in done)) for name in ("alone", "beside")}
            for way, done in runs.items()
        },
        "alone_to_plain": {
            way: round(statistics.median(run["alone"] / base for run, base in zip(done, plain, strict=True)), 2)
            for way, done in runs.items()
        },
        "beside_to_alone": {
            way: round(statistics.median(run["beside"] / run["alone"] for run in done), 2) for way, done in runs.items()
        },
        "rounds": {way: [{name: round(value) for name, value in run.items()} for run in done] for way, done in runs.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nice", type=int, default=0, help="the neighbour's niceness, 0 to 19")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        workload, way, nice = asked.child
        print(json.dumps(measure(workload, way, int(nice))), flush=True)
        os._exit(0)  # the loader's threads still prepare batches
    results = [compare(workload, asked.rounds, asked.nice) for workload in asked.workloads]
    publish({"benchmark": "neighbour", "nice": asked.nice, "results": results}, asked.out)


if __name__ == "__main__":
    main()
