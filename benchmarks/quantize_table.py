"""What a model loses by being quantised or pruned, and what healing brings back: size, held-out text, exam, speed.

    python benchmarks/quantize_table.py RUN --out FILE [--layers 3] [--intermediate-size 256] [--heal total_tokens=400000]

Of RUN's newest checkpoint `osler quantize` makes bf16, int8 and int4, `osler prune` a model with fewer layers and one with
narrower feed-forward layers, and the command that `osler prune` prints heals both beside the original. Measured of each: bytes of
the weights on the disk; bits per byte of what RUN holds out (of fine-tuning: of thinking and answers alone); the exam, with its
difference from the original's, paired question by question; tokens per second that 64 rows and one row draw (fastest of
``--rounds``, all variants in turn). The clinic's questions are examined unless ``--exam`` names another. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import sys
import time
from math import log
from pathlib import Path
from typing import Any

from measuring import in_fresh_python, publish

from osler import api
from osler.eval.likelihood import measure
from osler.eval.score import ScoredExam, compare
from osler.export.prune import healing, texts
from osler.inference.engine import InferenceEngine
from osler.inference.load import LoadedModel
from osler.ops.labels import IGNORED

ROWS, NEW_TOKENS = (64, 1), 128


def osler(*words: object) -> None:
    print("osler", *words, file=sys.stderr, flush=True)
    in_fresh_python(["-m", "osler.cli", *map(str, words)])


def make_variants(run: Path, folder: Path, args: argparse.Namespace) -> dict[str, Path]:
    """Make what is not there yet; return the run folder of each variant."""
    variants = {"original": run}
    for to in ("bf16", "int8", "int4"):
        variants[to] = folder / to
        if not variants[to].exists():
            osler("quantize", run, "--to", to, "--out", variants[to])
    ready = api.load(run)
    for name, flag, size in (("depth", "--layers", args.layers), ("width", "--intermediate-size", args.intermediate_size)):
        variants[f"{name} {size}"] = pruned = folder / f"{name}-{size}"
        if not pruned.exists():
            osler("prune", run, flag, size, "--out", pruned)
        variants[f"{name} {size}, healed"] = pruned.with_name(f"{pruned.name}-healed")
        osler(*healing(ready, pruned.as_posix()).split()[1:], *args.heal)  # goes on, or is finished
    return variants


def bits_per_byte(ready: LoadedModel, of: LoadedModel, text: str | None) -> float:
    """Bits per byte of the tokens that are scored in a text, or in what the run of another model holds out."""
    found = texts(of, text, "text", sys.maxsize)
    written = 0
    for _, labels, *_ in found:
        for row in labels.tolist():
            ids = [token for token in row if token != IGNORED]
            written += len(ready.tokenizer.decode(ids, skip_special=True).encode())
    return measure(ready.model, found, written).nats / log(2) / written


def tokens_per_second(ready: LoadedModel, rows: int) -> float:
    engine, sampling = InferenceEngine(ready.model), api.SamplingParams(max_new_tokens=NEW_TOKENS)
    started = time.perf_counter()
    engine.generate([[ready.tokenizer.eos_id, 1 + row] for row in range(rows)], sampling)
    return rows * NEW_TOKENS / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--intermediate-size", type=int, default=256)
    parser.add_argument("--heal", nargs="*", default=[], metavar="key.path=value", help="fields of the healing runs")
    parser.add_argument("--text", help="text to measure instead of what the run holds out")
    parser.add_argument("--exam", default="clinic", help="as `osler eval` takes it in task= (default: clinic)")
    parser.add_argument("--subset", type=int, help="so many questions of each part")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/quantize-table"), help="where variants are kept")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    models = {name: api.load(path) for name, path in make_variants(args.run, args.runs, args).items()}
    settings = {} if args.subset is None else {"subset": args.subset}
    scores: dict[str, dict[str, ScoredExam]] = {}
    table: dict[str, dict[str, Any]] = {}
    for name, ready in models.items():
        scores[name] = {score.split: score for score in api.score(ready, args.exam, **settings)}
        table[name] = {
            "parameters": ready.model.config.num_parameters,
            "bytes": (ready.path / "model.safetensors").stat().st_size,
            "bits_per_byte": bits_per_byte(ready, models["original"], args.text),
            "exam": {
                split: {"accuracy": score.accuracy, "interval": score.interval, "n": score.n, "unparsed": score.unparsed}
                for split, score in scores[name].items()
            },
        }
        if name != "original":
            gains = {split: compare(scores["original"][split], score) for split, score in scores[name].items()}
            table[name]["difference"] = {split: {"mean": gain.mean, "interval": gain.interval} for split, gain in gains.items()}
        print(name, table[name], file=sys.stderr, flush=True)
    for rows in ROWS:
        for _ in range(args.rounds):
            for name, ready in models.items():
                speed = f"tokens_per_second_{rows}_rows"
                table[name][speed] = max(table[name].get(speed, 0.0), tokens_per_second(ready, rows))
    publish({"benchmark": "quantize_table", "run": args.run.name, "heal": args.heal, "variants": table}, args.out)


if __name__ == "__main__":
    main()
