"""A run taken back to an earlier checkpoint, a new run that branches from one, and what is no run folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_folders import KINDS, STOPPED, assert_same_run, assert_same_tensors, at, logged, saved_steps, untimed

from osler.checkpoint import folders, store
from osler.checkpoint.folders import mark_best
from osler.config.recipe import load_yaml
from osler.records.jsonl import read_events
from osler.runs.resume import go_back
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder


@pytest.fixture
def finished(whole, tmp_path) -> Callable[[str], Path]:
    """A copy of a finished run of a kind: steps 6 (the best or not), 8 and 12 or the like are saved."""
    return lambda kind: shutil.copytree(whole[kind], tmp_path / "run")


@pytest.fixture
def run(finished) -> Path:
    return finished("pretrain")


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_is_refused_as_a_run_folder_and_stays_whole(run, tiny, mistake, monkeypatch):
    checkpoint = at(run, 12)
    for words in (
        ["pretrain", "--resume", "--run", checkpoint],
        ["pretrain", tiny.pretrain, "--run", checkpoint],
        ["pretrain", tiny.pretrain, "--run", checkpoint, "--dry-run"],
        ["pretrain", tiny.pretrain, "--run", checkpoint / "deeper"],
        ["sft", tiny.sft, f"init_from={run}", "--run", checkpoint],
        ["grpo", "--resume", "--run", checkpoint],
        ["quickstart", "--run", checkpoint],
    ):
        text = mistake(*words)
        assert "no run folder but" in text and f"--run {run} --from-step 12" in text, words
        assert f"--branch {checkpoint} --run NEW_FOLDER" in text
    monkeypatch.chdir(checkpoint)
    assert "no run folder but a checkpoint" in mistake("pretrain", "--resume", "--run", ".")
    assert f"Give that run, {run}" in mistake("pretrain", tiny.pretrain, "--run", checkpoint.parent)
    copied = shutil.copytree(checkpoint, run.parent / "a copy")
    assert "no run folder but a checkpoint" in mistake("pretrain", tiny.pretrain, "--run", copied)
    assert "a checkpoint and not a run folder" in mistake("report", copied)
    assert folders.verify(checkpoint) == [] and folders.verify(copied) == []


# -- going back in a run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_went_back_is_one_that_was_stopped_there(kind, finished, whole, osler, capsys):
    run = finished(kind)
    step = saved_steps(run)[0]
    later = [line for line in logged(run) if line["step"] > step]
    back = [kind, "--run", run, "--from-step", step]
    assert osler(*back, "--dry-run") == 0
    text = capsys.readouterr().out
    assert f"# goes on from      step {step}: {at(run, step)}" in text
    assert saved_steps(run)[-1] == 12 and not (run / "set-aside").exists()
    assert osler(*back) == 0
    text = capsys.readouterr().err
    aside = run / "set-aside" / f"after-step-{step}"
    assert f"Back at step {step}." in text and f"set-aside/after-step-{step}" in text and f"from step {step}" in text
    assert_same_run(run, whole[kind])
    assert saved_steps(run)[-1] == 12 and 12 in saved_steps(aside) and folders.verify(at(aside, 12)) == []
    assert logged(aside) == later
    told = [(event.kind, event.step) for event in read_events(run / "events.jsonl")]
    assert told[-3:] == [("rewind", step), ("start", step), ("end", 12)] and ("end", 12) not in told[:-1]
    assert [event.step for event in read_events(aside / "events.jsonl")] == [12]


def test_going_back_twice_keeps_both_and_stopping_names_resume_alone(run, osler, capsys):
    back = ["pretrain", "--run", run, "--from-step", 6]
    mark_best(at(run, 6), "eval/loss", 0.0)  # so that it stays
    for expected in (["after-step-6"], ["after-step-6", "after-step-6-2"]):
        assert osler(*back) == 0
        assert sorted(os.listdir(run / "set-aside")) == expected
    capsys.readouterr()
    assert osler(*back, fault="train-step:sigterm:2") == STOPPED
    text = capsys.readouterr().err
    assert f"Stopped and saved. `osler pretrain --run {run} --resume` goes on" in text and "same command" not in text


def test_a_restart_by_torchrun_goes_back_if_nothing_has_and_once_at_most(run, osler, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # the first start was lost before it went back
    mark_best(at(run, 12), "eval/loss", 0.5)
    for _ in range(2):
        assert osler("pretrain", "--run", run, "--from-step", 6) == 0
        assert os.listdir(run / "set-aside") == ["after-step-6"] and saved_steps(run)[-1] == 12
        assert folders.best_checkpoint(run / "checkpoints").value > 0.5, "the best of before is set aside"


def test_a_step_that_is_not_there_is_refused_with_those_that_are(run, tiny, mistake):
    before, first = times(run), saved_steps(run)[0]
    there = f"there are steps {', '.join(map(str, saved_steps(run)))}"
    back, new = ["pretrain", "--run", run, "--from-step", 7], ["--run", run.parent / "new"]
    for words in (
        back,
        [*back, "--dry-run"],
        [*back, "--resume"],
        ["pretrain", "--branch", at(run, 7), *new],
        ["pretrain", "--branch", run, "--from-step", 7, *new],
    ):
        text = mistake(*words)
        assert "There is no checkpoint of step 7" in text and there in text
    assert "--from-step needs --run" in mistake("pretrain", "--from-step", 6)
    text = mistake("pretrain", tiny.pretrain, "seed=5", "--run", run, "--from-step", first)
    assert "holds another run: seed is 5" in text
    assert "leave out optim.lr=1" in mistake("pretrain", "optim.lr=1", "--run", run, "--from-step", first)
    assert times(run) == before
    (at(run, 12) / "state.json").write_text("{}")
    text = mistake("pretrain", "--run", run, "--from-step", 12)
    assert "of step 12 in" in text and "is damaged" in text and "state.json" in text
    with pytest.raises(UserError, match="there is no other"):
        go_back(RunFolder(run / "nowhere"), 6)


def test_a_kill_while_going_back_loses_nothing(run, finish, monkeypatch):
    """The checkpoint saved last moves first: what is left is a run that was stopped at one of them."""
    moved = []
    rename = Path.rename

    def one_only(self, target):
        if self.name.startswith("step-"):
            if moved:
                raise KeyboardInterrupt
            moved.append(self.name)
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", one_only)
        with pytest.raises(KeyboardInterrupt):
            go_back(RunFolder(run), 6)
    assert moved == [folders.folder_name(12)]
    finish("pretrain", run, resume=True)


# -- a branch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_branch_without_changes_ends_where_its_run_ended(kind, whole, osler, tmp_path, capsys):
    origin, new = whole[kind], tmp_path / "new"
    step = saved_steps(origin)[0]
    before = times(origin)
    command = [kind, "--branch", at(origin, step), "--run", new]
    assert osler(*command, "--dry-run") == 0
    assert f"# branches from     step {step}" in capsys.readouterr().out and not new.exists()
    left = new / ".data.partial" / "clinic"  # by a branch that was killed while it took the shards over
    left.mkdir(parents=True)
    assert osler(*command) == 0
    assert left.exists() == (kind == "grpo")
    text = capsys.readouterr().err
    assert f"A branch of {at(origin, step)}, from step {step}. Nothing differs from its run." in text
    assert_same_tensors(new, origin)
    lines = [[untimed(line) for line in logged(run) if line["step"] > step] for run in (origin, new)]
    assert lines[0] == lines[1] and times(origin) == before
    assert read_events(new / "events.jsonl")[0].kind == "branch"
    assert osler(*command) == 0 and saved_steps(new)[-1] == 12  # the same command: it is finished


def test_a_branch_takes_changes_says_them_and_learns_with_them(whole, osler, tmp_path, capsys):
    """The learning rate of the checkpoint's optimizer does not come back."""
    origin, run = whole["pretrain"], tmp_path / "new"
    changes = ["optim.lr=1e-12", "total_tokens=3584", "monitor.webhook=http://localhost:9/a-secret"]
    assert osler("pretrain", "--branch", origin, *changes, "--run", run) == 0
    text = capsys.readouterr().err
    assert "optim.lr is 1e-12 here and 0.0025 there" in text and "total_tokens is 3584 here and 3072 there" in text
    assert "a-secret" not in text and "a-secret" not in (run / "events.jsonl").read_text()
    config = load_yaml((run / "config.yaml").read_text(), "")
    assert config["branch_from"] == str(at(origin, 12)) and config["optim"]["lr"] == 1e-12
    ends = [store.load(at(folder, step)) for folder, step in ((origin, 12), (run, 14))]
    for name, value in ends[0].tensors["model"].items():
        torch.testing.assert_close(value, ends[1].tensors["model"][name], rtol=0, atol=1e-9)
    assert all(line["train/lr"] < 1e-12 for line in logged(run) if "train/lr" in line)


