"""AdamW against Muon, each tuned with the same number of runs: bits per byte of the recipe ``text-10min`` with every setting.

    python benchmarks/tune_optimizers.py FILE [FILE ...] [--runs 6] [--minutes 9.6] [--settings FILE] [--out FILE]

Runs follow one another, AdamW and Muon in turn, each from nothing and by the clock: an optimizer whose step takes longer makes
fewer of them. The JSON is written after every run; started again with the same arguments, the script skips the runs it holds.
``SETTINGS`` lists what is tried, the likeliest first; ``--settings`` names a JSON file to take its place. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from text_10min import train

ROOT = Path(__file__).resolve().parent.parent
OPTIMIZERS = ("adamw", "muon")
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
        ["optim.lr=0.01", "optim.adamw_lr=4e-3"],
        ["optim.lr=0.02", "optim.adamw_lr=4e-3", *BATCH_4096],
        ["optim.lr=0.02", "optim.adamw_lr=8e-3"],
        ["optim.lr=0.04", "optim.adamw_lr=4e-3"],
        ["optim.lr=0.02", "optim.adamw_lr=2e-3"],
        ["optim.lr=0.02", "optim.adamw_lr=8e-3", *BATCH_4096],
        ["optim.lr=0.02", "optim.adamw_lr=4e-3", "optim.momentum=0.9"],
    ],
}
KEPT = ("bits_per_byte", "tokens_trained", "minutes", "content_fingerprint")


def is_same(run: dict[str, Any], setting: dict[str, Any]) -> bool:
    return all(run.get(key) == value for key, value in setting.items())


def summary(arguments: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """All runs, and the best of each optimizer."""
    import torch

    best = {}
    for optimizer in OPTIMIZERS:
        mine = [run for run in runs if run["optimizer"] == optimizer]
        if mine:
            best[optimizer] = min(mine, key=lambda run: float(run["bits_per_byte"]))
    machine = {"machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores", "torch": torch.__version__}
    return {"benchmark": "tune-optimizers", **arguments, **machine, "best": best, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--runs", type=int, default=6, help="of each optimizer, from the front of its list")
    parser.add_argument("--minutes", type=float, default=9.6, help="of each run; the last evaluation comes on top")
    parser.add_argument("--settings", type=Path, help='JSON: {"adamw": [["optim.lr=2e-3"], ...], "muon": [...]}')
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "tune_optimizers.json")
    args = parser.parse_args()
    settings = json.loads(args.settings.read_text()) if args.settings else SETTINGS
    for optimizer in OPTIMIZERS:
        if len(settings[optimizer]) < args.runs:
            raise SystemExit(f"{args.runs} runs of each, but {optimizer} has {len(settings[optimizer])} settings")

    arguments = {"files": [file.name for file in args.files], "minutes": args.minutes}
    runs: list[dict[str, Any]] = []
    if args.out.exists():
        earlier = json.loads(args.out.read_text())
        if not is_same(earlier, arguments):
            raise SystemExit(f"{args.out} holds runs of {earlier['minutes']} minutes on {earlier['files']}; name another --out")
        runs = earlier["runs"]
    for index in range(args.runs):
        for optimizer in OPTIMIZERS:
            setting = {"optimizer": optimizer, "overrides": settings[optimizer][index]}
            if any(is_same(run, setting) for run in runs):
                continue
            print(f"{optimizer} {' '.join(setting['overrides'])}", file=sys.stderr, flush=True)
            result = train(args.files, [f"optim.type={optimizer}", *setting["overrides"], f"max_minutes={args.minutes}"])
            runs.append({**setting, **{key: result[key] for key in KEPT}})
            args.out.write_text(json.dumps(summary(arguments, runs), indent=2) + "\n")
    print(json.dumps(summary(arguments, runs), indent=2))


if __name__ == "__main__":
    main()
