"""What GRPO gains on the clinic, against controls and with each of its enhancements on or off, over several seeds.

    python benchmarks/grpo_evidence.py FOLDER [--seeds 0 1 2] [--arms NAME ...] [--steps 84] [--report] [--out FILE]

The quickstart's model is pretrained and fine-tuned as far as the checkpoint from which the quickstart's GRPO starts. All arms of
all seeds start there; the seed is that of the questions and of the sampling. An arm is an ordinary run, then an exam in writing
on each split, paired question by question with the exam of that start and of the other arms. FOLDER keeps the answers of every
arm that is finished: started again, the script goes on with those that are missing, and ``--report`` only prints what there is.
Prints one JSON object.

The supervised arm trains on as many tokens as the arm ``grpo`` of its seed would have learned from without having to draw them:
in each step the tokens per second of its update, times the seconds of the whole step. That is equal time, whatever else the
machine does. (The clock says nothing on a busy machine, and the same step of GRPO took 2.4 and 5.2 CPU seconds.) Neither is
compiled.

Intervals of 95 %: for one seed those of ``osler compare``, clustered by the fact that a question asks for. Over seeds the
differences of seeds and of facts are both drawn again with replacement (a bootstrap of ``DRAWS`` draws), because a pool that took
the seeds for given would only speak of these very runs. With few seeds a bootstrap makes too little of their spread, so the gain
of each seed stands beside it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from measuring import publish

from osler.checkpoint.folders import folder_name
from osler.config.recipe import load_recipe
from osler.config.schema import decode
from osler.eval.config import EXAM_SEED
from osler.eval.exams import greedy, score_by_generation
from osler.eval.score import paired_difference
from osler.inference.engine import InferenceEngine
from osler.inference.load import load_model
from osler.pipeline.config import decode_pipeline
from osler.pipeline.run import Pipeline
from osler.records.jsonl import read_metrics
from osler.rl.config import GrpoConfig
from osler.rl.run import train as train_grpo
from osler.runs.folder import taken
from osler.runtime.files import RunFolder
from osler.runtime.world import World
from osler.tasks.registry import load_clinic
from osler.train.config import TrainConfig
from osler.train.run import train as train_supervised

CONTROL = "grpo-control/"
EARLY = "grpo_early"  # the arm "grpo" after a third of its steps, with which the shorter arms are compared
THIRD = 1 / 3
SPEED = "perf/train_tokens_per_second"
BETA = "algorithm.beta=0.02"
FOUR = "algorithm.updates_per_batch=4"


class Arm(NamedTuple):
    """A recipe and what is changed in it; ``share`` of the steps of the longest arms is trained."""

    recipe: str
    changes: Sequence[str] = ()
    share: float = THIRD


ARMS = {
    "grpo": Arm("correct", share=1.0),
    "supervised": Arm("supervised", share=1.0),
    EARLY: Arm("correct"),  # nothing is trained for it
    "random": Arm("random"),
    "format": Arm("format"),
    "kl_unbiased": Arm("correct", [BETA]),
    "kl_k3": Arm("correct", [BETA, "algorithm.kl=k3"]),
    "no_quality_filter": Arm("correct", ['algorithm.quality.action="off"']),
    "dynamic_sampling": Arm("correct", ["algorithm.dynamic_sampling=true"]),
    "four_updates": Arm("correct", [FOUR], share=1 / 6),
    "four_updates_masked": Arm("correct", [FOUR, "algorithm.opsm_delta=0.02"], share=1 / 6),
}
# GRPO starts in the first tenth of the quickstart's fine-tuning, so no more of it is trained, at its first learning rate
START_ACCURACY = 0.68  # of the start on the validation splits, as in the quickstart
SHORT_SFT = ["sft.total_tokens=614400", "sft.schedule.type=constant"]
START = "start"
# first arm against the second, beside every arm against its start
COMPARED = (
    *(("grpo", other) for other in ("supervised", "supervised, no reasoning")),
    *((EARLY, other) for other in ("random", "format", "no_quality_filter")),
    *((other, EARLY) for other in ("kl_unbiased", "dynamic_sampling", "four_updates")),
    ("kl_unbiased", "kl_k3"),
    ("four_updates_masked", "four_updates"),
)
SPLITS, ITEMS = ("new_findings", "new_questions"), 500
MEASURED = (  # mean over the steps of the run
    "reward", "groups/effective", "entropy", "kl", "opsm/masked_frac", "clip_ratio/high_mean", "completions/clipped_ratio",
    "filters/no_answer_frac", "filters/degenerate_frac", "filters/empty_frac",
)  # fmt: skip
DRAWS = 10_000


def start_of(folder: Path) -> Path:
    """The supervised checkpoint that the quickstart's GRPO starts from; its runs go on where they were interrupted."""
    config = decode_pipeline(load_recipe("quickstart", SHORT_SFT))
    pipeline = Pipeline(config, RunFolder(folder), World())
    for name in ("pretrain", "sft"):
        if not pipeline.train(name, config.stages[name]):
            raise SystemExit("stopped; the same command goes on")
    return pipeline.nearest("sft", START_ACCURACY)


