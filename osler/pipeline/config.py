"""A pipeline: named stages, one after the other. Each is an exam, or a run that may start from an earlier one. Torch-free.

    kind: pipeline
    read: {base: text-10min, total_tokens: 2000000}
    ask: {kind: sft, init_from: read, data: {type: turns, path: QUESTIONS.jsonl}}
    exam: {kind: exam, of: {taught: ask}, task: {type: questions, path: EXAM.jsonl}}

Every key but those of ``PipelineConfig`` is the name of a stage; on the command line ``ask.total_tokens=...`` changes a field of
the stage ``ask``. So each recipe has a config class of its own (``pipeline_class``), checked and explained like any other.
"""

import functools
import re
from collections.abc import Container, Mapping
from dataclasses import fields
from keyword import iskeyword
from pathlib import Path
from typing import Any, Literal, cast

from osler.config.schema import Seed, config, decode, nearest, shown
from osler.eval.config import ExamSettings
from osler.model.config import ModelConfig
from osler.rl.config import GrpoConfig
from osler.runtime.errors import UserError
from osler.train.config import TrainConfig

FILES = ("path", "shots_path", "ids")  # keys whose files are looked for in `root`
OWN_FOLDERS = ("answers", "checkpoints", "trackers")  # folders of a pipeline, so no stage may have these names
ACCURACY = "accuracy="
SHOWN = ("steps", "completions", "parameters", "sparse attention", "exports as")  # the numbers of a stage that are shown


@config
class ExamStage(ExamSettings):
    """An exam of checkpoints of earlier stages. A stage is compared with what it started from, if both sit the exam."""

    kind: Literal["exam"] = "exam"
    description: str = ""  # for the reader; changes nothing
    of: dict[str, str]  # by name in the report: the checkpoint to examine, written like init_from

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.of or not self.exams:
            raise ValueError("an exam needs `of`, such as {tuned: grpo}, and `task` or `tasks`")


Stage = TrainConfig | GrpoConfig | ExamStage
STAGES: dict[str, type[Any]] = {"pretrain": TrainConfig, "sft": TrainConfig, "grpo": GrpoConfig, "exam": ExamStage}


@config
class PipelineConfig:
    """Stages, one after the other, in one run folder. A stage's init_from names an earlier one, or any run or checkpoint.

    sft is the newest checkpoint of the stage sft, sft@best its best, sft@accuracy=0.6 the one whose mean accuracy in the exams
    during training was nearest to 0.6, and sft@start the checkpoint that the stage sft started from.
    """

    kind: Literal["pipeline"] = "pipeline"
    description: str = ""  # for the reader; changes nothing
    seed: Seed = 0  # for every stage that trains and every source of data without a seed
    root: str = ""  # a folder in which the files of all stages are looked for; each source by name has a folder of its own in it
    notes: tuple[str, ...] = ()  # what the report tells its reader

    @property
    def stages(self) -> dict[str, Stage]:
        """The stages by name, in their order."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in OWN_FIELDS}

    def numbers(self) -> dict[str, str]:
        """Return, for a person to read, the length of each stage that trains, and its model's cost if a stage made that model."""
        models: dict[str, tuple[ModelConfig, int]] = {}  # and the longest rows that its weights have learned
        found: dict[str, str] = {}
        for name, stage in self.stages.items():
            if isinstance(stage, ExamStage):
                continue
            if stage.init_from is None:
                models[name] = stage.model, stage.seq_len
            elif (start := models.get(read_reference(stage.init_from, self.stages)[0])) is not None:
                models[name] = stage.model_from(*start), stage.trained_after(start[1])
            numbers = stage.numbers(models[name][0] if name in models else None)
            found[name] = "; ".join(f"{what} {numbers[what]}" for what in SHOWN if what in numbers)
        return found

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("a pipeline needs a stage, such as `read: {kind: pretrain}`")
        earlier: dict[str, Stage] = {}
        for name, stage in self.stages.items():
            for text in references_of(stage):
                check_reference(text, f"{name} refers to {text}", earlier, self.stages)
            earlier[name] = stage


OWN_FIELDS = tuple(field.name for field in fields(PipelineConfig))


def read_reference(text: str, stages: Container[str]) -> tuple[str, str]:
    """Return the stage and the choice of its checkpoint in a text such as ``sft@best``; ("", text) when it names no stage."""
    stage, _, choice = text.partition("@")
    return (stage, choice) if stage in stages else ("", text)


def references_of(stage: Stage) -> list[str]:
    """Return the checkpoints that a stage needs, as they stand in its config."""
    if isinstance(stage, ExamStage):
        return list(stage.of.values())
    return [] if stage.init_from is None else [stage.init_from]


