"""The whole pipeline, one stage after another: ``osler quickstart``.

    textbook ─► tokenizer ─► pretrain ─► sft (reasoning) ─► exam ─► GRPO from an earlier checkpoint ─► exam ─► report

Each stage is an ordinary run in its own folder, made by the functions of the single commands. The same command always
continues: it skips the finished stages and resumes an interrupted stage from its checkpoint.

GRPO starts from an *earlier* checkpoint because demonstrations alone almost solve this exam. The checkpoint is chosen on a
validation split; the test splits play no part. The report says what this proves and what it does not prove (``NOTES``).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from osler.checkpoint.folders import folder_name, refuse_checkpoint, verify
from osler.config.recipe import dump_yaml, load_recipe
from osler.config.schema import decode, encode
from osler.data.config import ClinicData
from osler.eval.config import EXAM_SEED
from osler.eval.exams import greedy, score_by_generation
from osler.eval.score import ScoredExam, compare
from osler.inference.engine import InferenceEngine
from osler.inference.load import load_model
from osler.monitor.logger import check_trackers
from osler.quickstart.config import QuickstartConfig
from osler.records import jsonl
from osler.records.jsonl import read_metrics
from osler.records.results import Comparison, FinishedStage, add_exams
from osler.records.values import read_records
from osler.report.page import build_report
from osler.report.words import summary_text
from osler.rl.run import train as train_grpo
from osler.runs.config import RunConfig
from osler.runs.folder import claim, read_config, stored_config, taken
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder, write_json
from osler.runtime.stop import EXIT_STOPPED
from osler.runtime.world import require_one_process
from osler.tasks.registry import load_clinic
from osler.train.config import TrainConfig
from osler.train.run import train as train_supervised

logger = logging.getLogger(__name__)

SAMPLES_SHOWN = 6
EARLIER = "sft, earlier checkpoint"  # the label of the checkpoint that GRPO starts from
NOTES = (
    "The clinic is a synthetic world for testing training code. It is not medical advice.",
    "New findings: the fact was in the training exam, this combination of findings was not. New questions: the fact stood in the "
    "textbook only and was never asked in training. Chance is 25 %.",
    "GRPO starts from an earlier, weaker checkpoint chosen on a validation split, because the finished supervised model leaves "
    "little to gain. Where one has demonstrations, as here, more supervised training is the cheaper way to the same score; GRPO "
    "is for where only the right answer is known.",
)


def run(
    overrides: Sequence[str] = (),
    *,
    run_dir: str | None = None,
    resume: bool = False,
    dry_run: bool = False,
) -> int:
    """Run the command ``quickstart``. The same call continues a run that stopped; ``resume`` uses the config stored in it."""
    require_one_process("quickstart")
    root = RunFolder(Path(run_dir or "runs/quickstart"))
    refuse_checkpoint(root.root)
    if resume:
        config = stored_config(QuickstartConfig, str(root.root), overrides)
    else:
        config = decode(QuickstartConfig, load_recipe("quickstart", overrides), source="quickstart")
    for stage in (config.pretrain, config.sft, config.grpo):
        check_trackers(stage.monitor)
    if dry_run:
        print(dump_yaml(encode(config)).rstrip())
        return 0
    with taken(root):
        return Quickstart(config, root).run_stages()


class Quickstart:
    """One quickstart in its folder."""

    def __init__(self, config: QuickstartConfig, run: RunFolder) -> None:
        self.config, self.run = config, run

    def run_stages(self) -> int:
        """Run every stage that is not finished, then write the report; return the process's exit code."""
        claim(self.run, self.config)
        stages: list[tuple[str, str, Callable[[], bool]]] = [
            ("pretrain", "textbook prose: a tokenizer, then the next token", self.pretrain),
            ("sft", "worked exam questions: reason, then answer", self.sft),
            ("exam sft", "the exam after the supervised stages", self.examine_supervised),
            ("grpo", "own answers, rewarded when right, from an earlier checkpoint", self.grpo),
            ("exam grpo", "the exam before and after GRPO", self.examine_grpo),
        ]
        finished = read_records(FinishedStage, self.run.stages)
        for name, what, work in stages:
            if name in [stage.name for stage in finished]:
                continue
            logger.info(f"── {name}: {what}")
            started = time.monotonic()
            if not work():
                logger.info("Stopped and saved. The same command goes on from there.")
                return EXIT_STOPPED
            finished.append(FinishedStage(name, round(time.monotonic() - started, 1), what))
            write_json(self.run.stages, [asdict(stage) for stage in finished])
        write_json(self.run.root / "notes.json", list(NOTES))
        report = build_report(self.run.root)
        print(summary_text(self.run.root))
        logger.info(f"Report: {report}   (open it in a browser)")
        logger.info(f"Next:   osler chat {self.run.root / 'sft'}   ·   osler pretrain text-10min data.path=FOLDER_OF_TEXT")
        return 0

    def folder(self, name: str) -> RunFolder:
        return RunFolder.create(self.run.root / name)

    def pretrain(self) -> bool:
        return self.train(train_supervised, self.seeded(self.config.pretrain), "pretrain")

    def sft(self) -> bool:
        start = self.started_from("sft") or str(self.run.root / "pretrain")
        return self.train(train_supervised, replace(self.seeded(self.config.sft), init_from=start), "sft")

    def grpo(self) -> bool:
        start = self.started_from("grpo") or str(self.earlier_checkpoint())
        return self.train(train_grpo, replace(self.config.grpo, seed=self.config.seed, init_from=start), "grpo")

    def train(self, train: Callable[[Any, RunFolder], bool], config: RunConfig, name: str) -> bool:
        """Train one stage in its folder; False when the stage was asked to stop."""
        folder = self.folder(name)
        with taken(folder):
            return train(config, folder)

    def started_from(self, name: str) -> str | None:
        """Return the run or checkpoint that a stage was started from, by its config; None for a stage that has not begun.

        The folder of the quickstart may have been moved since then.
        """
        folder = self.folder(name)
        return read_config(folder)["init_from"] if folder.config.exists() else None

    def seeded(self, stage: TrainConfig) -> TrainConfig:
        """Give a stage the quickstart's seed for weights, order and text."""
        data = replace(stage.data, seed=self.config.seed) if isinstance(stage.data, ClinicData) else stage.data
        return replace(stage, seed=self.config.seed, data=data)

    def earlier_checkpoint(self) -> Path:
        """Return the supervised checkpoint whose mean accuracy on the validation splits is nearest to ``start_accuracy``."""
        splits = [f"eval/{split}_accuracy" for split in self.config.sft.exam.splits]
        sft = self.folder("sft")
        tried: dict[Path, float] = {}
        for line in read_metrics(sft.metrics, having=splits[0]):
            score = sum(line.values.get(name, math.nan) for name in splits) / len(splits)
            folder = sft.checkpoints / folder_name(line.step)
            if math.isfinite(score) and folder.is_dir() and not verify(folder):
                tried[folder] = score
        if not tried:
            raise UserError(f"No checkpoint in {sft.checkpoints} was examined; lower sft.exam.every_tokens.")
        chosen = min(tried, key=lambda folder: abs(tried[folder] - self.config.start_accuracy))
        logger.info(f"GRPO starts from {chosen.name}, {tried[chosen]:.1%} on the validation splits.")
        return chosen

    def examine_supervised(self) -> bool:
        self.examine("sft", self.run.root / "sft")
        return True

    def examine_grpo(self) -> bool:
        start = self.folder("sft").checkpoints / Path(str(self.started_from("grpo"))).name
        before = self.examine(EARLIER, start)
        after = self.examine("grpo", self.run.root / "grpo")
        rows = []
        for split, score in before.items():
            gain = compare(score, after[split])
            pair = score.accuracy, after[split].accuracy
            rows.append(Comparison(split, *pair, gain.mean, gain.interval, gain.n, EARLIER, "grpo", branch=True))
        write_json(self.run.comparison, [asdict(row) for row in rows])
        return True

    def examine(self, label: str, checkpoint: Path) -> dict[str, ScoredExam]:
        """Let a checkpoint take the exam on every test split; add the scores and some answers to the folder."""
        loaded = load_model(checkpoint)
        engine = InferenceEngine(loaded.model, dtype=torch.float32)
        scores = {}
        for split in self.config.exam_splits:
            items = load_clinic(split=split, limit=self.config.exam_items, seed=EXAM_SEED)
            score = scores[split] = score_by_generation(engine, loaded.tokenizer, items, greedy(self.config.exam_new_tokens))
            logger.info(f"{label}, {split}: {score.accuracy:.1%} [{score.low:.1%}, {score.high:.1%}] of {score.n}")
            for result in score.results[: SAMPLES_SHOWN // len(self.config.exam_splits)]:
                jsonl.append(self.run.samples, asdict(result.sample(label)))
            add_exams(self.run.exams, label, {split: replace(score, method="generation")})
        return scores
