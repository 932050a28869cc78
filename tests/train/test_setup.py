"""What is refused or told at the start of a run: its plan, how processes share it, data that do not fit it."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from run_folders import assert_same_run, logged

from osler.cli.main import main
from osler.config.recipe import available_recipes, load_recipe
from osler.config.schema import decode
from osler.data.config import CurriculumStage as Stage
from osler.parallel.config import DdpConfig, DeepSpeedConfig
from osler.parallel.fp8 import float8_linear
from osler.records.jsonl import read_events
from osler.runtime.errors import UserError
from osler.runtime.stop import EXIT_STOPPED
from osler.train.config import TrainConfig
from osler.train.setup import check_plan, check_processes

PRETRAIN = [name for name in available_recipes() if load_recipe(name).get("kind") == "pretrain"]


def test_the_stage_of_a_curriculum_that_ranks_cannot_share_is_named():
    stages = (Stage(seq_len=64, until_tokens=6144), Stage(seq_len=128, batch_tokens=1536))
    with pytest.raises(UserError, match=r"Stage 2 of the curriculum: a batch of 12 rows .* 8 ranks"):
        check_processes(TrainConfig(batch_tokens=2048, parallel=DdpConfig(), curriculum=stages), 8)


REFUSED = {
    "no start": ("sft", ["init_from=runs/gone"], "is no folder"),
    "optimizer": ("pretrain", ["optim.type=muon", "precision=pure-bf16"], "with optim.type=muon use precision=bf16"),
    "exams to stop early by": ("grpo", ["init_from=RUN", "early_stopping_patience=2", "eval_task=null"], "counts exams: give an"),
    "alert command": ("pretrain", ["monitor.alert_command=no-such-program-here"], "no program 'no-such-program-here'"),
    "the vocabulary of a file": ("pretrain", ["model.vocab_size=400"], "The tokenizer has 512 tokens, the model only 400"),
    "the vocabulary of shards": (
        "pretrain",
        ["tokenizer.path=null", "data={type: prepared, path: RUN/data}", "model.vocab_size=400"],
        "The tokenizer has 512 tokens, the model only 400",
    ),
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
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.yaml").exists() and (case != "no start" or not (tmp_path / "run").exists())


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
    for processes in (2, 4):
        check_processes(config, processes)
    if name == "text-10min":  # it is for two CPU cores: four rows in a batch
        with pytest.raises(UserError, match=r"4 rows .* make the number of rows a multiple of 8"):
            check_processes(config, 8)
    else:
        check_processes(config, 8)


@pytest.fixture
def long_turns(tiny, tmp_path):
    """The tiny questions, every fourth of them with a preface longer than two rows."""
    turns = [json.loads(line) for line in (tiny.root / "turns.jsonl").read_text().splitlines()]
    for turn in turns[::4]:
        turn["question"] = "What was said before has no bearing on this. " * 20 + turn["question"]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(turn) + "\n" for turn in turns), encoding="utf-8")
    return path


def test_answers_that_would_be_cut_from_their_questions_are_refused_with_what_to_set(tiny, runs, long_turns, tmp_path, capsys):
    run = tmp_path / "run"
    command = ["sft", tiny.sft, f"init_from={runs.pretrain}", f"data.path={long_turns}", "--run", str(run)]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "40 of 160 examples are longer than a row of seq_len 128 (the longest has " in said
    assert "set seq_len=256 batch_tokens=512, or leave" in said and "too_long=drop" in said and not (run / "config.yaml").exists()
    assert main([*command, "too_long=drop"]) == 0  # in the same folder
    said = capsys.readouterr().err
    assert "Warning: 40 of 160 examples are longer than a row" in said and "left out (too_long=drop)" in said
    told = [line for line in logged(run) if "train/loss" in line]
    assert told and all(line["train/loss"] > 1.0 and line["train/unlearned_steps"] == 0 for line in told)
    assert any("eval/loss" in line for line in logged(run))


def test_a_row_length_that_is_proposed_works(tiny, long_turns, tmp_path, capsys):
    command = ["sft", tiny.sft, f"data.path={long_turns}", "model.max_seq_len=1024", "--run", str(tmp_path / "run")]
    assert main(command) == 2
    proposed = capsys.readouterr().err.split(": set ")[1].split(", or ")[0]
    assert main([*command, *proposed.split(), "total_tokens=1024"]) == 0


def test_without_held_out_text_a_run_cannot_stop_early(tiny, tmp_path, capsys):
    command = ["sft", tiny.sft, "early_stopping_patience=2", "data.holdout_fraction=0", "--run", str(tmp_path)]
    assert main(command) == 2
    assert "counts evaluations on text that is held out, and nothing is" in capsys.readouterr().err
    assert not (tmp_path / "config.yaml").exists()


def test_dropping_is_refused_and_not_proposed_where_it_leaves_nothing(tiny, long_turns, tmp_path, capsys):
    path = tmp_path / "turns.jsonl"
    rows = [{"question": f"{n} " + "What is it? " * 200, "why": "Clear.", "answer": "(A)"} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = [f"data.path={long_turns}", "seq_len=16", "batch_tokens=64", "too_long=drop"]
    for number, overrides in enumerate(([f"data.path={path}"], short)):
        assert main(["sft", tiny.sft, *overrides, "--run", str(tmp_path / str(number))]) == 2
        said = capsys.readouterr().err
        assert "or leave these examples out" not in said and "leaves nothing to train on or to hold out" in said


def test_text_that_is_read_again_and_again_is_told_at_the_start_and_at_the_end(tiny, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("A cough and a fever.\n")
    run = tmp_path / "run"
    clinic = ["data.type=files", f"data.path={text}", "data.holdout_fraction=0"]
    assert main(["pretrain", tiny.pretrain, *clinic, "--run", str(run)]) == 0
    said = capsys.readouterr().err
    assert "less than one row of seq_len 64" in said
    assert "Note: the run reads its " in said and " times. Up to about 4 times" in said
    assert "Warning: step 12: the run has read its data " in said
    assert "repeated-data" in read_events(run / "events.jsonl")[-1].details["unresolved"]


def test_embeddings_start_from_bigrams_in_a_new_run_alone(tiny, osler, tmp_path, capsys):
    """The first loss is far below that of guessing; resumed or continued runs keep their weights, to the bit."""
    bigrams, told = ["model.embedding_init=bigrams", "log_every_steps=1"], "Embedding and head start from the bigrams of"
    whole, cut, later = tmp_path / "whole", tmp_path / "cut", tmp_path / "later"
    assert osler("pretrain", tiny.pretrain, *bigrams, "--run", whole) == 0
    assert told in capsys.readouterr().err
    losses = [line["train/loss"] for line in logged(whole) if "train/loss" in line]
    assert losses[0] < 0.85 * math.log(512)
    assert osler("pretrain", tiny.pretrain, *bigrams, "--run", cut, fault="train-step:sigterm:5") == EXIT_STOPPED
    capsys.readouterr()
    assert osler("pretrain", "--resume", "--run", cut) == 0
    assert told not in capsys.readouterr().err
    assert_same_run(cut, whole)
    start = [f"init_from={whole}", "model={}", "tokenizer={}", "schedule={type: constant}", "optim.lr=1e-4", "log_every_steps=1"]
    assert osler("pretrain", tiny.pretrain, *start, "--run", later) == 0
    assert told not in capsys.readouterr().err
    assert next(line["train/loss"] for line in logged(later) if "train/loss" in line) < losses[0]
