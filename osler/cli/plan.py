"""``osler plan``: what a recipe will take on a device, before it runs. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from osler.cli.show import decode_recipe
from osler.config.devices import find_device, here
from osler.config.recipe import load_recipe, meant_for
from osler.model.config import ModelConfig
from osler.pipeline.config import PipelineConfig, read_reference
from osler.plan.actual import of_probe, table_of
from osler.plan.budget import seconds_for, words_of_budget
from osler.plan.estimate import exact
from osler.plan.notes import time_note
from osler.plan.plan import HOUR, Plan, Where
from osler.plan.planner import plan_of, shape_from
from osler.plan.probe import measure
from osler.plan.table import as_csv, cost_table, devices_table, markdown, tokens_table
from osler.plan.words import money, words_of
from osler.rl.config import GrpoConfig
from osler.runtime.errors import UserError
from osler.train.config import TrainConfig

TABLE_DEVICE, TABLE_HOURS = "h100", 48.0
OF_TABLE = {"cost": {"gpu", "gpus", "price"}, "tokens": {"gpus", "hours"}, "devices": set[str]()}  # options that each table takes


class Asked(NamedTuple):
    """The options of the command, as given."""

    gpu: str | None = None
    gpus: int | None = None
    hours: float | None = None
    budget: float | None = None
    price: float | None = None
    table: str | None = None
    as_table: str = "md"
    probe: bool = False

    def checked(self) -> Asked:
        """Return the same; raises UserError for options that cannot be, or not together."""
        for name in ("gpus", "hours", "budget", "price"):
            if (number := getattr(self, name)) is not None and not 0 < number < math.inf:
                raise UserError(f"--{name} {number:g} must be a number above 0.")
        if self.table is not None:
            given = {name for name in ("gpu", "gpus", "hours", "budget", "price", "probe") if getattr(self, name)}
            if unused := sorted(f"--{name}" for name in given - OF_TABLE[self.table]):
                raise UserError(f"--table {self.table} does not depend on {' and '.join(unused)}: leave that out.")
        elif self.as_table != "md":
            raise UserError(f"--as {self.as_table} is the form of a table: give --table, or leave it out.")
        if self.hours is not None and self.budget is not None:
            raise UserError("--hours and --budget are two ways to limit a run: give one of them.")
        if self.probe and (self.gpu is not None or (self.gpus or 1) > 1):
            raise UserError("--probe makes steps on this machine, in one process: leave --gpu and --gpus out.")
        return self

    def meaning(self, recipe: str) -> Asked:
        """Return the options with the device, and perhaps the hours, that a recipe is meant for where no device is given."""
        meant = meant_for(recipe)
        if self.gpu is not None or "gpu" not in meant or self.probe:
            return self
        hours = self.hours if self.hours or self.budget else meant.get("hours")
        return self._replace(gpu=meant["gpu"], gpus=self.gpus or meant.get("gpus"), hours=hours)

    def where(self, default: str | None = None) -> Where:
        """Return the devices that the plan is for: those asked for, else ``default``, else this machine."""
        name = self.gpu or default
        device = here() if name is None else find_device(name)
        if device.kind == "cpu" and (self.gpus or 1) > 1:
            raise UserError(f"--gpus {self.gpus} counts GPUs, and {device.title} are none: name a GPU with --gpu.")
        return Where(device, self.gpus or 1, self.price)


class PlannedRun(NamedTuple):
    """The name of a run, its config, and its model where that is not the config's."""

    name: str
    config: TrainConfig | GrpoConfig
    model: ModelConfig | None


