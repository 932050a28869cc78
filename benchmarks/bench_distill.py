"""A small model with and without a teacher at equal tokens on the clinic: held-out loss, exam, and their paired differences.

    python benchmarks/bench_distill.py --teachers runs/quickstart --out FILE [--seeds 0 1 2]

Of each seed a student is pretrained on text (`distill/pretrain`) and fine-tuned from there (`distill/sft`), twice: on the tokens
alone, and beside the quickstart's model of the same stage as its teacher, with the same rows in the same order. A seed is that of
weights and order; all seeds share the teachers and the text. Both arms sit the exam of `osler eval` on the two test splits.
Writes one JSON object after every seed. The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from measuring import in_fresh_python, publish

from osler.eval.config import EXAM_SEED
from osler.eval.exams import greedy, score_by_generation
from osler.eval.score import ScoredExam, compare
from osler.inference.engine import InferenceEngine
from osler.inference.load import load_model
from osler.records.jsonl import read_metrics
from osler.runtime.files import RunFolder
from osler.tasks.registry import load_clinic

SPLITS = ("new_findings", "new_questions")
ARMS = ("plain", "distilled")
WEIGHT = "teacher.weight=0.9"
# Student's t, two-sided 95 %, by degrees of freedom from 1 on
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def examine(run: Path, items: int) -> dict[str, ScoredExam]:
    ready = load_model(run)
    engine = InferenceEngine(ready.model)
    exams = {split: load_clinic(split=split, limit=items, seed=EXAM_SEED) for split in SPLITS}
    return {split: score_by_generation(engine, ready.tokenizer, exam, greedy(64)) for split, exam in exams.items()}


def train(command: list[str], run: Path, shards: Path) -> None:
    """Train a run or go on with it. The first prepares the shards for those after it."""
    is_own = shards.exists() and shards.resolve() == (run / "data").resolve()
    prepared = ["data.type=prepared", f"data.path={shards}"] if shards.exists() and not is_own else []
    in_fresh_python(["-m", "osler.cli", *command, *prepared, "--run", str(run)])
    if not shards.exists():
        shards.symlink_to(run / "data")


def one_seed(seed: int, folder: Path, teachers: Path, items: int, overrides: list[str]) -> dict[str, Any]:
    """Train the students of both arms; return what became of them."""
    common = [f"seed={seed}", *(field for field in overrides if not field.startswith("teacher."))]
    weight = [WEIGHT, *(field for field in overrides if field.startswith("teacher."))]
    tokenizer = f"tokenizer.path={teachers / 'pretrain' / 'tokenizer.json'}"
    arms, scores = {}, {}
    for arm in ARMS:
        student, run = folder / f"{seed}-{arm}-pretrain", folder / f"{seed}-{arm}"
        beside = {stage: [f"teacher.path={teachers / stage}", *weight] for stage in ("pretrain", "sft")}
        beside = beside if arm == "distilled" else {stage: ["teacher=null"] for stage in beside}
        train(["pretrain", "distill/pretrain", tokenizer, *beside["pretrain"], *common], student, folder / "text")
        train(["sft", "distill/sft", f"init_from={student}", *beside["sft"], *common], run, folder / "questions")
        *_, last = read_metrics(RunFolder(run).metrics, having="eval/loss")
        scores[arm] = examine(run, items)
        told = {split: {"accuracy": score.accuracy, "interval": score.interval} for split, score in scores[arm].items()}
        arms[arm] = {"held_out_loss": last.values["eval/loss"], "exam": told}
        print(json.dumps({"seed": seed, "arm": arm, **arms[arm]}), file=sys.stderr, flush=True)
    gains = {split: compare(scores["plain"][split], scores["distilled"][split]) for split in SPLITS}
    return {
        "seed": seed,
        **arms,
        "loss_difference": arms["distilled"]["held_out_loss"] - arms["plain"]["held_out_loss"],
        "exam_difference": {split: {"difference": gain.mean, "interval": gain.interval} for split, gain in gains.items()},
    }


def over_seeds(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean differences over the seeds, with 95 % intervals.

    That of the loss is Student's, of the seeds' paired differences. All seeds sit the same exam, so that of an accuracy is the
    mean of the seeds' intervals, which is never too narrow (see ``quickstart_seeds.py``); beside it is Student's over the seeds.
    """
    exams = {}
    for split in SPLITS:
        found = [row["exam_difference"][split] for row in rows]
        over_items = [statistics.mean(one["interval"][end] for one in found) for end in (0, 1)]
        exams[split] = {**with_interval([one["difference"] for one in found]), "mean_interval_over_items": over_items}
    return {"loss_difference": with_interval([row["loss_difference"] for row in rows]), "exam_difference": exams}


def with_interval(values: list[float]) -> dict[str, Any]:
    mean, freedom = statistics.mean(values), len(values) - 1
    if not freedom:
        return {"mean": mean}
    half = T_95[freedom - 1] * statistics.stdev(values) / len(values) ** 0.5
    return {"mean": mean, "interval_over_seeds": [mean - half, mean + half]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", type=Path, required=True, help="the quickstart's folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--items", type=int, default=500, help="questions of each split (default: 500)")
    parser.add_argument("--runs", type=Path, default=Path("runs/bench-distill"), help="where runs are kept and gone on with")
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="fields of all runs; teacher.* of the distilled")
    args = parser.parse_args()
    if len(set(args.seeds)) < len(args.seeds) or len(args.seeds) > len(T_95) + 1:
        parser.error(f"--seeds: give each seed once, and at most {len(T_95) + 1}")
    taught = {split: score.accuracy for split, score in examine(args.teachers / "sft", args.items).items()}
    rows: list[dict[str, Any]] = []
    args.runs.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        rows.append(one_seed(seed, args.runs.absolute(), args.teachers.absolute(), args.items, args.overrides))
        result = {"benchmark": "distill", "overrides": args.overrides, "teacher_accuracy": taught, **over_seeds(rows)}
        publish({**result, "seeds": rows}, args.out)


if __name__ == "__main__":
    main()
