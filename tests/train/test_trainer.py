"""The supervised loop: what it saves and when, how it ends, and that it learns."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch
from run_folders import at, logged, saved_steps

from osler.checkpoint import store
from osler.checkpoint.folders import best_checkpoint, by_age
from osler.cli.main import main
from osler.config.recipe import load_yaml
from osler.data.exams import EXAMS_FILE, ExamsInData
from osler.inference.load import load_model
from osler.monitor.config import MonitorConfig
from osler.monitor.metrics import declared_name
from osler.optim.config import AdamWConfig
from osler.optim.schedule import RepeatsWeightDecay
from osler.records.jsonl import EARLY_STOP, read_events
from osler.report.page import build_report
from osler.report.read import read_run
from osler.report.words import attention, model_of
from osler.runs.loop import Loop
from osler.runtime.files import RunFolder
from osler.tokenizer.bpe import Tokenizer
from osler.train.shards import exams_in_data
from osler.watch.state import WatchedFolder


def test_steps_without_a_token_to_learn_count_nowhere(make_trainer, tmp_path):
    """Two steps of three have rows without a learned token: mean, gradient norm, spike window and looks are of the others."""
    fields = {"log_every_steps": 1, "monitor": MonitorConfig(level="full", full_every_steps=1), "total_tokens": 36 * 256}
    trainer, learned = make_trainer(tmp_path, **fields), []
    batches = trainer.loader.batches

    def mostly_prompts(step, skipped_tokens):
        for number, batch in enumerate(batches(step, skipped_tokens), start=step + 1):
            if number % 3:
                batch.labels.fill_(-100)
            else:
                batch.labels[0] = -100  # of a step that counts a row that does not, and that comes first
                learned.append(number)
            yield batch

    trainer.loader.batches = mostly_prompts
    assert Loop(trainer).fit()
    told = {line["step"]: line for line in logged(tmp_path)}
    for step, line in told.items():
        is_learned = step % 3 == 0
        assert line["train/unlearned_steps"] == (not is_learned)
        for name in ("train/loss", "train/perplexity", "train/grad_norm", "model/dead_units_frac/0"):
            assert (name in line) == is_learned
        if is_learned:
            assert 4.0 < line["train/loss"] < 7.0 and line["model/activation_rms/0"] > 0.0 < line["train/entropy"]
    assert len(trainer.incidents.spikes.usual) == len([step for step in learned if step <= 36])
    events = read_events(trainer.run.folder.events)
    assert {event.name for event in events} == {"begun", "nothing-to-learn", "finished"}


def test_decay_of_repeats_begins_with_the_second_epoch(make_trainer, tmp_path):
    optim, decays = AdamWConfig(weight_decay=0.5, weight_decay_schedule=RepeatsWeightDecay()), []
    trainer = make_trainer(tmp_path / "first", optim=optim)
    (size,) = trainer.loader.packings[0].epoch_tokens.values()
    trainer = make_trainer(tmp_path / "second", optim=optim, total_tokens=-(-size // 256) * 256 + 1024)
    trainer.learner.optimizer.register_step_pre_hook(lambda each, *_: decays.append(each.param_groups[0]["weight_decay"]))
    assert Loop(trainer).fit()
    assert decays == [0.0] * -(-size // 256) + [0.5] * 4


@pytest.mark.parametrize(
    ("losses", "fields", "saved", "best"),
    [
        (
            [3.0, 1.0, 2.0, 1.5, 1.0, 4.0],
            {"checkpoint": {"every_tokens": 256, "keep_last": 3}, "eval_every_tokens": 512},
            [4, 10, 11, 12],
            (4, 1.0),
        ),
        ([math.nan, 5.0, math.inf], {"eval_every_tokens": 4 * 256}, [8, 12], (8, 5.0)),
        ([], {"checkpoint": {"keep_every_tokens": 5 * 256, "keep_last": 1}}, [5, 10, 12], None),
        ([], {}, [8, 12], None),
    ],
    ids=["the best is kept", "what is not finite is never the best", "milestones", "nothing held out"],
)
def test_which_checkpoints_are_kept(make_trainer, tmp_path, losses, fields, saved, best):
    measured = iter(losses)
    assert Loop(make_trainer(tmp_path, evaluate=lambda: {"eval/loss": next(measured)} if losses else {}, **fields)).fit()
    assert saved_steps(tmp_path) == saved
    found = best_checkpoint(tmp_path / "checkpoints")
    assert (found and (found.step, found.value)) == best
    assert any("eval/seconds" in line for line in logged(tmp_path)) == bool(losses)


def test_the_best_is_remembered_across_processes(make_trainer, tmp_path):
    first = make_trainer(tmp_path, evaluate=lambda: {"eval/loss": 1.0}, total_tokens=6 * 256)
    assert Loop(first).fit()
    second = Loop(make_trainer(tmp_path, evaluate=lambda: {"eval/loss": 2.0}))
    second.restore(store.load(store.resolve(tmp_path)))
    assert second.fit()
    assert best_checkpoint(tmp_path / "checkpoints").step == 6


def test_metrics_are_declared_and_every_step_is_in_one_line(make_trainer, tmp_path):
    scores = {"evaluate": lambda: {"eval/loss": 1.0}, "exam_score": lambda: {"eval/validation_accuracy": 0.5}}
    assert Loop(make_trainer(tmp_path, **scores, loader_workers=1)).fit()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]
    found = logged(tmp_path)
    names = {name for line in found for name in line} - {"step", "tokens", "time"}
    assert [name for name in sorted(names) if declared_name(name) is None] == []
    trained = [line for line in found if "train/loss" in line]
    assert [line["step"] for line in trained] == [5, 10, 12]
    assert all(math.isfinite(line["train/loss"]) and line["tokens"] == line["step"] * 256 for line in trained)


def test_init_from_brings_its_model_and_tokenizer(tiny, runs, tmp_path, capsys):
    """Shape and tokenizer of the recipe give way to those of the checkpoint, in the plan, in training and in the report."""
    other, run = tmp_path / "other.json", tmp_path / "run"
    other.write_bytes(Tokenizer.train(["quite another text"] * 9, 300).to_bytes())
    changes = ["model.num_layers=5", f"tokenizer.path={other}", "optim.lr=1e-12", "total_tokens=512"]
    command = ["sft", tiny.sft, f"init_from={runs.pretrain}", *changes, "--run", str(run)]
    assert main([*command, "--dry-run"]) == 0
    text, warning = capsys.readouterr()
    assert "model.* changes nothing here" in warning and "# parameters        51,200" in text
    for change in ("model={num_layers: 5}", "model.attention.type=dense"):
        assert main([*command[:3], change, *command[-2:], "--dry-run"]) == 0
        assert "model.* changes nothing here" in capsys.readouterr().err
    assert f"# starts from       {store.resolve(runs.pretrain)}, its model" in text
    assert load_yaml(text, "plan")["model"]["num_layers"] == 2 and "tokenizer:" not in text and not run.exists()

    assert main(command) == 0
    before, after = load_model(runs.pretrain), load_model(run)
    assert after.model.config == before.model.config
    assert after.tokenizer.fingerprint == before.tokenizer.fingerprint == Tokenizer.load(run / "tokenizer.json").fingerprint
    old = before.model.state_dict()
    for name, value in after.model.state_dict().items():
        torch.testing.assert_close(value, old[name], rtol=0, atol=1e-9)
    assert model_of(read_run(run)) == after.model.config
    page = build_report(run).read_text(encoding="utf-8")
    assert "51,200 parameters (2 layers of width 32)" in page and "num_layers: 2" in page


def test_rows_longer_than_the_started_model_allows(tiny, runs, tmp_path, capsys):
    changes = [f"init_from={runs.pretrain}", "model.max_seq_len=64", "seq_len=512"]  # the model section counts for nothing
    assert main(["sft", tiny.sft, *changes, "--run", str(tmp_path)]) == 2
    assert "seq_len 512 is longer than the 256 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["total_tokens=256"], "warmup_tokens 512 is not below total_tokens 256"),
        (["total_tokens=256", "schedule.warmup_tokens=0"], ""),
    ],
)
def test_a_run_that_was_shortened_too_far_is_pointed_out(tiny, tmp_path, capsys, overrides, told):
    assert main(["pretrain", tiny.pretrain, *overrides, "--run", str(tmp_path)]) == 0
    said = capsys.readouterr().err
    assert told in said and ("Warning" in said) == bool(told) and "Note:" not in said


@pytest.fixture
def counted_clock(monkeypatch):
    """A clock that goes on by a fiftieth of a second whenever somebody looks: a real one depends on the machine's load."""
    looks = itertools.count()
    monkeypatch.setattr("time.monotonic", lambda: next(looks) / 50)


