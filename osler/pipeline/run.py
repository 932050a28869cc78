"""``osler pipeline RECIPE``: the stages of a recipe, one after the other, each an ordinary run in a folder of its own.

    runs/quickstart/  config.yaml, stages.json, exams.json, comparison.json, samples.jsonl, notes.json, answers/,
                      report.html
    runs/quickstart/pretrain/, sft/, grpo/  the run folders of the stages, as the single commands write them

The same command always continues: it skips finished stages and resumes an interrupted stage from its checkpoint, bit for bit. A
stage that has begun keeps its configuration; one that has not may still be changed. The command checks before the first step
that every stage will find what it needs: a checkpoint to start from, its files, room in the model.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from osler.checkpoint import store
from osler.checkpoint.folders import folder_name, refuse_checkpoint, verify
from osler.config.recipe import as_comments, dump_yaml, load_recipe, override
from osler.config.schema import encode
from osler.eval.run import save_scores, sit
from osler.eval.score import ScoredExam, compare
from osler.inference.load import open_model
from osler.pipeline.check import JOBS, check_stage, refuse_missing
from osler.pipeline.config import (
    ACCURACY,
    OWN_FIELDS,
    ExamStage,
    PipelineConfig,
    Stage,
    decode_pipeline,
    exam_metrics,
    read_reference,
    references_of,
)
from osler.plan.actual import keep_plan
from osler.records import jsonl
from osler.records.answers import asked_differently
from osler.records.jsonl import read_metrics
from osler.records.results import Comparison, FinishedStage
from osler.records.values import read_records
from osler.report.page import build_report
from osler.report.words import summary_text
from osler.runs.folder import GIVEN_ANEW, PLACES, differences, first_of, read_config, taken
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder, write_atomic, write_json
from osler.runtime.stop import EXIT_STOPPED
from osler.runtime.world import World, joined

logger = logging.getLogger(__name__)

SAMPLES_SHOWN = 6  # sample answers of each checkpoint, for the report


def quickstart(**given: Any) -> int:
    """Run the command ``quickstart``: the pipeline of that name."""
    return run("quickstart", **given | {"run_dir": given["run_dir"] or "runs/quickstart"})


def run(
    recipe: str | None,
    overrides: Sequence[str] = (),
    *,
    run_dir: str | None = None,
    resume: bool = False,
    dry_run: bool = False,
) -> int:
    """Run the command ``pipeline``. The same call continues a run that stopped; ``resume`` uses the recipe stored in it."""
    if (run_dir if resume else recipe) is None:
        raise UserError("Which pipeline? Give a recipe (`osler recipes` lists them), or --run FOLDER --resume to go on with one.")
    name = Path(str(recipe)).stem if str(recipe).endswith((".yaml", ".yml")) else str(recipe).replace("/", "-")
    folder = RunFolder(Path(run_dir or Path("runs") / name))
    refuse_checkpoint(folder.root)
    if resume and not folder.config.exists():
        raise UserError(f"{folder.root} holds no pipeline to resume: {folder.config} is missing.")
    stored = read_config(folder) if folder.config.exists() else None
    if stored is not None and stored.get("kind") != "pipeline":
        raise UserError(
            f"{folder.root} holds a run of kind {stored.get('kind')}, and a pipeline cannot go on with that: choose another "
            "folder with --run."
        )
    given = resumed_recipe(stored, overrides, folder) if resume and stored is not None else load_recipe(str(recipe), overrides)
    if given.get("kind") != "pipeline":
        raise UserError(f"{recipe} is for `osler {given.get('kind', 'pretrain')}`, not for `osler pipeline`.")
    config = decode_pipeline(given, source=str(folder.config if resume else recipe))
    if dry_run:
        pipeline = Pipeline(config, folder, World())
        pipeline.check(stored)
        print(pipeline.describe())
        return 0
    devices = [stage.device for stage in config.stages.values() if not isinstance(stage, ExamStage)]
    with joined(devices[0] if devices else "auto") as world, taken(folder, world):
        return Pipeline(config, folder, world).run_stages(stored)


def resumed_recipe(stored: dict[str, Any], overrides: Sequence[str], folder: RunFolder) -> dict[str, Any]:
    """Return the stored recipe with changed fields of stages. ``Pipeline.check`` refuses changes of one that has begun.

    Raises UserError for a key of the pipeline itself: the stored stages have its seed and its root in their own fields.
    """
    stages = [name for name in stored if name not in OWN_FIELDS]
    if other := [given for given in overrides if given.partition("=")[0].partition(".")[0] not in stages]:
        raise UserError(
            f"--resume goes on with {folder.root} as it is, except for fields of stages that have not begun, such as "
            f"{stages[-1]}.FIELD=VALUE: leave out {' '.join(other)}."
        )
    return override(stored, overrides)


class Pipeline:
    """The stages of a config in their folder, on all the processes of ``world``."""

    def __init__(self, config: PipelineConfig, run: RunFolder, world: World) -> None:
        self.config, self.run, self.world = config, run, world
        try:
            self.finished = read_records(FinishedStage, run.stages)
        except UserError as error:
            raise UserError(f"{error} Delete it: the same command finds by their checkpoints what is finished.") from error

    def has_begun(self, name: str) -> bool:
        return name in [stage.name for stage in self.finished] or self.folder(name).config.exists()

    def folder(self, name: str) -> RunFolder:
        return RunFolder(self.run.root / name)

    def check(self, stored: dict[str, Any] | None) -> None:
        """Raise UserError when a stage was changed after it began, or will not be able to run."""
        stages = self.config.stages
        if gone := [stage.name for stage in self.finished if stage.name not in stages]:
            raise UserError(f"{self.run.root} holds another pipeline, with a stage {gone[0]}: choose another folder with --run.")
        refuse_missing(self.config, [name for name in stages if not self.has_begun(name)])
        for name, stage in stages.items():
            with in_stage(name):
                if self.has_begun(name) and stored is not None and name in stored:
                    self.refuse_change(name, stage, stored[name])
                if not isinstance(stage, ExamStage):
                    JOBS[type(stage)].check_processes(stage, self.world.size)
                if name not in [done.name for done in self.finished]:
                    self.refuse_gone(name, stage)
                    check_stage(self.config, name, self.run)

    def refuse_change(self, name: str, stage: Stage, stored: dict[str, Any]) -> None:
        changed = differences(stage, stored, str(self.run.config), leave_out=GIVEN_ANEW)
        if words := [said for key, said in changed.items() if not PLACES.fullmatch(key)]:
            raise UserError(
                f"it has begun in {self.run.root}, and cannot be changed any more: {first_of(words)}. To go on with the pipeline "
                f"as it is: `osler pipeline --run {self.run.root} --resume`. For a new one choose another folder with --run."
            )

    def refuse_gone(self, name: str, stage: Stage) -> None:
        """Raise UserError when a stage starts from a finished one whose folder is gone."""
        references = [] if self.has_begun(name) else references_of(stage)
        for text in references:
            above = self.folder(read_reference(text, self.config.stages)[0])
            if above.root.name in [done.name for done in self.finished] and not above.config.exists():
                raise UserError(
                    f"it goes on from {text}, which is finished, and {above.root} is gone: put it back; or delete "
                    f"{self.run.stages}, and the same command carries out again what is gone."
                )

    def describe(self) -> str:
        """Return what ``--dry-run`` prints: for every stage its state and length. ``osler show`` prints all fields."""
        finished = [stage.name for stage in self.finished]
        said = {"run folder": str(self.run.root)}
        for name in self.config.stages:
            said[name] = "finished" if name in finished else "begun" if self.has_begun(name) else "to come"
        said |= {name: f"{said[name]}; {numbers}" for name, numbers in self.config.numbers().items()}
        return "\n".join(as_comments(said))

    def run_stages(self, stored: dict[str, Any] | None) -> int:
        """Carry out every stage that is not finished, then write the report; return the process's exit code."""
        self.check(stored)
        first = self.world.is_first
        if first:
            write_atomic(self.run.config, dump_yaml(encode(self.config)))
        for name, stage in self.config.stages.items():
            if name in [done.name for done in self.finished]:
                continue
            logger.info(f"── {name}: {stage.description}".removesuffix(": "))
            started = time.monotonic()
            with in_stage(name):
                is_done = self.examine(stage) if isinstance(stage, ExamStage) else self.train(name, stage)
            if not is_done:
                logger.info(f"Stopped and saved. The same command, or `osler pipeline --run {self.run.root} --resume`, goes on.")
                return EXIT_STOPPED
            self.finished.append(FinishedStage(name, round(time.monotonic() - started, 1), stage.description))
            if first:
                write_json(self.run.stages, [asdict(done) for done in self.finished])
        if first:
            write_json(self.run.notes, list(self.config.notes))
            print(summary_text(self.run.root, build_report(self.run.root)))
            trained = [name for name, stage in self.config.stages.items() if not isinstance(stage, ExamStage)]
            logger.info("Talk to a model: " + "   ·   ".join(f"osler chat {self.folder(name).root}" for name in trained[-2:]))
        return 0

    def train(self, name: str, stage: Any) -> bool:
        """Train one stage in its folder; return False when it was asked to stop."""
        folder = self.folder(name)
        start = None
        if stage.init_from is not None:
            start = self.world.broadcast_from_first(partial(self.start_of, name))
        with taken(folder, self.world, keep_plan):
            return JOBS[type(stage)].train(replace(stage, init_from=start), folder, self.world)

    def start_of(self, name: str) -> str:
        """Return the run or checkpoint that a stage starts from. A stage that has begun keeps the one in its stored config."""
        if self.folder(name).config.exists():
            return str(read_config(self.folder(name))["init_from"])
        stage: Any = self.config.stages[name]
        start = self.checkpoint(stage.init_from)
        logger.info(f"{name} starts from {start}.")
        return str(start)

    def checkpoint(self, text: str) -> Path:
        """Return the checkpoint that a text in a config means: a reference such as ``sft@best``, or a path."""
        name, choice = read_reference(text, self.config.stages)
        if not name:
            return store.resolve(text)
        if choice.startswith(ACCURACY):
            return self.nearest(name, float(choice.removeprefix(ACCURACY)))
        if choice == "start":
            start, stage = Path(self.start_of(name)), self.config.stages[name]
            assert not isinstance(stage, ExamStage)
            above = read_reference(str(stage.init_from), self.config.stages)[0]
            return self.folder(above).checkpoints / start.name if above else store.resolve(start)  # the folder may have moved
        return store.resolve(self.folder(name).root, choice or "newest")

    def nearest(self, name: str, accuracy: float) -> Path:
        """Return the checkpoint of a stage whose mean accuracy in the exams during training is nearest to ``accuracy``."""
        folder, stage = self.folder(name), self.config.stages[name]
        assert not isinstance(stage, ExamStage)
        metrics = exam_metrics(stage)
        tried: dict[Path, float] = {}
        for line in read_metrics(folder.metrics, having=metrics[0]):
            score = sum(line.values.get(metric, math.nan) for metric in metrics) / len(metrics)
            checkpoint = folder.checkpoints / folder_name(line.step)
            if math.isfinite(score) and checkpoint.is_dir() and not verify(checkpoint):
                tried[checkpoint] = score
        if not tried:
            raise UserError(f"No checkpoint in {folder.checkpoints} was examined: examine more often, or keep more checkpoints.")
        chosen = min(tried, key=lambda checkpoint: abs(tried[checkpoint] - accuracy))
        logger.info(f"{chosen} has an accuracy of {tried[chosen]:.1%} in the exams of {name}.")
        return chosen

    def examine(self, stage: ExamStage) -> bool:
        """Let checkpoints of earlier stages take an exam, and compare a stage with the checkpoint that it started from."""
        if self.world.is_first:
            try:
                self.compare(stage, {label: self.sit(stage, label, self.checkpoint(text)) for label, text in stage.of.items()})
            except KeyboardInterrupt:
                logger.info(f"The same command, or `osler pipeline --run {self.run.root} --resume`, goes on with the exam.")
                raise
        self.world.barrier()
        return True

    def sit(self, stage: ExamStage, label: str, checkpoint: Path) -> list[ScoredExam]:
        scores = sit(stage, open_model(checkpoint, device=stage.device), label, self.run, takes_full=True)
        save_scores(self.run, label, scores)
        samples: list[dict[str, Any]] = []
        for score in scores:
            logger.info(f"{label}, {score.split}: {score.accuracy:.1%} [{score.low:.1%}, {score.high:.1%}] of {score.n}")
            samples += [asdict(result.sample(label)) for result in score.results[: max(1, SAMPLES_SHOWN // len(scores))]]
        new = {(label, sample["id"]) for sample in samples}  # after an interruption they may be in the file already
        kept = [row for row in jsonl.read(self.run.samples)[0] if (row.get("stage"), row.get("id")) not in new]
        write_atomic(self.run.samples, "".join(map(jsonl.to_line, [*kept, *samples])))
        return scores

    def compare(self, stage: ExamStage, scores: dict[str, list[ScoredExam]]) -> None:
        """Write the differences between each stage and the checkpoint that it started from, where both took the exam."""
        rows = [row for row in read_records(Comparison, self.run.comparison) if row.after_label not in scores]
        for after, text in stage.of.items():
            name = read_reference(text, self.config.stages)[0]
            trained: Any = self.config.stages[name] if name else None
            if trained is None or trained.init_from is None or text != name:
                continue
            start = self.checkpoint(f"{name}@start")
            above = read_reference(trained.init_from, self.config.stages)[0]
            is_branch = bool(above) and self.checkpoint(above) != start
            starts = [label for label, other in stage.of.items() if label != after and self.checkpoint(other) == start]
            for before in starts[:1]:  # several labels may name the same checkpoint
                pairs = [(early, late) for early in scores[before] for late in scores[after] if same_exam(early, late)]
                for early, late in pairs:
                    title = late.split if late.method == "generation" else f"{late.split}, {late.method}"
                    if why := asked_differently(early.settings, late.settings):
                        logger.warning(f"{title}: {before} and {after} are not compared, as they were asked differently: {why}.")
                        continue
                    gain = compare(early, late)
                    pair = early.accuracy, late.accuracy, gain.mean, gain.interval, gain.n
                    rows.append(Comparison(title, *pair, before, after, branch=is_branch))
        write_json(self.run.comparison, [asdict(row) for row in rows])


def same_exam(one: ScoredExam, other: ScoredExam) -> bool:
    """Return whether two scores are of the same questions by the same method."""
    return (one.split, one.method, one.n) == (other.split, other.method, other.n)


@contextmanager
def in_stage(name: str) -> Iterator[None]:
    """Put the name of the stage before the message of an error, and say how to give its fields to a pipeline."""
    try:
        yield
    except UserError as error:
        raise UserError(
            f"stage {name}: {error}\nFields in this message are those of the stage: give them to `osler pipeline` as "
            f"{name}.FIELD=VALUE, or in the section {name} of the recipe. root=DIR of the pipeline is the folder of "
            "the files of all stages."
        ) from error
