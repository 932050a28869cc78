"""``osler plan``: what a recipe will take on a device, before it runs. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from osler.cli.show import decode_recipe
from osler.config.devices import find_device, here
from osler.config.recipe import load_recipe
from osler.model.config import ModelConfig
from osler.pipeline.config import PipelineConfig, read_reference
from osler.plan.notes import time_notes
from osler.plan.plan import HOUR, Plan, Where
from osler.plan.planner import plan_of, shape_from
from osler.plan.words import words_of
from osler.rl.config import GrpoConfig
from osler.runtime.errors import UserError
from osler.train.config import TrainConfig


def plan(
    recipe: str | None,
    overrides: Sequence[str],
    *,
    gpu: str | None,
    gpus: int,
    hours: float | None,
    price: float | None,
) -> str:
    """Run the command ``plan``; return what to print."""
    if recipe is None:
        raise UserError("which recipe? `osler recipes` lists them.")
    where = Where(here() if gpu is None else find_device(gpu), gpus, price)
    plans = plans_of(recipe, overrides, where)
    if hours is not None:
        plans = [replace(one, notes=(*time_notes(one, hours * HOUR, f"{hours:g} hours"), *one.notes)) for one in plans]
    return "\n\n".join(map(words_of, plans))


def plans_of(recipe: str, overrides: Sequence[str], where: Where) -> list[Plan]:
    """Return the plan of a recipe, or for a pipeline those of its stages that train."""
    resolved = decode_recipe(load_recipe(recipe, overrides), source=recipe)
    if isinstance(resolved, (TrainConfig, GrpoConfig)):
        return [plan_of(resolved, where, name=recipe)]
    if not isinstance(resolved, PipelineConfig):
        raise UserError(
            f"`{recipe}` is a model and no run: plan a recipe that trains it, such as `osler plan debug base={recipe}`."
        )
    plans: list[Plan] = []
    models: dict[str, ModelConfig] = {}
    for name, stage in resolved.stages.items():
        if not isinstance(stage, (TrainConfig, GrpoConfig)):
            continue
        models[name] = model_of(stage, models, resolved)
        plans.append(plan_of(stage, where, name=f"{recipe}: {name}", model=models[name]))
    return plans


def model_of(stage: TrainConfig | GrpoConfig, models: dict[str, ModelConfig], pipeline: PipelineConfig) -> ModelConfig:
    """Return the model of a stage: its own, or that of the stage or run that it starts from."""
    if stage.init_from is None:
        assert isinstance(stage, TrainConfig)
        return stage.model
    earlier = read_reference(stage.init_from, pipeline.stages)[0]
    return shape_from(stage, models.get(earlier))