def test_minutes_are_kept_and_shared_between_processes(tiny, launch, tmp_path, counted_clock):
    never = ["eval_every_tokens=100_000_000", "checkpoint.every_tokens=100_000_000"]
    minutes = ["max_minutes=0.1", "total_tokens=100_000_000", *never]
    assert launch("pretrain", tmp_path, *minutes, fault="train-step:sigterm:60") == 130
    stopped = store.load(store.resolve(tmp_path)).state
    assert 60 / 50 < stopped["seconds"] < 3
    assert main(["pretrain", tiny.pretrain, *minutes, "--run", str(tmp_path)]) == 0
    end = store.load(store.resolve(tmp_path)).state
    assert 0.9 * 6.0 * 0.97 < end["seconds"] < 6.0
    assert end["step"] > 60 and end["tokens"] >= end["total_tokens"] != 100_000_000
    assert min(line["train/lr"] for line in logged(tmp_path) if "train/lr" in line) < 0.2 * 2.5e-3  # planned to the end


@pytest.mark.parametrize(
    ("more", "limit"),
    [
        (["max_minutes=0.02", "total_tokens=100_000_000"], "what max_minutes has time for: "),
        (["max_minutes=60"], "total_tokens 3,072, so"),
    ],
)
def test_minutes_that_end_inside_the_warm_up_are_pointed_out(more, limit, tiny, tmp_path, counted_clock, capsys):
    assert main(["pretrain", tiny.pretrain, *more, "schedule.warmup_tokens=10_000_000", "--run", str(tmp_path)]) == 0
    assert capsys.readouterr().err.count(f"schedule.warmup_tokens 10,000,000 is not below {limit}") == 1


