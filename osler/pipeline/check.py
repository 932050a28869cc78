"""Checks the stages of a pipeline before the first one runs: will each find its files, and will its settings fit its model?"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from osler.checkpoint import store
from osler.checkpoint.folders import newest_good
from osler.config.schema import encode, nearest
from osler.data.config import HubData, PreparedData, sources_of
from osler.data.named import check_task, learned_items, load_task
from osler.data.prepared import tokenizer_of_shards
from osler.eval.run import parts
from osler.inference.load import described_model, load_start, teaches_reasoning, tokenizer_of, trained_seq_len_of
from osler.model.config import ModelConfig
from osler.monitor.logger import check_trackers
from osler.pipeline.config import FILES, ExamStage, PipelineConfig, Stage, read_reference, references_of
from osler.rl.config import GrpoConfig
from osler.rl.rollout import RlTask
from osler.rl.run import JOB as TUNING
from osler.rl.run import check_held_out
from osler.runs.command import Job
from osler.runs.folder import flat
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder
from osler.tasks.item import ExamItem, shared_questions
from osler.tokenizer.config import BPEConfig
from osler.train.config import TrainConfig
from osler.train.run import JOB as SUPERVISED
from osler.train.setup import fitted, tokenizer_at_hand
from osler.train.teacher import check_teacher, described_teacher

logger = logging.getLogger(__name__)

JOBS: dict[type[Any], Job] = {TrainConfig: SUPERVISED, GrpoConfig: TUNING}


class Origin(NamedTuple):
    """The model that a stage starts from: one in a checkpoint, or one that an earlier stage will train."""

    place: str  # the checkpoint or the stage, for messages
    model: ModelConfig
    trained_seq_len: int
    stage: TrainConfig | None  # the stage that will train it from scratch; None for a checkpoint
    tokenizer: str  # fingerprint of its tokenizer; empty if that will be trained, too


def refuse_missing(pipeline: PipelineConfig, names: Sequence[str]) -> None:
    """Raise UserError when several files that the stages ``names`` read do not exist; the message names them all."""
    missing: dict[str, str] = {}
    for name in names:
        for key, path in flat(encode(pipeline.stages[name])).items():
            is_file = key.rpartition(".")[2] in FILES and key != "teacher.path"  # check_fit looks for it
            if is_file and isinstance(path, str) and path and not Path(path).exists():
                missing.setdefault(path, f"{name}.{key}")
    if len(missing) < 2:  # the check of the stage reports a single one
        return
    folders = sorted({Path(path).parts[0] for path in missing if not Path(path).is_absolute()})
    is_without_root = folders and not pipeline.root
    remedy = f"Give root=DIR with {' and '.join(f'DIR/{folder}' for folder in folders)}" if is_without_root else "Put them there"
    rows = "".join(f"\n  {path}   ({key})" for path, key in missing.items())
    raise UserError(f"{len(missing)} files or folders that the stages read do not exist. {remedy}, or give them otherwise:{rows}")


def check_stage(pipeline: PipelineConfig, name: str, run: RunFolder) -> None:
    """Raise UserError when a stage that is not finished could not be carried out; ``run`` is the folder of the pipeline."""
    stage, stages = pipeline.stages[name], pipeline.stages
    has_begun = not isinstance(stage, ExamStage) and RunFolder(run.root / name).config.exists()
    references = [] if has_begun else references_of(stage)
    for text in references:
        if not read_reference(text, stages)[0]:
            _find_outside(text, list(stages)[: list(stages).index(name)])
        check_fit(stage, origin_of(pipeline, text, run))
    if isinstance(stage, ExamStage):
        check_exam(pipeline, stage)
        return
    check_trackers(stage.monitor)
    if isinstance(stage, GrpoConfig):
        warn_of_reasoning(pipeline, name, stage)
    is_fitted = isinstance(stage, TrainConfig) and isinstance(stage.data, PreparedData) and stage.init_from is not None
    if isinstance(stage, TrainConfig) and stage.init_from is not None:
        stage = replace(stage, teacher=None)  # check_fit has compared the teacher with the origin, too
    if not is_fitted:  # check_fit has compared such shards with the origin
        JOBS[type(stage)].check(stage, RunFolder(run.root / name), None)
    if isinstance(stage, GrpoConfig) and stage.eval_task is not None:
        tasks = [RlTask(task.label, tuple(load_task(task.task)), (), task.weight, task.reasoning) for task in stage.tasks]
        check_held_out(tasks, load_task(stage.eval_task))


def _find_outside(text: str, names: list[str]) -> None:
    try:
        store.resolve(text)
    except (UserError, OSError) as error:
        guess = nearest(text.partition("@")[0], names)
        end = "" if guess.endswith("?") else "."
        raise UserError(f"{text} is no earlier stage{guess}{end} And no run or checkpoint either: {error}") from error


def origin_of(pipeline: PipelineConfig, text: str, run: RunFolder) -> Origin:
    """Return the origin of the model in the checkpoint that ``text`` names."""
    name = read_reference(text, pipeline.stages)[0]
    stage = None
    found = newest_good(RunFolder(run.root / name).checkpoints)[0] if name else store.resolve(text)
    if name:
        stage = pipeline.stages[name]
        assert not isinstance(stage, ExamStage)
        if found is None and stage.init_from is not None:
            return after(stage, origin_of(pipeline, stage.init_from, run))
    if found is not None:
        loaded = load_start(found)
        return Origin(str(found), described_model(loaded), trained_seq_len_of(loaded), None, tokenizer_of(loaded).fingerprint)
    assert isinstance(stage, TrainConfig)
    tokenizer = tokenizer_at_hand(stage)
    if tokenizer is None:
        return Origin(f"the stage {name}", stage.model, stage.seq_len, stage, "")
    return Origin(f"the stage {name}", fitted(stage.model, tokenizer), stage.seq_len, stage, tokenizer.fingerprint)


def after(stage: TrainConfig | GrpoConfig, origin: Origin) -> Origin:
    """Return the origin of a stage that starts from ``stage``, which itself starts from ``origin``."""
    before = origin.trained_seq_len
    return origin._replace(model=stage.model_from(origin.model, before), trained_seq_len=stage.trained_after(before))


def check_fit(stage: Any, origin: Origin) -> None:
    """Raise UserError when a stage needs a longer context than its model will have, or another model, tokenizer or teacher."""
    if isinstance(stage, TrainConfig):
        after(stage, origin)
        if isinstance(stage.data, PreparedData):
            shards = tokenizer_of_shards(stage.data.path, stage.tokenizer.path)
            if shards.fingerprint != origin.tokenizer:
                place = origin.place if origin.tokenizer else f"{origin.place}, which is yet to be trained"
                raise UserError(f"the shards in {stage.data.path} were made with another tokenizer than that of {place}.")
        if stage.teacher is not None:
            check_teacher(described_teacher(stage.teacher), origin.model, origin.tokenizer, stage.seq_len)
        first, without_attention = origin.stage, partial(replace, attention=ModelConfig.attention)
        for key, given, usual, there in (
            ("model", without_attention(stage.model), ModelConfig(), first and without_attention(first.model)),
            ("tokenizer", stage.tokenizer, BPEConfig(), first and first.tokenizer),
        ):
            if there is not None and given not in (usual, there):
                raise UserError(f"{key} differs from that of {origin.place}, which this stage goes on from: leave it out.")
        return
    new_tokens = stage.max_new_tokens if isinstance(stage, ExamStage) else stage.algorithm.max_new_tokens
    if new_tokens >= origin.model.max_seq_len:
        raise UserError(
            f"max_new_tokens {new_tokens} leaves no room for a question in the {origin.model.max_seq_len} tokens (max_seq_len) "
            f"of the model of {origin.place}."
        )


def warn_of_reasoning(pipeline: PipelineConfig, name: str, stage: GrpoConfig) -> None:
    """Warn when GRPO asks for answers with reasoning and the stage before it teaches them without, or the other way round."""
    above = read_reference(stage.init_from or "", pipeline.stages)[0]
    if not above or pipeline.stages[above].kind not in ("sft", "grpo"):
        return
    taught = teaches_reasoning(encode(pipeline.stages[above]))
    for number, task in enumerate(stage.tasks):
        if task.reasoning != taught:
            asks, teaches, right = ("with", "without", "false") if task.reasoning else ("without", "with", "true")
            logger.warning(
                f"{name} asks for answers {asks} reasoning and {above} teaches them {teaches} it, so an exam before and after "
                f"{name} asks in different ways and cannot compare them: give {name}.tasks[{number}].reasoning={right}."
            )


def check_exam(pipeline: PipelineConfig, stage: ExamStage) -> None:
    """Raise UserError when an exam cannot be read, and warn when a stage learns from its questions."""
    for number, task in enumerate(stage.exams):
        check_task(task, "task" if stage.task else f"tasks[{number}]", stage.root)
    for title, part in parts(stage).items():
        items = load_task(part, title, stage.root)
        for name, other in pipeline.stages.items():
            if shared := shared_questions(items, learned_by(other)):
                logger.warning(
                    f"{len(shared):,} of the {len(items):,} questions of this exam are also those that {name} learns from "
                    f"(the first is {shared[0][0].id}), so its score says less."
                )


def learned_by(stage: Stage) -> list[ExamItem]:
    """Return the exam questions that a stage learns from, as far as its config shows: tasks of GRPO, and sources by name."""
    if isinstance(stage, GrpoConfig):
        return [item for entry in stage.tasks for item in load_task(entry.task)]
    if isinstance(stage, ExamStage) or isinstance(stage.data, PreparedData):
        return []
    learned = []
    for source in sources_of(stage.data).values():
        items, clean = learned_items(source, "data"), source.clean
        if items and isinstance(source, HubData) and clean is not None and clean.exam_questions == "drop":
            exams = [item for exam in clean.exams for item in load_task(exam, "clean.exams", source.root)]
            dropped = {item.id for item, _ in shared_questions(items, exams)}
            items = [item for item in items if item.id not in dropped]
        learned += items
    return learned
