"""Plan against actual on this machine: what `osler plan` and `osler plan --probe` say of a run, and what the run then takes.

    python benchmarks/plan_vs_actual.py --text FILE [--seconds 120] [--only NAME ...] [--work FOLDER] [--out FILE]

Each run is a recipe that trains here, shortened by its length alone to about ``--seconds`` of training after a probe has said how
long a step takes. Then it is made in a process of its own, and its records are compared with its plans: seconds of training, of
evaluations, and of the whole from the start of the data's preparation, and the peak memory of the process. The runs of the
quickstart start from one another; ``--text`` is what `text-10min` reads. A run is ``in_time`` within 15 % and ``in_memory``
within 10 % of the plan with a probe, and ``safe`` if it stays below the upper end of the memory of both plans, because that end
decides whether a plan says "fits". Nothing else may run beside it.

Each row is kept in ``--work`` with its run, and the same command goes on with those that are missing or that other code made; a
run that was interrupted is made anew, because its times would be those of two starts. With 120 seconds a row takes about five
minutes on two cores and all of them an hour, by estimate; what a run will take is said before it begins. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from measuring import ROOT, commit_of, publish

from osler.cli.plan import runs_of
from osler.config.devices import this_machine
from osler.config.recipe import dump_yaml
from osler.config.schema import encode
from osler.plan.actual import Part, as_json, compare
from osler.plan.plan import Plan, Where
from osler.plan.planner import model_at, plan_of
from osler.plan.probe import CACHE, measure
from osler.plan.training import arithmetic_of
from osler.rl.config import GrpoConfig
from osler.runtime import child
from osler.runtime import format as fmt
from osler.runtime.files import RunFolder, read_json, write_json
from osler.train.config import TrainConfig

# Name: the recipe, its stage if it is a pipeline, overrides, and the run that it starts from.
RUNS: dict[str, tuple[str, str, list[str], str]] = {
    "pretrain": ("quickstart", "pretrain", [], ""),
    # How long the answers of a model get is not planned, so no exam is sat, and `grpo` can name no checkpoint by its score.
    "sft": ("quickstart", "sft", ["sft.exam.every_tokens=0", "grpo.init_from=sft"], "pretrain"),
    "grpo": ("quickstart", "grpo", [], "sft"),
    "grpo-debug": ("grpo-debug", "", ["init_from=none"], "sft"),
    "text-10min": ("text-10min", "", ["max_minutes=null"], ""),
    "text-adamw": ("text-10min", "", ["max_minutes=null", "optim={type: adamw, lr: 1e-3}", "batch_tokens=16384"], ""),
    "text-eager": ("text-10min", "", ["max_minutes=null", "compile=never", "precision=fp32", "micro_batch_tokens=2048"], ""),
    "text-long": ("text-10min", "", ["max_minutes=null", "batch_tokens=16384", "recompute=full"], ""),
    "debug": ("debug", "", [], ""),
    "debug-recompute": ("debug", "", ["recompute=selective"], ""),
}
LEAST_STEPS = 6
TIME, MEMORY = 0.15, 0.10  # how far the plan with a probe may be off


def shorter(config: TrainConfig | GrpoConfig, plan: Plan, seconds: float) -> TrainConfig | GrpoConfig:
    """Return the config of a run that trains for about so many seconds at the pace of a plan.

    Otherwise it is as the whole run: it compiles if that does, and it saves while it trains if that does, which takes the memory
    of a copy.
    """
    steps, keep = max(LEAST_STEPS, int(seconds / plan.pace.stretches[0].seconds.value)), config.checkpoint
    if isinstance(config, GrpoConfig):
        steps = min(steps, config.steps)
        half = -(-steps // 2)
        saves = replace(keep, every_steps=min(keep.every_steps, half if keep.every_steps < config.steps else steps))
        return replace(config, steps=steps, eval_every_steps=half, checkpoint=saves)
    total = min(config.total_tokens, steps * config.batch_tokens)
    saves = replace(keep, every_tokens=min(keep.every_tokens, total // 2) if keep.every_tokens < config.total_tokens else total)
    compiled = arithmetic_of(config, plan.where.device).compiled
    return replace(config, total_tokens=total, checkpoint=saves, compile="always" if compiled else "never")


def make(config: TrainConfig | GrpoConfig, folder: Path, name: str) -> RunFolder:
    """Make a run as `osler pretrain` and the like do, with an empty cache of compiled code."""
    recipe, run = folder / f"{name}.yaml", RunFolder(folder / name)
    for left in (run.root, folder / f"{name}-compiled"):
        shutil.rmtree(left, ignore_errors=True)
    recipe.write_text(dump_yaml(encode(config)), encoding="utf-8")
    # A session of its own, as the probe's process has: Linux shares the processor between sessions.
    environment = {CACHE: str(folder / f"{name}-compiled")}
    if child.start("osler.cli", config.kind, str(recipe), "--run", str(run.root), env=environment).wait():
        raise SystemExit(f"{name} failed")
    return run


def told(parts: list[Part]) -> dict[str, Any]:
    return {
        part.name: {"planned": list(part.planned.numbers), "actual": part.actual, "ratio": part.ratio} for part in parts
    }


def one_run(name: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Plan a run, probe it, make it, and compare."""
    recipe, stage, overrides, start = RUNS[name]
    given = [*overrides, *([f"data.path={args.text}"] if recipe == "text-10min" else [])]
    planned = next(run for run in runs_of(recipe, given) if run.name == (f"{recipe}: {stage}" if stage else recipe))
    config, model = planned.config, planned.model
    if start:
        config = replace(config, init_from=str(folder / start))
        model = model_at(str(folder / start))
    where = Where(this_machine())
    measured = measure(config, plan_of(config, where, model=model), model)
    config = shorter(config, plan_of(config, where, model=model, measured=measured), args.seconds)
    assumed = plan_of(config, where, model=model)
    probed = plan_of(config, where, model=model, measured=measured)
    print(f"{name}: a run of about {fmt.duration(probed.seconds.value)}", file=sys.stderr)
    run = make(config, folder, name)
    result: dict[str, Any] = {"recipe": recipe, "overrides": overrides, "steps": assumed.steps.value}
    for word, plan in (("assumed", assumed), ("probed", probed)):
        write_json(run.root / "plan.json", as_json(plan))
        result[word] = told(compare(run)) | {"fits": plan.fits}
    time, memory = (result["probed"][part] for part in ("time", "memory of a process"))
    result["in_time"] = abs(time["ratio"] - 1) <= TIME
    result["in_memory"] = abs(memory["ratio"] - 1) <= MEMORY
    result["safe"] = all(memory["actual"] <= plan.memory_bytes.high for plan in (assumed, probed))
    print(f"{name}: time {time['ratio']:.2f}, memory {memory['ratio']:.2f}", file=sys.stderr)
    return result