def train(arm: Arm, start: Path, seed: int, folder: Path, steps: int, tokens: int) -> dict[str, Any]:
    """Train one arm, a supervised one on so many ``tokens``; what it cost and what was measured on the way."""
    changes, begun = [f"init_from={start}", f"seed={seed}", *arm.changes], time.process_time()
    with taken(run := RunFolder.create(folder)):
        if arm.recipe == "supervised":
            changes += [f"total_tokens={tokens}", f"checkpoint.every_tokens={tokens}", "compile=never", f"data.seed={seed}"]
            ended = train_supervised(decode(TrainConfig, load_recipe(CONTROL + arm.recipe, changes)), run)
        else:
            changes += [f"steps={round(steps * arm.share)}", f"checkpoint.every_steps={round(steps * THIRD)}"]
            changes += ["checkpoint.keep_last=9", "eval_task=null"]
            ended = train_grpo(decode(GrpoConfig, load_recipe(CONTROL + arm.recipe, changes)), run)
    if not ended:
        raise SystemExit("stopped; the same command begins this arm again")
    lines = [line.values for line in read_metrics(run.metrics)]
    found = {name: [line[name] for line in lines if name in line] for name in MEASURED}
    means = {name: statistics.fmean(values) for name, values in found.items() if values}
    in_its_time = sum(line[SPEED] * line["perf/step_seconds"] for line in lines if SPEED in line)
    return {"cpu_seconds": time.process_time() - begun, "tokens_in_its_time": round(in_its_time), "means": means}


def examine(checkpoint: Path, done: Path, found: dict[str, Any]) -> None:
    """Let a checkpoint sit the exam; write what was found before, and the answers: a 1 for a right one, a 0 for any other."""
    loaded = load_model(checkpoint)
    engine = InferenceEngine(loaded.model, dtype=torch.float32)
    # What was trained without reasoning is also asked for answers alone.
    forms = {"": True, ", no reasoning": False} if done.stem in (START, "supervised") else {"": True}
    found["answers"] = {form: {} for form in forms}
    for form, split in itertools.product(forms, SPLITS):
        asked = load_clinic(split=split, limit=ITEMS, seed=EXAM_SEED)
        score = score_by_generation(engine, loaded.tokenizer, asked, greedy(64), reasoning=forms[form])
        found["answers"][form][split] = "".join(str(int(result.right)) for result in score.results)
        print(f"{done}{form}: {split} {score.accuracy:.1%}", file=sys.stderr, flush=True)
    done.write_text(json.dumps(found))


def run_seed(seed: int, arms: Sequence[str], folder: Path, steps: int) -> None:
    """Make what is missing of the start and of a seed's arms; the answers of each go into a file of its own."""
    start, own = start_of(folder / "stages"), RunFolder.create(folder / f"seed-{seed}").root
    if not (done := folder / f"{START}.json").exists():
        examine(start, done, {})
    for arm in arms:
        run, done, grpo = own / arm, own / f"{arm}.json", own / "grpo.json"
        if done.exists():
            continue
        if arm in ("supervised", EARLY) and not grpo.exists():
            raise SystemExit(f"the arm {arm} is measured by the arm grpo, which must come before it")
        if arm == EARLY:
            examine(RunFolder(own / "grpo").checkpoints / folder_name(round(steps * THIRD)), done, {})
            continue
        shutil.rmtree(run, ignore_errors=True)  # of an arm that was interrupted
        tokens = json.loads(grpo.read_text())["tokens_in_its_time"] if arm == "supervised" else 0
        examine(run, done, train(ARMS[arm], start, seed, run, steps, tokens))