def plan(recipe: str | None, overrides: Sequence[str], **options: Any) -> str:
    """Run the command ``plan``; return what to print. ``options`` are those of ``Asked``."""
    asked = Asked(**options).checked()
    if asked.table is not None:
        if recipe is not None or overrides:
            raise UserError("--table is of all model families with the data of osler-2day: leave the recipe and its changes out.")
        rows = _rows(asked.table, asked.where(TABLE_DEVICE), asked.hours)
        return as_csv(rows) if asked.as_table == "csv" else markdown(rows)
    if recipe is None:
        if asked.budget is None:
            raise UserError("which recipe? `osler recipes` lists them; --budget alone chooses a model.")
        return words_of_budget(None, overrides, asked.where(), asked.budget)
    asked = asked.meaning(recipe)
    where, hours, budget = asked.where(), asked.hours, asked.budget
    texts, runs = [], runs_of(recipe, overrides)
    for name, config, model in runs:
        one, beside = plan_of(config, where, name=name, model=model), ""
        if asked.probe:
            try:
                one, beside = probed(config, one, model)
            except UserError as error:
                if len(runs) == 1:
                    raise
                why = f"a probe of this stage, so that its numbers are assumptions: {error}"
                one = replace(one, not_planned=(*one.not_planned, why))
        notes = [time_note(one, exact(hours * HOUR), f"{hours:g} hour{'' if hours == 1 else 's'}")] if hours else []
        notes += [time_note(one, seconds_for(budget, where), money(budget))] if budget else []
        texts.append(words_of(replace(one, notes=(*notes, *one.notes))) + beside)
    resolved = load_recipe(recipe, overrides)
    exams = [name for name, stage in resolved.items() if isinstance(stage, dict) and stage.get("kind") == "exam"]
    texts += [f"Not planned: the exam in the stage {name}, which takes time of its own." for name in exams]
    if budget is not None and resolved.get("kind") == "pretrain":
        texts.append(words_of_budget(recipe, overrides, where, budget))
    return "\n\n".join(texts)


def _rows(table: str, where: Where, hours: float | None) -> list[list[str]]:
    if table == "devices":
        return devices_table()
    return cost_table(where) if table == "cost" else tokens_table(hours or TABLE_HOURS, where.gpus)


def probed(config: TrainConfig | GrpoConfig, assumed: Plan, model: ModelConfig | None) -> tuple[Plan, str]:
    """Return a plan with what a probe measured here, and a table of the assumptions beside it."""
    measured = measure(config, assumed, model)
    found = plan_of(config, assumed.where, name=assumed.name, model=model, measured=measured)
    return found, f"\n\nThe plan without the probe, and the probe:\n\n{table_of(of_probe(assumed, found))}"


def plans_of(recipe: str, overrides: Sequence[str], where: Where) -> list[Plan]:
    """Return the plan of a recipe, or for a pipeline those of its stages that train."""
    return [plan_of(config, where, name=name, model=model) for name, config, model in runs_of(recipe, overrides)]


def runs_of(recipe: str, overrides: Sequence[str]) -> list[PlannedRun]:
    """Return the run of a recipe, or for a pipeline its stages that train."""
    resolved = decode_recipe(load_recipe(recipe, overrides), source=recipe)
    if isinstance(resolved, (TrainConfig, GrpoConfig)):
        return [PlannedRun(recipe, resolved, None)]
    if not isinstance(resolved, PipelineConfig):
        raise UserError(f"`{recipe}` is a model and no run: plan a recipe that trains a model, such as `osler plan osler-2day`.")
    runs: list[PlannedRun] = []
    models: dict[str, ModelConfig] = {}
    for name, stage in resolved.stages.items():
        if not isinstance(stage, (TrainConfig, GrpoConfig)):
            continue
        models[name] = model_of(stage, models, resolved)
        runs.append(PlannedRun(f"{recipe}: {name}", stage, models[name]))
    return runs


def model_of(stage: TrainConfig | GrpoConfig, models: dict[str, ModelConfig], pipeline: PipelineConfig) -> ModelConfig:
    """Return the model of a stage: its own, or that of the stage or run that it starts from."""
    if stage.init_from is None:
        assert isinstance(stage, TrainConfig)
        return stage.model
    earlier = read_reference(stage.init_from, pipeline.stages)[0]
    return shape_from(stage, models.get(earlier))