def with_starts(names: Sequence[str]) -> set[str]:
    """Return the runs with those that they start from."""
    found = set(names)
    while missing := {RUNS[name][3] for name in found} - found - {""}:
        found |= missing
    return found


def row_of(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return the row of a run: the kept one, or a new one."""
    file, asked = args.work / f"{name}.json", {"seconds": args.seconds, "text": args.text.name, "code": commit_of(ROOT)}
    if file.is_file() and (kept := read_json(file)).items() >= asked.items() and (args.work / name).is_dir():
        print(f"{name}: kept in {file}", file=sys.stderr)
        return kept
    print(f"{name}: a probe of about a minute", file=sys.stderr)
    row = asked | one_run(name, args.work, args)
    write_json(file, row)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a file or folder that `osler pretrain` reads")
    parser.add_argument("--seconds", type=float, default=120.0, help="of training in each run (default: 120)")
    parser.add_argument("--only", nargs="+", default=list(RUNS), choices=list(RUNS), metavar="NAME", help=", ".join(RUNS))
    parser.add_argument("--work", type=Path, default=Path("runs/plan-vs-actual"), help="where runs and rows are kept")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args.work.mkdir(parents=True, exist_ok=True)
    runs = {name: row_of(name, args) for name in RUNS if name in with_starts(args.only)}
    counts = {word: sum(run[word] for run in runs.values()) for word in ("in_time", "in_memory", "safe")}
    publish({"benchmark": "plan_vs_actual", "seconds": args.seconds, "of": len(runs), **counts, "runs": runs}, args.out)


if __name__ == "__main__":
    main()
