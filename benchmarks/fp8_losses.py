"""Does FP8 learn as bf16 does: the losses of the same run under both precisions, step by step.

    python benchmarks/fp8_losses.py [--steps 200] [--device cpu] [--recipe RECIPE] [--out FILE] [key.path=value ...]

Two ordinary ``osler pretrain`` runs, each in a fresh process, that differ in ``precision`` only: the same seed, hence the same
initial weights and the same batches. The default is the clinic's model of four layers of width 128. On a CPU FP8 is emulated. The
gap of a step is |loss in FP8 / loss in bf16 - 1|; the target is that no step of 200 has more than 2 %.
"""

from __future__ import annotations

import argparse
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from measuring import in_fresh_python, publish

TARGET = 0.02


def losses(precision: str, args: argparse.Namespace, batch_tokens: int, folder: Path) -> list[float]:
    """Train in ``folder`` and return the loss of every step."""
    total = args.steps * batch_tokens
    fixed = {
        "precision": precision,
        "device": args.device,
        "batch_tokens": batch_tokens,
        "total_tokens": total,
        "schedule.warmup_tokens": total // 10,
        "log_every_steps": 1,
        "eval_every_tokens": total,
        "checkpoint": {"every_tokens": total},
        "compile": "always",
    }
    options = [*(f"{key}={value}" for key, value in fixed.items()), *args.overrides, "--run", str(folder)]
    in_fresh_python(["-m", "osler.cli", "pretrain", *([args.recipe] if args.recipe else []), *options])
    from osler.records.jsonl import read_metrics

    return [line.values["train/loss"] for line in read_metrics(folder / "metrics.jsonl", having="train/loss")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="key.path=value for both runs")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--recipe")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()

    import torch

    with tempfile.TemporaryDirectory() as folder:
        bf16, fp8 = (losses(name, args, args.batch_tokens, Path(folder) / name) for name in ("bf16", "fp8"))
    gaps = [abs(a / b - 1) for a, b in zip(fp8, bf16, strict=True)]
    result: dict[str, Any] = {
        "benchmark": "fp8_losses",
        "recipe": args.recipe,
        "overrides": args.overrides,
        "steps": len(gaps),
        "batch_tokens": args.batch_tokens,
        "emulated": args.device == "cpu",
        "device": args.device if args.device == "cpu" else torch.cuda.get_device_name(args.device),
        "torchao": version("torchao"),
        "largest_gap": max(gaps),
        "mean_gap": sum(gaps) / len(gaps),
        "within_target": max(gaps) <= TARGET,
        "last_loss": {"bf16": bf16[-1], "fp8": fp8[-1]},
        "losses": {"bf16": bf16, "fp8": fp8},
    }
    publish(result, args.out)


if __name__ == "__main__":
    main()
