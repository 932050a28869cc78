"""The recipes textbooks/medqa, gsm8k and pubmedqa from beginning to end: the score on held-out questions, and how GRPO went.

    python benchmarks/real_questions.py FOLDER [--recipes textbooks/medqa] [--fields grpo.steps=20] [--runs RUNS] [--out FILE]

FOLDER has ``text/`` and ``exams/``, as the recipes name the files in them. A pipeline that was stopped is gone on with; the
minutes are those of its stages. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from measuring import in_fresh_python, publish

RECIPES = ("textbooks/medqa", "textbooks/gsm8k", "textbooks/pubmedqa")
OF_A_SCORE = (
    "accuracy", "interval", "n", "presentations", "chance", "constant_letter", "constant_letter_baseline", "letters", "unparsed",
    "cut", "too_long", "measures",
)  # fmt: skip
OF_GRPO = ("reward", "frac_reward_zero_std", "answer/format_ok", "answer/correct_frac", "completions/clipped_ratio", "entropy")


def one_recipe(recipe: str, folder: Path, runs: Path, fields: list[str]) -> dict[str, Any]:
    """Carry out one pipeline and read what it left."""
    run = runs / recipe.replace("/", "-")
    in_fresh_python(["-m", "osler.cli", "pipeline", recipe, f"root={folder}", *fields, "--run", str(run)])
    stages = {stage["name"]: stage["seconds"] for stage in json.loads((run / "stages.json").read_text())}
    exams = json.loads((run / "exams.json").read_text())
    return {
        "recipe": recipe,
        "fields": fields,
        "minutes": sum(stages.values()) / 60,
        "stage_seconds": stages,
        "tokens": {name: lines(run / name)[-1].get("tokens") for name in ("pretrain", "sft")},
        "scores": {
            label: {split: {key: score.get(key) for key in OF_A_SCORE} for split, score in of.items()}
            for label, of in exams.items()
        },
        "grpo_minus_sft": json.loads((run / "comparison.json").read_text()),
        "grpo": course_of(lines(run / "grpo")),
    }


def lines(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def course_of(logged: list[dict[str, Any]]) -> dict[str, Any]:
    """The means of GRPO's metrics over the first and the last quarter of its steps, and its exams on the way."""
    letters = sorted({key for line in logged for key in line if key.startswith("answer/letter_")})
    steps = [line for line in logged if "reward" in line]
    quarter = max(1, len(steps) // 4)

    def means(some: list[dict[str, Any]]) -> dict[str, float]:
        known = {key: [line[key] for line in some if isinstance(line.get(key), (int, float))] for key in (*OF_GRPO, *letters)}
        return {key: math.fsum(values) / len(values) for key, values in known.items() if values}

    exams = [{key: line[key] for key in line if key == "step" or "_accuracy" in key} for line in logged]
    return {
        "first_quarter": means(steps[:quarter]),
        "last_quarter": means(steps[-quarter:]),
        "exams": [exam for exam in exams if len(exam) > 1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--fields", nargs="*", default=[], help="fields of the recipes to change, as key.path=value")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the run folders are written (default: runs)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    rows = [one_recipe(recipe, args.folder.resolve(), args.runs, args.fields) for recipe in args.recipes]
    publish({"benchmark": "real_questions", "pipelines": rows}, args.out)


if __name__ == "__main__":
    main()