def gain(before: Sequence[np.ndarray], after: Sequence[np.ndarray], clusters: Sequence[str]) -> dict[str, Any]:
    """The gain of each seed with its interval, and of all seeds together."""
    facts = sorted(set(clusters))
    member = np.array([[cluster == fact for fact in facts] for cluster in clusters], dtype=float)
    by_fact = np.array([(late - early) @ member for early, late in zip(before, after, strict=True)])  # [seeds, facts]
    random, seeds = np.random.default_rng(0), len(by_fact)
    drawn_facts = random.multinomial(len(facts), np.full(len(facts), 1 / len(facts)), DRAWS)  # how often each is drawn
    drawn_seeds = random.multinomial(seeds, np.full(seeds, 1 / seeds), DRAWS)
    draws = np.einsum("ds,sf,df->d", drawn_seeds, by_fact, drawn_facts) / seeds / (drawn_facts @ member.sum(axis=0))
    of_seeds = [paired_difference(early.tolist(), late.tolist(), clusters) for early, late in zip(before, after, strict=True)]
    return {
        "gain": statistics.fmean(one.mean for one in of_seeds),
        "interval": np.quantile(draws, [0.025, 0.975]).tolist(),
        "before": float(np.mean(before)),
        "after": float(np.mean(after)),
        "seeds": [{"gain": one.mean, "interval": one.interval} for one in of_seeds],
    }


def compared(found: Mapping[int, Mapping[str, dict[str, str]]]) -> list[dict[str, Any]]:
    """Every arm against its start, and the pairs of ``COMPARED``, over the seeds that have both."""
    names = dict.fromkeys(name for of_seed in found.values() for name in of_seed)
    plain = [(name, START) for name in names if not name.startswith(START)]
    rows = []
    for arm, against in (*plain, *COMPARED):
        both = {seed: of_seed for seed, of_seed in found.items() if {arm, against} <= of_seed.keys()}
        for split in SPLITS if both else ():
            clusters = [item.cluster for item in load_clinic(split=split, limit=ITEMS, seed=EXAM_SEED)]
            pair = (against, arm)
            before, after = ([np.array(list(own[name][split]), dtype=float) for own in both.values()] for name in pair)
            rows.append({"arm": arm, "against": against, "split": split, "of": list(both), **gain(before, after, clusters)})
    return rows


def report(folder: Path) -> dict[str, Any]:
    """What the arms that are finished show; the arms that are missing are named."""
    seeds = sorted(int(path.name.removeprefix("seed-")) for path in folder.glob("seed-*"))
    files = {seed: {arm: folder / f"seed-{seed}" / f"{arm}.json" for arm in ARMS} for seed in seeds}
    files = {seed: {START: folder / f"{START}.json", **own} for seed, own in files.items()}
    loaded = {
        seed: {arm: json.loads(file.read_text()) for arm, file in own.items() if file.exists()} for seed, own in files.items()
    }
    found = {
        seed: {arm + form: answers for arm, one in arms.items() for form, answers in one["answers"].items()}
        for seed, arms in loaded.items()
    }
    return {
        "benchmark": "grpo_evidence",
        "items": ITEMS,
        "missing": [f"{arm} of seed {seed}" for seed, arms in loaded.items() for arm in ARMS if arm not in arms],
        "arms": {name: arm._asdict() for name, arm in ARMS.items()},
        "compared": compared(found),
        "runs": [
            {"seed": seed, "arm": arm, **{name: value for name, value in one.items() if name != "answers"}}
            for seed, arms in loaded.items()
            for arm, one in arms.items()
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, default=84, help="of the longest arms; the others have a third or a sixth of them")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    for seed in [] if args.report else args.seeds:
        run_seed(seed, args.arms, args.folder, args.steps)
    publish({"threads": torch.get_num_threads(), "steps": args.steps, **report(args.folder)}, args.out)


if __name__ == "__main__":
    main()
