"""The quickstart over several seeds, cold: minutes, exam accuracies after the supervised stages, and what GRPO gains.

    python benchmarks/quickstart_seeds.py [--seeds 0 1 2] [--out FILE]

Every seed is a fresh process with an empty compiler cache, so compilation counts. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import in_fresh_python, publish


def one_seed(seed: int, folder: Path) -> dict[str, Any]:
    """Run the quickstart with one seed and read what it left."""
    run = folder / f"seed-{seed}"
    command = ["-m", "osler.cli", "quickstart", "--run", str(run), f"seed={seed}"]
    started = time.monotonic()
    in_fresh_python(command, TORCHINDUCTOR_CACHE_DIR=str(folder / f"cache-{seed}"))
    seconds = time.monotonic() - started
    exams, comparison = (json.loads((run / name).read_text()) for name in ("exams.json", "comparison.json"))
    return {
        "seed": seed,
        "minutes": seconds / 60,
        "stages": {stage["name"]: stage["seconds"] for stage in json.loads((run / "stages.json").read_text())},
        "supervised": {
            split: {name: score[name] for name in ("accuracy", "interval", "n")} for split, score in exams["sft"].items()
        },
        "grpo": {row["split"]: {name: row[name] for name in ("before", "after", "difference", "interval")} for row in comparison},
    }


def mean_gain(gains: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of the seeds' differences, with the mean of their intervals around it.

    All seeds sit the same exam, so their errors are not independent. A mean of estimates varies as much as they do on average if
    their errors are wholly correlated, and less otherwise: this interval is never too narrow.
    """
    return {
        "difference": statistics.mean(gain["difference"] for gain in gains),
        "interval": [statistics.mean(gain["interval"][end] for gain in gains) for end in (0, 1)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for seed in args.seeds:
            rows.append(one_seed(seed, Path(folder)))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    splits = list(rows[0]["supervised"])
    result = {
        "benchmark": "quickstart",
        "mean_minutes": statistics.mean(row["minutes"] for row in rows),
        "mean_supervised_accuracy": {s: statistics.mean(row["supervised"][s]["accuracy"] for row in rows) for s in splits},
        "mean_grpo_gain": {split: mean_gain([row["grpo"][split] for row in rows]) for split in splits},
        "seeds": rows,
    }
    publish(result, args.out)


if __name__ == "__main__":
    main()