@pytest.mark.parametrize(
    ("minutes", "total_tokens", "ended_by"), [("0.02", "100_000_000", "max_minutes"), ("60", "3072", "total_tokens")]
)
def test_the_hint_of_a_finished_run_names_what_ended_it(minutes, total_tokens, ended_by, tiny, tmp_path, counted_clock, capsys):
    command = ["pretrain", tiny.pretrain, f"max_minutes={minutes}", f"total_tokens={total_tokens}", "--run", str(tmp_path)]
    assert main(command) == 0 == main(command)
    assert f"NEW_FOLDER {ended_by}=MORE`" in capsys.readouterr().err


def test_a_run_keeps_the_precision_it_resolved(tiny, launch, tmp_path):
    """``auto`` is decided by a timing; a run that goes on elsewhere must not change its arithmetic."""
    assert launch("pretrain", tmp_path, "precision=bf16", fault="train-step:sigterm:7") == 130
    config = tmp_path / "config.yaml"
    config.write_text(config.read_text().replace("precision: bf16", "precision: auto"))
    assert main(["pretrain", "--run", str(tmp_path), "--resume"]) == 0
    versions = json.loads((store.resolve(tmp_path) / "versions.json").read_text())
    assert versions["machine"]["dtype"] == "bfloat16"
    assert {"processor", "cores", "memory_bytes", "torch", "threads", "device"} <= versions["machine"].keys()
    assert load_model(tmp_path).state["step"] == 12


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], ["# steps             12 of 256 tokens", "# parameters        51,200", "# length            3,072 tokens\n"]),
        (["max_minutes=2"], ["# length            2 minutes (at most 3,072 tokens)\n"]),
    ],
)
def test_dry_run_says_what_follows_and_touches_nothing(tiny, tmp_path, capsys, overrides, told):
    assert main(["pretrain", tiny.pretrain, *overrides, "--run", str(tmp_path / "run"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert all(line in text for line in told) and not (tmp_path / "run").exists()


def test_the_first_step_is_not_part_of_the_speed(make_trainer, tmp_path, monkeypatch):
    """It takes a thousand seconds more on this clock, and the others far less."""
    monotonic, late = time.monotonic, [0.0]
    monkeypatch.setattr("time.monotonic", lambda: monotonic() + late[0])
    trainer = make_trainer(tmp_path, log_every_steps=2)
    engine = trainer.train_step.engine
    loss = engine.loss

    def slow_at_first(*batch):
        late[0] = 1000.0
        return loss(*batch)

    engine.loss = slow_at_first
    assert Loop(trainer).fit()
    speeds = [line["perf/tokens_per_second"] for line in logged(tmp_path) if "perf/tokens_per_second" in line]
    assert len(speeds) == trainer.step // 2 and min(speeds) > trainer.config.batch_tokens / 100


def test_a_signal_after_the_vote_of_a_step_stops_the_next(make_trainer, tmp_path):
    """Ranks vote once per step; one that acted on a later signal alone would leave the others waiting."""
    trainer = make_trainer(tmp_path, log_every_steps=2)
    shown = trainer.shown

    def signalled(line):
        os.kill(os.getpid(), signal.SIGTERM)
        return shown(line)

    trainer.shown = signalled
    assert not Loop(trainer).fit()
    assert trainer.step == 3 and saved_steps(tmp_path) == [3]


def test_how_a_run_is_computed_may_change_between_starts(tiny, launch, tmp_path, capsys):
    """More workers, smaller micro-batches and another strategy make no other run, with --resume too."""
    assert launch("pretrain", tmp_path, fault="train-step:sigterm:3") == 130
    assert launch("pretrain", tmp_path, "loader_workers=0", "parallel.type=ddp", fault="train-step:sigterm:3") == 130
    assert main(["pretrain", "micro_batch_tokens=64", "parallel.type=fsdp", "--run", str(tmp_path), "--resume"]) == 0
    assert capsys.readouterr().err.count("parallel.type=fsdp changes nothing here") == 1, "one process shares with nobody"
    assert [line["step"] for line in logged(tmp_path) if "train/loss" in line] == [5, 10, 12]
    assert main(["pretrain", tiny.pretrain, "seed=1", "--run", str(tmp_path)]) == 2
    assert "seed is 1 here and 0 there" in capsys.readouterr().err


def test_a_run_that_ends_worse_than_guessing_says_so_wherever_its_end_is_told(tiny, tmp_path, capsys):
    run = RunFolder(tmp_path / "run")
    command = ["pretrain", tiny.pretrain, "optim.lr=10", "total_tokens=1280", "eval_every_tokens=1280", "--run", str(run.root)]
    assert main(command) == 0
    said = capsys.readouterr().err
    message = "The run is complete, but these alerts still hold: worse-than-guessing."
    assert f"{message}\n  Critical: step 5: the run ends with a loss of " in said and said.index(message) < said.index("Done: ")
    end = read_events(run.events)[-1]
    assert end.details["unresolved"] == ["worse-than-guessing"]
    watched = WatchedFolder(run.root)
    watched.refresh()
    state = watched.current.state(end.time + 1)
    assert state.kind == "finished" and message in state.words
    assert any(message in text for text in attention(read_run(run.root)))


def test_a_run_that_stops_early_says_so_wherever_its_end_is_told(tiny, tmp_path, capsys):
    """Its last checkpoint is a milestone. A later start leaves it there, a branch goes on."""
    run, intervals = RunFolder(tmp_path / "run"), [f"eval_every_tokens={256 * 2}", f"checkpoint.keep_every_tokens={256 * 11}"]
    words = ["early_stopping_patience=1", "optim.lr=10", *intervals]
    command = ["pretrain", tiny.pretrain, *words, "--run", str(run.root)]
    assert main(command) == 0
    end = logged(run.root)[-1]
    assert end["step"] < 10
    [event] = [event for event in read_events(run.events) if event.kind == EARLY_STOP]
    assert event.step == end["step"] and event.message in build_report(run.root).read_text(encoding="utf-8")
    assert [entry.step for entry in by_age(run.checkpoints) if entry.milestone] == [end["step"]]
    watched = WatchedFolder(run.root)
    watched.refresh()
    done, total, _ = watched.current.progress
    assert done == total == end["tokens"] and watched.current.state(event.time).words.startswith("finished early ")
    before = (logged(run.root), saved_steps(run.root))
    capsys.readouterr()
    assert main(command) == 0
    said = capsys.readouterr().err
    assert f"{run.root} is finished, at step {end['step']} (" in said and "NEW_FOLDER early_stopping_patience=MORE" in said
    assert "Stopped early" not in said and (logged(run.root), saved_steps(run.root)) == before
    branch = ["--branch", str(run.root), "--run", str(tmp_path / "branch"), "early_stopping_patience=null", "optim.lr=1e-3"]
    assert main(["pretrain", *branch]) == 0 and load_model(tmp_path / "branch").state["step"] == 12


@pytest.mark.parametrize(
    ("of_start", "allowed", "of_origin", "found"),
    [
        (ExamsInData(frozenset("ab"), frozenset("b")), False, None, "ab"),  # of data before a change that was allowed once
        (None, False, ExamsInData(frozenset("ab"), frozenset("b")), "ab"),  # its data were being prepared
        (None, False, None, None),  # the same, and its start is gone
        (None, True, ExamsInData(frozenset("ab"), frozenset("b")), None),  # of other data, of which nothing is known
    ],
)
def test_what_a_model_learned_before_is_known_after_every_resume(config, tmp_path, of_start, allowed, of_origin, found):
    saved = {}
    for name, known in {"run": of_start, "origin": of_origin}.items():
        files = {} if known is None else known.as_files()
        if name == "run" or known is not None:
            saved[name] = store.load(store.save(tmp_path / name / "checkpoints", 1, tensors={}, state={}, files=files))
    (tmp_path / EXAMS_FILE).write_bytes(ExamsInData(frozenset("abc"), frozenset("a")).as_files()[EXAMS_FILE])
    config = replace(config, init_from=None if of_start else str(tmp_path / "origin"), allow_data_change=allowed)
    now = ExamsInData.from_files(exams_in_data(config, tmp_path, saved["run"])())
    assert (now.checked, now.found) == (frozenset("ab" if found else ""), frozenset(found or "a"))


def test_checkpoints_of_a_stream_know_of_exams_from_the_end_of_its_preparation_on(config, make_trainer, tmp_path):
    """The data are being prepared until the evaluation of step 6, before which there is a checkpoint."""
    known, shards = ExamsInData(frozenset("ab"), frozenset("b")), tmp_path / "shards"
    shards.mkdir()

    def evaluate() -> dict[str, float]:
        (shards / EXAMS_FILE).write_bytes(known.as_files()[EXAMS_FILE])
        return {"eval/loss": 5.0}

    trainer = make_trainer(tmp_path / "run", evaluate=evaluate, checkpoint={"keep_last": 4, "every_tokens": 4 * 256})
    trainer.run.more_files = exams_in_data(config, shards, None)
    assert Loop(trainer).fit()
    found = [ExamsInData.from_files(store.load(at(tmp_path / "run", step), names=[]).files) for step in (4, 6, 8, 12)]
    assert found == [ExamsInData(), ExamsInData(), known, known]