@pytest.mark.parametrize("named", ["checkpoint", "run"])
def test_a_branch_that_was_stopped_goes_on_without_its_origin(named, run, whole, osler, tmp_path):
    origin = [at(run, 6)] if named == "checkpoint" else [run, "--from-step", 6]
    command = ["pretrain", "--branch", *origin, "--run", tmp_path / "new"]
    assert osler(*command, fault="train-step:sigterm:3") == STOPPED
    shutil.rmtree(run)
    assert osler(*command) == 0
    assert_same_tensors(tmp_path / "new", whole["pretrain"])


def test_a_branch_of_a_run_by_the_clock_has_a_length_of_its_own(launch, osler, tmp_path, mistake):
    origin, run = tmp_path / "origin", tmp_path / "new"
    assert launch("pretrain", origin, "max_minutes=1e-4") == 0
    assert saved_steps(origin)[-1] < 12, "the clock ended the run"
    branch = ["pretrain", "--branch", origin, "--run", run]
    assert "set max_minutes higher" in mistake(*branch) and not run.exists()
    assert osler(*branch, "max_minutes=60", "total_tokens=3072") == 0
    assert saved_steps(run)[-1] == 12


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("pretrain", ["--resume"], "leave out --resume"),
        ("pretrain", ["--from-step", 3], "is step 6, and --from-step says 3: leave one of them out"),
        ("pretrain", ["batch_tokens=512"], "is 1,536 tokens into its run, and with the batches given here it would be 3,072"),
        ("pretrain", ["precision=pure-bf16"], "precision is pure-bf16 here and fp32 in"),
        ("pretrain", ["total_tokens=1536"], "nothing is left to train"),
        ("pretrain", ["optim.type=muon"], "optim.type is muon here and adamw in"),
        ("pretrain", ["data.seed=9"], "The data changed since"),
        ("sft", ["seq_len=64"], "another place in the data"),
        ("grpo", ["steps=6"], "set steps higher"),
        ("grpo", ["tasks=[{task: {type: clinic, split: train, limit: 50}}]"], "The data changed since"),
    ],
)
def test_a_branch_that_cannot_go_on_is_refused(kind, words, message, whole, tmp_path, mistake):
    branch = [kind, "--branch", at(whole[kind], 6), "--run", tmp_path / "new"]
    assert message in mistake(*branch, *words)
    assert not (tmp_path / "new" / "config.yaml").exists()  # the mistake can be mended in the same folder


def test_a_branch_needs_a_new_folder_and_a_run_of_its_kind(whole, tiny, tmp_path, mistake):
    branch = ["pretrain", "--branch", at(whole["pretrain"], 6)]
    assert "--branch needs --run" in mistake(*branch)
    assert f"leave out {tiny.pretrain}" in mistake(*branch, "--run", tmp_path / "new", tiny.pretrain)
    assert "branch it with `osler pretrain --branch`" in mistake("sft", *branch[1:], "--run", tmp_path / "new")
