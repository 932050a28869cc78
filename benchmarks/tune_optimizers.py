"""AdamW against Muon, each tuned with the same number of runs: bits per byte of the recipe ``text-10min`` with every setting.

    python benchmarks/tune_optimizers.py FILE [FILE ...] [--runs 3] [--minutes 9] [--settings FILE] [--out FILE]

Equal time without a clock: the tokens per second of every optimizer and batch that is tried are measured first, side by side in
alternating fresh processes (``beside_peers.py``), and each run then trains on the tokens that its optimizer makes in that time.
So a slower step costs tokens, as it does by the clock, and a machine that is busy during a run changes its length and not its
result. AdamW and Muon take turns. The JSON is written after every run; started again with the same arguments, the script skips
the runs it holds. ``SETTINGS`` lists what is tried, the likeliest first; ``--settings`` names a JSON file to take its place.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from beside_peers import compare
from text_10min import train

from osler.config.recipe import load_recipe
from osler.config.schema import decode
from osler.runtime.device import describe_machine
from osler.train.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "text-10min"
OPTIMIZERS = ("adamw", "muon")
SPEED_ROUNDS, SPEED_STEPS = 3, 40
BASE = ["batch_tokens=2048", "schedule.warmup_tokens=81920"]  # of every run, before its own fields
WEIGHT_DECAY = {"adamw": 0.1, "muon": 0.01}
BATCH_4096 = ["batch_tokens=4096", "schedule.warmup_tokens=163840"]
SETTINGS: dict[str, list[list[str]]] = {
    "adamw": [
        ["optim.lr=2e-3"],
        ["optim.lr=3e-3"],
        ["optim.lr=4e-3", *BATCH_4096],
        ["optim.lr=4e-3"],
        ["optim.lr=2e-3", "optim.embedding_lr=6e-3"],
        ["optim.lr=3e-3", "optim.embedding_lr=9e-3"],
        ["optim.lr=3e-3", *BATCH_4096],
        ["optim.lr=3e-3", "optim.weight_decay=0.3"],
    ],
    "muon": [
        ["optim.lr=0.02", "optim.adamw_lr=4e-3"],
        ["optim.lr=0.02", "optim.adamw_lr=4e-3", *BATCH_4096],
        ["optim.lr=0.02", "optim.adamw_lr=8e-3", *BATCH_4096],
        ["optim.lr=0.01", "optim.adamw_lr=4e-3"],
        ["optim.lr=0.02", "optim.adamw_lr=8e-3"],
        ["optim.lr=0.04", "optim.adamw_lr=4e-3"],
        ["optim.lr=0.02", "optim.adamw_lr=2e-3"],
        ["optim.lr=0.02", "optim.adamw_lr=4e-3", "optim.momentum=0.9"],
    ],
}
KEPT = ("bits_per_byte", "tokens_trained", "minutes", "content_fingerprint")


def kind(optimizer: str, overrides: list[str]) -> tuple[str, ...]:
    """What the speed of a setting depends on: the optimizer and the batch."""
    return (f"optim.type={optimizer}", *[override for override in overrides if override.startswith("batch_tokens=")])


def tokens_per_second(kinds: list[tuple[str, ...]]) -> dict[str, list[float]]:
    """Tokens per second of each kind, one value for each round; the kinds take turns."""
    configs = {one: decode(TrainConfig, load_recipe(RECIPE, [*BASE, *one])) for one in kinds}
    speeds: dict[str, list[float]] = {" ".join(one): [] for one in kinds}
    for number in range(SPEED_ROUNDS):
        for one in kinds if number % 2 == 0 else kinds[::-1]:
            measured = compare(configs[one], RECIPE, peers=[], rounds=1, steps=SPEED_STEPS)
            speeds[" ".join(one)].append(measured["osler"]["tokens_per_second"])
    return speeds


def is_same(run: dict[str, Any], setting: dict[str, Any]) -> bool:
    return all(run.get(key) == value for key, value in setting.items())


def with_best(result: dict[str, Any]) -> dict[str, Any]:
    """``result`` with the best run of each optimizer in front."""
    best = {}
    for optimizer in OPTIMIZERS:
        mine = [run for run in result["runs"] if run["optimizer"] == optimizer]
        if mine:
            best[optimizer] = min(mine, key=lambda run: float(run["bits_per_byte"]))
    return {**result, "best": best}


def start(arguments: dict[str, Any], settings: dict[str, list[list[str]]], out: Path) -> dict[str, Any]:
    """What ``out`` holds already, or a new result with the measured speeds and no runs."""
    kinds = sorted({kind(optimizer, overrides) for optimizer in OPTIMIZERS for overrides in settings[optimizer]})
    if out.exists():
        earlier: dict[str, Any] = json.loads(out.read_text())
        if not is_same(earlier, arguments) or any(" ".join(one) not in earlier["tokens_per_second"] for one in kinds):
            raise SystemExit(f"{out} holds runs with other arguments; name another --out")
        return earlier
    speeds = tokens_per_second(kinds)
    return {"benchmark": "tune-optimizers", **arguments, "machine": describe_machine(), "tokens_per_second": speeds, "runs": []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--runs", type=int, default=3, help="of each optimizer, from the front of its list")
    parser.add_argument("--minutes", type=float, default=9.0, help="of training steps in each run, at the measured speed")
    parser.add_argument("--settings", type=Path, help='JSON: {"adamw": [["optim.lr=2e-3"], ...], "muon": [...]}')
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "tune_optimizers.json")
    args = parser.parse_args()
    given = json.loads(args.settings.read_text()) if args.settings else SETTINGS
    settings = {optimizer: given[optimizer][: args.runs] for optimizer in OPTIMIZERS}
    for optimizer in OPTIMIZERS:
        if len(settings[optimizer]) < args.runs:
            raise SystemExit(f"{args.runs} runs of each, but {optimizer} has {len(settings[optimizer])} settings")

    result = start({"files": [file.name for file in args.files], "minutes": args.minutes}, settings, args.out)
    for index in range(args.runs):
        for optimizer in OPTIMIZERS:
            overrides = settings[optimizer][index]
            if any(is_same(run, {"optimizer": optimizer, "overrides": overrides}) for run in result["runs"]):
                continue
            speed = statistics.median(result["tokens_per_second"][" ".join(kind(optimizer, overrides))])
            tokens = int(speed * 60 * args.minutes)
            print(f"{optimizer} {' '.join(overrides)}: {tokens:,} tokens", file=sys.stderr, flush=True)
            budget = ["max_minutes=null", f"total_tokens={tokens}"]
            base = [*BASE, f"optim.type={optimizer}", f"optim.weight_decay={WEIGHT_DECAY[optimizer]}"]
            measured = train(args.files, [*base, *overrides, *budget])
            result["runs"].append({"optimizer": optimizer, "overrides": overrides, **{key: measured[key] for key in KEPT}})
            args.out.write_text(json.dumps(with_best(result), indent=2) + "\n")
    print(json.dumps(with_best(result), indent=2))


if __name__ == "__main__":
    main()
