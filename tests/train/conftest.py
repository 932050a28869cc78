"""A trainer built from parts, on the data of a finished tiny run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

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
def make_step(runs) -> Callable[..., tuple[Transformer, torch.optim.Optimizer, TrainStep]]:
    """A function that builds model (the pretrained one), optimizer and step from a config."""

    def build(config: TrainConfig) -> tuple[Transformer, torch.optim.Optimizer, TrainStep]:
        model = load_model(runs.pretrain).model.train()
        optimizer = build_optimizer(model, config.optim)
        learner = Learner(model, optimizer, ParallelEngine(SummedLoss(model)), config.clip_norm)
        step = TrainStep(learner, micro_batch_tokens=config.micro_batch_tokens, document_mask=config.document_mask)
        return model, optimizer, step

    return build


@pytest.fixture
def make_trainer(config, prepared, runs) -> Callable[..., SupervisedTrainer]:
    """``make_trainer(folder, evaluate=..., **fields)``: fields are merged into the config of the tiny pretraining run."""

    def build(folder, evaluate=dict, exam_score=dict, **fields: Any) -> SupervisedTrainer:
        changed = decode(TrainConfig, merge(encode(config), encode(fields)))
        model = load_model(runs.pretrain).model.train()
        learner = Learner(model, build_optimizer(model, changed.optim), ParallelEngine(SummedLoss(model)), changed.clip_norm)
        run = Run(RunFolder.create(folder), World(), fingerprints={"data": prepared.fingerprint})
        loader = make_loader(changed, prepared)
        return SupervisedTrainer(changed, run, learner, loader, held_out=evaluate, exam=exam_score)

    return build
