"""A trainer built from parts, on the data of a finished tiny run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from osler.bench import training_step
from osler.config.recipe import load_recipe, merge
from osler.config.schema import decode, encode
from osler.data.prepared import open_prepared
from osler.inference.load import load_model
from osler.model.transformer import SummedLoss, Transformer
from osler.optim.build import build_optimizer
from osler.parallel.engine import ParallelEngine
from osler.runs.process import Learner, Run
from osler.runtime.files import RunFolder
from osler.runtime.world import World
from osler.tokenizer.bpe import Tokenizer
from osler.train.batches import make_loader
from osler.train.config import TrainConfig
from osler.train.trainer import SupervisedTrainer, TrainStep


@pytest.fixture(scope="session")
def config(tiny) -> TrainConfig:
    return decode(TrainConfig, load_recipe(tiny.pretrain))


@pytest.fixture(scope="session")
def prepared(runs, tiny):
    """The data of the pretraining run."""
    return open_prepared(runs.pretrain / "data", Tokenizer.load(tiny.tokenizer))


@pytest.fixture(scope="session")
def shards(prepared):
    """The train split of the pretraining run."""
    return prepared.train[0]


@pytest.fixture
def make_learner(runs) -> Callable[[TrainConfig], Learner]:
    """A function that builds a learner with the pretrained model."""

    def build(config: TrainConfig) -> Learner:
        model = load_model(runs.pretrain).model.train()
        return Learner(model, build_optimizer(model, config.optim), ParallelEngine(SummedLoss(model)), config.clip_norm)

    return build


@pytest.fixture
def make_step(make_learner) -> Callable[..., tuple[Transformer, torch.optim.Optimizer, TrainStep]]:
    """A function that builds model, optimizer and step from a config."""

    def build(config: TrainConfig) -> tuple[Transformer, torch.optim.Optimizer, TrainStep]:
        learner = make_learner(config)
        return learner.model, learner.optimizer, training_step(config, learner)

    return build


@pytest.fixture
def make_trainer(config, prepared, make_learner) -> Callable[..., SupervisedTrainer]:
    """``make_trainer(folder, evaluate=..., **fields)``: fields are merged into the config of the tiny pretraining run."""

    def build(folder, evaluate=dict, exam_score=dict, **fields: Any) -> SupervisedTrainer:
        changed = decode(TrainConfig, merge(encode(config), encode(fields)))
        run = Run(RunFolder.create(folder), World(), fingerprints={"data": prepared.fingerprint})
        loader = make_loader(changed, prepared)
        return SupervisedTrainer(changed, run, make_learner(changed), loader, held_out=evaluate, exam=exam_score)

    return build
