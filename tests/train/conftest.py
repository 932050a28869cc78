"""A trainer built from parts, on the data of a finished tiny run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from osler.cli import main
from osler.data.consumed import ConsumedData
from osler.data.prepare import open_prepared
from osler.decode import decode
from osler.inference.load import load_model
from osler.model.loss import SummedLoss
from osler.model.transformer import Transformer
from osler.optim.build import build_optimizer
from osler.parallel.engine import ParallelEngine
from osler.recipe import load_recipe
from osler.runtime import faults
from osler.runtime.files import RunFolder
from osler.tokenizer.bpe import Tokenizer
from osler.train.config import TrainConfig
from osler.train.run import make_loader
from osler.train.step import TrainStep
from osler.train.trainer import Trainer


@pytest.fixture(scope="session")
def config(tiny) -> TrainConfig:
    return decode(TrainConfig, load_recipe(tiny.pretrain))


@pytest.fixture(scope="session")
def shards(runs, tiny):
    """The train split of the pretraining run."""
    return open_prepared(runs.pretrain / "data", Tokenizer.load(tiny.tokenizer)).train


@pytest.fixture
def make_step(runs) -> Callable[..., tuple[Transformer, torch.optim.Optimizer, TrainStep]]:
    """A function that builds model (the pretrained one), optimizer and step from a config."""

    def build(config: TrainConfig) -> tuple[Transformer, torch.optim.Optimizer, TrainStep]:
        model = load_model(runs.pretrain).model.train()
        optimizer = build_optimizer(model, config.optim)
        step = TrainStep(
            model,
            optimizer,
            ParallelEngine(SummedLoss(model)),
            micro_batch_tokens=config.micro_batch_tokens,
            clip_norm=config.clip_norm,
            document_mask=config.document_mask,
            device=torch.device("cpu"),
        )
        return model, optimizer, step

    return build


@pytest.fixture
def make_trainer(config, shards, make_step) -> Callable[..., Trainer]:
    """``make_trainer(folder, evaluate=..., **fields)``: fields change the config of the tiny pretraining run."""

    def build(folder, evaluate=dict, probe=dict, **fields: Any) -> Trainer:
        changed = replace(config, **fields)
        model, optimizer, step = make_step(changed)
        loader = make_loader(changed, shards)
        return Trainer(
            changed,
            model=model,
            optimizer=optimizer,
            train_step=step,
            batches=loader.batches,
            consumed=ConsumedData(loader),
            evaluate=evaluate,
            probe=probe,
            run=RunFolder.create(folder),
            files={},
            fingerprints={"data": shards.fingerprint},
            started=time.monotonic(),
        )

    return build


@pytest.fixture
def launch_stopped(tiny, monkeypatch) -> Callable[..., int]:
    """A function that pretrains with a fault that stops the run, and returns the exit code."""

    def start(folder, *overrides: str, fault: str) -> int:
        faults.visits.clear()
        with monkeypatch.context() as environment:
            environment.setenv(faults.VARIABLE, fault)
            return main(["pretrain", tiny.pretrain, *overrides, "--run", str(folder)])

    return start