def check_reference(text: str, what: str, earlier: Mapping[str, Stage], stages: Container[str]) -> None:
    """Raise ValueError for a reference to a later stage, to an exam, or to a checkpoint that cannot exist."""
    stage, choice = read_reference(text, stages)
    if not stage:
        return
    if stage not in earlier:
        raise ValueError(f"{what}, which is not an earlier stage; stages are carried out in the order of the recipe")
    there = earlier[stage]
    if isinstance(there, ExamStage):
        raise ValueError(f"{what}, which is an exam and has no checkpoint")
    if choice == "start" and there.init_from is None:
        raise ValueError(f"{what}, but {stage} starts from no checkpoint")
    if choice.startswith(ACCURACY):
        if not re.fullmatch(r"0?\.\d+|[01]", choice.removeprefix(ACCURACY)):
            raise ValueError(f"{what}: write an accuracy from 0 to 1, such as {stage}@{ACCURACY}0.6")
        if not exam_metrics(there):
            key = "exam.every_tokens above 0" if isinstance(there, TrainConfig) else "an eval_task"
            raise ValueError(f"{what}, but no exam is sat during {stage}: give it {key}")
    elif choice not in ("", "best", "start"):
        raise ValueError(f"{what}; write best, start or {ACCURACY}NUMBER after the @")


def exam_metrics(stage: TrainConfig | GrpoConfig) -> list[str]:
    """Return the metrics of the exams during a stage: the accuracy on each split."""
    if isinstance(stage, GrpoConfig):
        names = [] if stage.eval_task is None else [stage.eval_task.split or stage.eval_task.exam]
    else:
        tasks = ["_".join(filter(None, (task.exam, task.split))) for task in stage.exam.tasks]
        names = (tasks or list(stage.exam.splits)) if stage.exam.every_tokens else []
    return [f"eval/{name}_accuracy" for name in names]


def decode_pipeline(recipe: Mapping[str, Any], *, source: str = "") -> PipelineConfig:
    """Return the config of a recipe. Stages that train and have no seed get the recipe's; relative paths start at its root."""
    cls = pipeline_class(recipe, source)
    seed, root = recipe.get("seed", PipelineConfig.seed), recipe.get("root")
    resolved = dict(recipe)
    for name in recipe.keys() - OWN_FIELDS:
        stage = dict(recipe[name])
        if STAGES[stage["kind"]] is TrainConfig:
            stage |= {"seed": stage.get("seed", seed), "data": _seeded(stage.get("data", {"type": "clinic"}), seed)}
        elif stage["kind"] == "grpo":
            stage.setdefault("seed", seed)
        resolved[name] = _found_in(Path(root).absolute(), stage) if isinstance(root, str) and root else stage
    return decode(cls, resolved, source=source)


def _seeded(data: Any, seed: Any) -> Any:
    """Return the section ``data`` with ``seed`` in each source that has none."""
    if not isinstance(data, Mapping) or data.get("type") == "prepared":
        return data
    if isinstance(data.get("sources"), list):
        return {**data, "sources": [_seeded(source, seed) for source in data["sources"]]}
    return {"seed": seed, **data}


def _found_in(root: Path, section: Any) -> Any:
    """Return a section whose relative paths, and sources by name, are looked for in the absolute folder ``root``."""
    if isinstance(section, list):
        return [_found_in(root, item) for item in section]
    if not isinstance(section, Mapping):
        return section
    found = {key: _found_in(root, value) for key, value in section.items()}
    found |= {key: str(root / value) for key, value in section.items() if key in FILES and isinstance(value, str) and value}
    is_named = section.get("type") in ("hub", "mixture") and not section.get("path")
    return found | ({"root": str(root / section.get("root", ""))} if is_named else {})


def pipeline_class(recipe: Mapping[str, Any], source: str = "") -> type[PipelineConfig]:
    """Return the config class of a recipe: ``PipelineConfig`` with a field for each stage, of the class that its kind has."""
    stages = {name: stage for name, stage in recipe.items() if name not in OWN_FIELDS}
    known = [name for name, stage in stages.items() if isinstance(stage, Mapping) and "kind" in stage]
    for name, stage in stages.items():
        if name not in known:
            close = nearest(name, [*OWN_FIELDS, *known])
            raise UserError(f"{source}: {name}: neither a known key nor a stage, which needs a `kind`{close}")
        if stage["kind"] not in list(STAGES):  # a list, because a kind of any type may be given
            kinds = ", ".join(STAGES)
            raise UserError(f"{source}: {name}.kind: should be one of {kinds}, given {shown(stage['kind'])}")
        if not re.fullmatch(r"[A-Za-z]\w*", name) or iskeyword(name) or hasattr(PipelineConfig, name) or name in OWN_FOLDERS:
            raise UserError(f"{source}: {name}: a stage names a folder and a field: give it a name of letters, digits and _")
    return _class_of(tuple((name, stage["kind"]) for name, stage in stages.items()))


@functools.cache
def _class_of(kinds: tuple[tuple[str, str], ...]) -> type[PipelineConfig]:
    # With the names of PipelineConfig, `inspect` finds that class's source, whose comments explain the fields.
    named = {name: getattr(PipelineConfig, name) for name in ("__module__", "__qualname__", "__doc__")}
    made = type(PipelineConfig.__name__, (PipelineConfig,), {**named, "__annotations__": {n: STAGES[k] for n, k in kinds}})
    return config(cast("type[PipelineConfig]", made))
