"""From a config to its plan, whatever its kind, and the model of a run that starts from another one. Torch-free."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path

from osler.config.recipe import available_recipes, load_recipe, run_name
from osler.config.schema import decode
from osler.model.config import MODEL_FILE, ModelConfig, model_in
from osler.plan.grpo import plan_grpo
from osler.plan.plan import Measured, Plan, Where
from osler.plan.speed import Arithmetic
from osler.plan.training import plan_training
from osler.rl.config import GrpoConfig
from osler.runtime.errors import UserError
from osler.train.config import TrainConfig


def plan_of(
    config: TrainConfig | GrpoConfig,
    where: Where,
    *,
    name: str = "",
    model: ModelConfig | None = None,
    arithmetic: Arithmetic | None = None,
    measured: Measured | None = None,
) -> Plan:
    """Return the plan of a run on a device.

    ``model`` is the shape of the model in ``init_from``; if it is None, ``start_model`` reads it. ``arithmetic`` is what the run
    computes with, where that is known, and ``measured`` what a probe found.
    """
    if isinstance(config, GrpoConfig):
        model = model or shape_from(config)
        return plan_grpo(config, where, name=name, model=model, arithmetic=arithmetic, measured=measured)
    if model is None and config.init_from is not None:
        model = shape_from(config)
    teacher = None if config.teacher is None else model_at(config.teacher.path)
    return plan_training(config, where, name=name, model=model, teacher=teacher, arithmetic=arithmetic, measured=measured)


def model_at(path: str) -> ModelConfig | None:
    """Return the model of a run, a checkpoint or a recipe, or of the run that a shipped recipe will make; else None."""
    file = Path(path, MODEL_FILE)
    if path and file.is_file():
        return decode(ModelConfig, json.loads(file.read_text(encoding="utf-8")), source=str(file))
    names = available_recipes()
    if path in names:
        return model_in(load_recipe(path), path)
    if maker := runs_of_recipes().get(str(Path(path))):
        config = decode(TrainConfig, load_recipe(maker), source=maker)
        return config.model if config.init_from is None else shape_from(config)
    return None


@functools.cache
def runs_of_recipes() -> Mapping[str, str]:
    """Return the shipped recipe that makes each run folder when no other name is given."""
    kinds = {name: load_recipe(name).get("kind") for name in available_recipes()}
    return {str(Path("runs", run_name(name, kind))): name for name, kind in kinds.items() if kind in ("pretrain", "sft")}


def shape_from(config: TrainConfig | GrpoConfig, start: ModelConfig | None = None) -> ModelConfig:
    """Return the model of a run that starts from another one; raises UserError where that is not there."""
    start = start or start_model(config.init_from or "", "init_from")
    context = config.context if isinstance(config, TrainConfig) else None
    # The length of the rows that the model learned is not known before it is trained, and it changes no size.
    trained = start.max_seq_len if context is None else min(start.max_seq_len, context.max_seq_len - 1)
    return config.model_from(start, trained)


def start_model(path: str, key: str) -> ModelConfig:
    """Return the model that a run starts from; raises UserError where it is not there."""
    model = model_at(path)
    if model is None:
        what = f"{key}={path}: there is no run with a model yet" if path else f"{key} is not given"
        raise UserError(
            f"{what}, so its size is unknown. Name a run, or for the plan alone a model family: `{key}=pure-medium-large`."
        )
    return model
