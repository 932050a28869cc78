"""A small model that learned to find a needle in histories of up to 512 tokens, examined by length and depth far beyond them.

    python benchmarks/bench_needle.py --runs DIR --out FILE [--tokens N] [key.path=value ...]

The quickstart's pretraining, with room for 2,048 tokens, is followed by fine-tuning on histories of other seeds, at all depths,
and by `osler eval --needle`. Fields that are given change both runs, so that two kinds of attention can be compared by two calls
and `osler compare` of their fine-tuned runs. The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from measuring import in_fresh_python, publish

from osler.config.recipe import dump_yaml, load_recipe
from osler.inference.load import load_model
from osler.runtime.files import read_json
from osler.tasks.item import bare, render_answer, render_question
from osler.tasks.needle import load_needle
from osler.tasks.registry import NeedleTask

LENGTHS, DEPTHS = (256, 384, 512), (0, 25, 50, 75, 100)  # that are learned
EXAMINED = (256, 512, 1024, 2048)
LEARNED_SEED = 100_000  # of the first cell's cases; `osler eval` asks those of another seed


def write_rows(path: Path, pretrained: Path, count: int) -> None:
    """Write ``count`` histories with their answers, as many of each split, length and depth."""
    context = load_model(pretrained).context()
    cells = [(length, depth) for length in LENGTHS for depth in DEPTHS]
    each = count // (2 * len(cells))
    items = []
    for number, cell in enumerate(cells):
        items += load_needle(NeedleTask(lengths=cell[:1], depths=cell[1:], limit=each, seed=LEARNED_SEED + number), context)
    random.Random(0).shuffle(items)
    rows = [{"question": render_question(item), "answer": render_answer(item)} for item in map(bare, items)]  # as cloze asks
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8000, help="histories that are learned (default: 8,000)")
    parser.add_argument("--tokens", type=int, default=6_144_000, help="of fine-tuning (default: 6,144,000)")
    parser.add_argument("--items", type=int, default=40, help="questions of each split, length and depth (default: 40)")
    parser.add_argument("--runs", type=Path, default=Path("runs/bench-needle"), help="where runs are kept and gone on with")
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="fields of both runs")
    args = parser.parse_args()
    folder = args.runs.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    pretrained, tuned, rows = folder / "pretrain", folder / "sft", folder / "histories.jsonl"
    recipe = {**load_recipe("quickstart")["pretrain"], "description": "the quickstart's, with a longer context"}
    (folder / "pretrain.yaml").write_text(dump_yaml(recipe), encoding="utf-8")
    longer = f"model.max_seq_len={EXAMINED[-1]}"
    osler = ["-m", "osler.cli"]
    in_fresh_python([*osler, "pretrain", str(folder / "pretrain.yaml"), longer, *args.overrides, "--run", str(pretrained)])
    if not rows.exists():
        write_rows(rows, pretrained, args.rows)
    fields = [
        f"init_from={pretrained}", "data.type=turns", f"data.path={rows}", f"seq_len={LENGTHS[-1]}", "batch_tokens=8192",
        f"total_tokens={args.tokens}", "optim.lr=2.5e-3", "schedule.type=linear", "schedule.warmup_tokens=81920",
        "checkpoint.every_tokens=2048000", "eval_every_tokens=2048000",
    ]  # fmt: skip
    in_fresh_python([*osler, "sft", *fields, *args.overrides, "--run", str(tuned)])
    test = ["--needle", f"task.lengths={list(EXAMINED)}", f"task.limit={args.items}", "--json", str(folder / "scores.json")]
    in_fresh_python([*osler, "eval", str(tuned), *test])
    kept = ("split", "method", "n", "accuracy", "interval", "chance", "groups")
    scores = [{name: one[name] for name in kept} for one in read_json(folder / "scores.json")["scores"]]
    publish({"benchmark": "needle", "learned_lengths": LENGTHS, "overrides": args.overrides, "scores": scores}, args.out)


if __name__ == "__main__":
    main()
