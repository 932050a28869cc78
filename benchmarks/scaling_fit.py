"""Bits per byte from parameters and tokens, fitted on small runs of our own: what ``osler plan --budget`` chooses by.

    python benchmarks/scaling_fit.py FILE ... [--sizes 64 96 128 192 256] [--millions 0.5 1 2 4 8] [--flops 4e14]

The texts are tokenised once, with one tokenizer. A run has a width and a number of tokens, its own schedule from the warm-up to
the end, and is evaluated at its end on what is held out. Runs go from the cheapest to the dearest and end where ``--flops`` are
used up. Each is an ordinary run in ``--work``, so an interrupted one goes on where it stopped, and the JSON is written after
every run: started again with the same arguments the script skips what it holds. Text that is too short is read again; ``epochs``
says how often. Prints one JSON object, and writes it into the package, where the planner reads it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from measuring import in_fresh_python

from osler.config.recipe import dump_yaml, load_recipe
from osler.config.schema import decode, encode
from osler.plan.scaling import FIT_FILE, Point, counted_parameters, fit_points
from osler.records.jsonl import read_metrics
from osler.runtime.device import describe_machine
from osler.runtime.files import DATA_MANIFEST
from osler.train.config import TrainConfig

LAYERS, HEAD_DIM, VOCABULARY, SEQ_LEN, BATCH_TOKENS = 4, 32, 2048, 256, 4096
DRAWS = 200
HOLDOUT = 0.05


def recipe_of(width: int, tokens: int, work: Path) -> Path:
    """Write the recipe of one run, with the learning rates of text-10min and the start of the larger families."""
    heads = width // HEAD_DIM
    recipe = work / f"{width}-{tokens}.yaml"
    recipe.write_text(dump_yaml({
        "base": "text-10min",
        "max_minutes": None,
        "model": {
            "num_layers": LAYERS, "hidden_size": width, "intermediate_size": 32 * round(2.75 * width / 32), "num_heads": heads,
            "num_kv_heads": heads // 2 or 1 if heads % 2 == 0 else heads, "head_dim": HEAD_DIM, "vocab_size": VOCABULARY,
            "max_seq_len": SEQ_LEN, "attention_init": "mirrored", "embedding_init": "normal",
            "value_embeddings": "none", "copy_head_dim": None, "attention": {"window": None},
        },
        "data": {"type": "prepared", "path": str(work / "shards")},
        "seq_len": SEQ_LEN,
        "batch_tokens": BATCH_TOKENS,
        "total_tokens": tokens,
        "optim": {"weight_decay": 0.01, "weight_decay_schedule": {"type": "constant"}, "decay_embeddings": False},
        "schedule": {"warmup_tokens": max(BATCH_TOKENS, tokens // 20), "decay_fraction": 0.5},
        "eval_every_tokens": tokens,
        "checkpoint": {"every_tokens": tokens},
    }), encoding="utf-8")  # fmt: skip
    return recipe


def carried_out(config: TrainConfig, recipe: Path, threads: int) -> dict[str, Any]:
    """Make one run, or go on with it, and return what it ended at."""
    started, folder = time.perf_counter(), recipe.with_suffix("")
    in_fresh_python(["-m", "osler.cli", "pretrain", str(recipe), "--run-dir", str(folder)], threads=threads)
    last = {key: value for line in read_metrics(folder / "metrics.jsonl") for key, value in line.values.items()}
    return {
        "width": config.model.hidden_size,
        "tokens": config.total_tokens,
        "parameters": config.model.num_parameters,
        "counted_parameters": counted_parameters(config.model),
        "bits_per_byte": last["eval/bits_per_byte"],
        "epochs": last["data/epoch"],
        "seconds": time.perf_counter() - started,
    }


def prepare(texts: list[Path], work: Path, threads: int) -> None:
    """Tokenise the texts once."""
    if (work / "shards" / DATA_MANIFEST).exists():
        return
    together = work / "texts"  # one source, so that an evaluation reads one validation set
    together.mkdir(exist_ok=True)
    for text in texts:
        shutil.copy(text, together / text.name)
    recipe = work / "data.yaml"
    recipe.write_text(dump_yaml({
        "kind": "pretrain", "model": {"vocab_size": VOCABULARY}, "tokenizer": {"vocab_size": VOCABULARY},
        "data": {"type": "files", "path": str(together.resolve()), "holdout_fraction": HOLDOUT},
    }), encoding="utf-8")  # fmt: skip
    in_fresh_python(["-m", "osler.cli", "data", "prepare", str(recipe), "--out", str(work / "shards")], threads=threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96, 128, 192, 256], help="widths, multiples of 32")
    parser.add_argument("--millions", type=float, nargs="+", default=[0.5, 1, 2, 4, 8], help="tokens of a run")
    parser.add_argument("--flops", type=float, default=4e14, help="of all runs together")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, default=Path("runs/scaling-fit"))
    parser.add_argument("--out", type=Path, default=FIT_FILE)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    prepare(args.texts, args.work, args.threads)
    setting = {"texts": sorted(text.name for text in args.texts), "layers": LAYERS, "vocabulary": VOCABULARY}
    result: dict[str, Any] = {"benchmark": "scaling-fit", **setting, "threads": args.threads, "runs": []}
    if args.out.exists():
        earlier = json.loads(args.out.read_text())
        if any(earlier.get(key) != value for key, value in setting.items()):
            raise SystemExit(f"{args.out} holds runs on other texts; name another --out")
        result["runs"] = earlier["runs"]
    grid = []
    for width, millions in itertools.product(args.sizes, args.millions):
        tokens = max(1, round(millions * 1e6 / BATCH_TOKENS)) * BATCH_TOKENS
        recipe = recipe_of(width, tokens, args.work)
        config = decode(TrainConfig, load_recipe(recipe), source=str(recipe))
        grid.append((tokens * config.model.flops_per_token(SEQ_LEN), config, recipe))
    left = args.flops
    for flops, config, recipe in sorted(grid, key=lambda one: one[0]):
        left -= flops
        if left < 0:
            break
        one = {"width": config.model.hidden_size, "tokens": config.total_tokens}
        if any(run.items() >= one.items() for run in result["runs"]):
            continue
        result["runs"].append(carried_out(config, recipe, args.threads))
        args.out.write_text(json.dumps(with_fit(result)) + "\n")
    result = with_fit(result) | {"machine": describe_machine() | {"threads": args.threads}}
    args.out.write_text(json.dumps(result) + "\n")
    print(json.dumps({**result, "fit": {**result.get("fit", {}), "drawn": f"{DRAWS} curves in {args.out}"}}, indent=2))


def with_fit(result: dict[str, Any]) -> dict[str, Any]:
    """The result with the fit of its runs, once there are enough of them."""
    points = [Point(run["counted_parameters"], run["tokens"], run["bits_per_byte"]) for run in result["runs"]]
    try:
        fit = fit_points(points, DRAWS)
    except ValueError:
        return result
    errors = [abs(fit.curve.at(one.parameters, one.tokens) / one.bits_per_byte - 1) for one in points]
    parts = {"curve": fit.curve, "drawn": fit.drawn, "parameters": fit.parameters, "tokens": fit.tokens}
    return {**result, "largest_error": max(errors), "fit": encode({name: [*part] for name, part in parts.items()})}


if __name__ == "__main__":
    main()
