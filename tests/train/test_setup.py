"""What is checked before several processes connect: how they share the batches of a run."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace

import pytest
import torch

from osler.cli.main import main
from osler.config.recipe import available_recipes, load_recipe
from osler.config.schema import decode
from osler.data.config import CurriculumStage as Stage
from osler.parallel.config import DdpConfig, DeepSpeedConfig
from osler.parallel.fp8 import float8_linear
from osler.runtime.errors import UserError
from osler.train.config import TrainConfig
from osler.train.setup import check_plan, check_processes

CONFIG = TrainConfig(seq_len=128, batch_tokens=12 * 128, micro_batch_tokens=2 * 128, parallel=DdpConfig())
STAGES = (Stage(seq_len=64, until_tokens=6144), Stage(seq_len=128, batch_tokens=1536))
PRETRAIN = [name for name in available_recipes() if load_recipe(name).get("kind") == "pretrain"]


@pytest.mark.parametrize("processes", [1, 2, 3, 6, 12])
def test_shares_that_keep_the_forward_passes_are_silent(processes, capsys):
    check_processes(CONFIG, processes)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("changes", "processes", "told", "mended"),
    [
        ({}, 4, "each of 4 processes has 3 rows of 128 tokens, which split into equal forward passes of 1 only, where 2", 2048),
        ({"curriculum": STAGES}, 4, "stage 2 of the curriculum: each of 4 processes has 3 rows of 128 tokens", 2048),
        (
            {"curriculum": (replace(STAGES[0], batch_tokens=22 * 64), STAGES[1])},
            1,
            "stage 1 of the curriculum: each of 1 processes has 22 rows of 64 tokens",
            1536,
        ),
    ],
)
def test_passes_that_are_far_from_full_are_told_with_a_batch_that_fills_them(changes, processes, told, mended, capsys):
    config = replace(CONFIG, **changes)
    check_processes(config, processes)
    said = capsys.readouterr().err
    assert said.count("Warning") == 1 and told in said and f"batch_tokens={mended} fills them" in said


def test_the_stage_of_a_curriculum_that_ranks_cannot_share_is_named():
    with pytest.raises(UserError, match=r"Stage 2 of the curriculum: a batch of 12 rows .* 8 ranks"):
        check_processes(replace(CONFIG, batch_tokens=2048, curriculum=STAGES), 8)


REFUSED = {
    "no start": ("sft", ["init_from=runs/gone"], "is no folder"),
    "optimizer": ("pretrain", ["optim.type=muon", "precision=pure-bf16"], "with optim.type=muon use precision=bf16"),
    "alert command": ("pretrain", ["monitor.alert_command=no-such-program-here"], "no program 'no-such-program-here'"),
    "threads": ("pretrain", ["loader_workers=-1"], "loader_workers: must be at least 0, given -1"),
    "vocabulary": (
        "pretrain",
        ["tokenizer.path=null", "tokenizer.vocab_size=512", "model.vocab_size=200"],
        "set model.vocab_size=512\n",
    ),
}
if not torch.cuda.is_available():
    REFUSED["a GPU"] = ("sft", ["init_from=RUN", "device=cuda"], "Device 'cuda' was asked for")
    REFUSED["a GPU to sample"] = ("grpo", ["init_from=RUN", "device=cuda"], "Device 'cuda' was asked for")


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["start", "plan"])
@pytest.mark.parametrize("case", REFUSED)
def test_a_start_that_cannot_go_well_is_refused_and_leaves_nothing(case, dry, tiny, runs, tmp_path, capsys):
    kind, overrides, told = REFUSED[case]
    overrides = [override.replace("RUN", str(runs.sft)) for override in overrides]
    assert main([kind, getattr(tiny, kind), *overrides, *dry, "--run", str(tmp_path / "run")]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "run" / "config.yaml").exists()


def test_a_plan_misses_the_packages_that_a_run_would_miss(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    float8_linear.cache_clear()
    config = TrainConfig(device="cpu", precision="fp8")
    with pytest.raises(UserError, match=r"precision=fp8 needs torchao .*\[fp8\]"):
        check_plan(config, is_new=True)
    if importlib.util.find_spec("deepspeed") is None:
        with pytest.raises(UserError, match=r"needs the package DeepSpeed"):
            check_plan(replace(config, precision="fp32", parallel=DeepSpeedConfig()), is_new=True)


@pytest.mark.parametrize("name", PRETRAIN)
def test_up_to_eight_processes_share_the_batches_of_a_recipe(name):
    config = replace(decode(TrainConfig, load_recipe(name)), parallel=DdpConfig())
    for processes in (2, 4, 8):
        check_processes(config, processes)
