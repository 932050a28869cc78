"""A run taken back to an earlier checkpoint, a new run that branches from one, and what is no run folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from run_folders import KINDS, STOPPED, at, logged, saved_steps, untimed

from osler.checkpoint import store
from osler.checkpoint.folders import mark_best
from osler.cli.main import main
from osler.config.recipe import load_yaml
from osler.records.jsonl import read_events
from osler.runs.rewind import go_back
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of a finished run of a kind: steps 6 (the best or not), 8 and 12 or the like are saved."""

    def copy(kind: str) -> Path:
        return Path(shutil.copytree(whole[kind], tmp_path / "run"))

    return copy


# -- a checkpoint is no run folder -------------------------------------------------------------------------------------


def test_a_checkpoint_is_refused_as_a_run_folder_and_stays_whole(finished, tiny, mistake, monkeypatch):
    run = finished("pretrain")
    checkpoint = at(run, 12)
    for words in (
        ["pretrain", "--resume", "--run", checkpoint],
        ["pretrain", tiny.pretrain, "--run", checkpoint],
        ["pretrain", tiny.pretrain, "--run", checkpoint, "--dry-run"],
        ["pretrain", tiny.pretrain, "--run", checkpoint / "deeper"],
        ["sft", tiny.sft, f"init_from={run}", "--run", checkpoint],
        ["grpo", tiny.grpo, f"init_from={run}", "--run", checkpoint],
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
    assert store.verify(checkpoint) == [] and store.verify(copied) == []


# -- going back in a run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_went_back_is_one_that_was_stopped_there(kind, finished, whole, assert_same_run, capsys):
    run = finished(kind)
    step = saved_steps(run)[0]
    later = [line for line in logged(run) if line["step"] > step]
    assert main([kind, "--run", str(run), "--from-step", str(step)]) == 0
    text = capsys.readouterr().err
    aside = run / "set-aside" / f"after-step-{step}"
    assert f"Back at step {step}." in text and f"set-aside/after-step-{step}" in text and f"from step {step}" in text
    assert_same_run(run, whole[kind])
    assert saved_steps(run)[-1] == 12 and 12 in saved_steps(aside) and store.verify(at(aside, 12)) == []
    assert logged(aside) == later
    told = [(event.kind, event.step) for event in read_events(run / "events.jsonl")]
    assert told[-3:] == [("rewind", step), ("start", step), ("end", 12)] and ("end", 12) not in told[:-1]
    assert [event.step for event in read_events(aside / "events.jsonl")] == [12]


def test_going_back_twice_keeps_both_and_stopping_names_resume_alone(finished, osler, capsys):
    run = finished("pretrain")
    back = ["pretrain", "--run", run, "--from-step", 6]
    for expected in (["after-step-6"], ["after-step-6", "after-step-6-2"]):
        assert osler(*back) == 0
        assert sorted(os.listdir(run / "set-aside")) == expected
    capsys.readouterr()
    assert osler(*back, fault="train-step:sigterm:2") == STOPPED
    text = capsys.readouterr().err
    assert f"Stopped and saved. `osler pretrain --run {run} --resume` goes on" in text and "same command" not in text


def test_a_restart_by_torchrun_goes_back_if_nothing_has_and_once_at_most(finished, monkeypatch):
    run = finished("pretrain")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(["pretrain", "--run", str(run), "--from-step", "6"]) == 0, "the first start was lost before it went back"
    assert os.listdir(run / "set-aside") == ["after-step-6"]
    assert main(["pretrain", "--run", str(run), "--from-step", "6"]) == 0
    assert os.listdir(run / "set-aside") == ["after-step-6"] and saved_steps(run)[-1] == 12


def test_the_best_is_then_the_best_of_what_is_left(finished):
    run = finished("pretrain")
    checkpoints = run / "checkpoints"
    mark_best(at(run, 12), "eval/loss", 0.5)
    go_back(RunFolder(run), 6)
    best = store.best_checkpoint(checkpoints)
    value = next(line["eval/loss"] for line in logged(run) if "eval/loss" in line)
    assert (best.step, best.value) == (6, value)


def test_a_step_that_is_not_there_is_refused_with_those_that_are(finished, tiny, mistake):
    run = finished("pretrain")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    there = ", ".join(map(str, saved_steps(run)))
    for more in ([], ["--dry-run"], ["--resume"]):
        text = mistake("pretrain", "--run", run, "--from-step", 7, *more)
        assert "There is no checkpoint of step 7" in text and f"there are steps {there}" in text
    text = mistake("pretrain", "--branch", run / "checkpoints" / "step-7", "--run", run.parent / "new")
    assert "There is no checkpoint of step 7" in text and f"there are steps {there}" in text
    text = mistake("pretrain", "--branch", run, "--from-step", 7, "--run", run.parent / "new")
    assert "There is no checkpoint of step 7" in text
    assert "--from-step needs --run" in mistake("pretrain", "--from-step", 6)
    text = mistake("pretrain", tiny.pretrain, "seed=5", "--run", run, "--from-step", saved_steps(run)[0])
    assert "holds another run: seed is 5" in text
    assert "leave out optim.lr=1" in mistake("pretrain", "optim.lr=1", "--run", run, "--from-step", saved_steps(run)[0])
    (at(run, 12) / "state.json").write_text("{}")
    text = mistake("pretrain", "--run", run, "--from-step", 12)
    assert "of step 12 in" in text and "is damaged" in text and "state.json" in text
    assert {path for path in run.rglob("*")} == set(before)


def test_a_dry_run_says_what_would_be_set_aside(finished, capsys):
    run = finished("pretrain")
    assert main(["pretrain", "--run", str(run), "--from-step", "6", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert f"step 6: {at(run, 6)}" in text and "# sets aside" in text and "12" in text.partition("sets aside")[2]
    assert saved_steps(run)[-1] == 12 and not (run / "set-aside").exists()


def test_a_kill_while_going_back_loses_nothing(finished, whole, assert_same_run, monkeypatch):
    """The checkpoint saved last moves first: what is left is a run that was stopped at one of them."""
    run = finished("pretrain")
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
    assert moved == [store.folder_name(12)]
    assert main(["pretrain", "--run", str(run), "--resume"]) == 0
    assert_same_run(run, whole["pretrain"])


# -- a branch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_branch_without_changes_ends_where_its_run_ended(kind, whole, tmp_path, capsys):
    origin = whole[kind]
    step = saved_steps(origin)[0]
    before = {path: path.stat().st_mtime_ns for path in origin.rglob("*") if path.is_file()}
    command = [kind, "--branch", str(at(origin, step)), "--run", str(tmp_path / "new")]
    assert main([*command, "--dry-run"]) == 0
    assert f"# branches from     step {step}" in capsys.readouterr().out and not (tmp_path / "new").exists()
    assert main(command) == 0
    text = capsys.readouterr().err
    assert f"A branch of {at(origin, step)}, from step {step}. Nothing differs from its run." in text
    ends = [store.load(at(run, 12)) for run in (origin, tmp_path / "new")]
    for part, tensors in ends[0].tensors.items():
        assert all(torch.equal(value, ends[1].tensors[part][name]) for name, value in tensors.items())
    lines = [[untimed(line) for line in logged(run) if line["step"] > step] for run in (origin, tmp_path / "new")]
    assert lines[0] == lines[1]
    assert {path: path.stat().st_mtime_ns for path in origin.rglob("*") if path.is_file()} == before
    assert read_events(tmp_path / "new" / "events.jsonl")[0].kind == "branch"
    assert main(command) == 0 and saved_steps(tmp_path / "new")[-1] == 12  # the same command: it is finished


def test_a_branch_takes_changes_says_them_and_learns_with_them(whole, tmp_path, capsys):
    """The learning rate of the checkpoint's optimizer does not come back."""
    origin, run = whole["pretrain"], tmp_path / "new"
    changes = ["optim.lr=1e-12", "total_tokens=3584", "monitor.webhook=http://localhost:9/a-secret"]
    assert main(["pretrain", "--branch", str(origin), *changes, "--run", str(run)]) == 0
    text = capsys.readouterr().err
    assert "optim.lr is 1e-12 here and 0.0025 there" in text and "total_tokens is 3584 here and 3072 there" in text
    assert "a-secret" not in text and "a-secret" not in (run / "events.jsonl").read_text()
    config = load_yaml((run / "config.yaml").read_text(), "")
    assert config["branch_from"] == str(at(origin, 12)) and config["optim"]["lr"] == 1e-12
    ends = [store.load(at(folder, step)) for folder, step in ((origin, 12), (run, 14))]
    for name, value in ends[0].tensors["model"].items():
        torch.testing.assert_close(value, ends[1].tensors["model"][name], rtol=0, atol=1e-9)
    assert all(line["train/lr"] < 1e-12 for line in logged(run) if "train/lr" in line)


@pytest.mark.parametrize("named", [["checkpoint"], ["run", "--from-step", "6"]], ids=["by its checkpoint", "by its run"])
def test_a_branch_that_was_stopped_goes_on_without_its_origin(named, whole, osler, tmp_path):
    origin = Path(shutil.copytree(whole["pretrain"], tmp_path / "origin"))
    there = {"checkpoint": at(origin, 6), "run": origin}[named[0]]
    command = ["pretrain", "--branch", there, *named[1:], "--run", tmp_path / "new"]
    assert osler(*command, fault="train-step:sigterm:3") == STOPPED
    shutil.rmtree(origin)
    assert osler(*command) == 0
    ends = [store.load(at(run, 12)) for run in (whole["pretrain"], tmp_path / "new")]
    assert all(torch.equal(value, ends[1].tensors["model"][name]) for name, value in ends[0].tensors["model"].items())


def test_a_branch_of_a_run_by_the_clock_has_a_length_of_its_own(launch, tmp_path, mistake):
    origin, run = tmp_path / "origin", tmp_path / "new"
    assert launch("pretrain", origin, "max_minutes=1e-4") == 0
    begun = saved_steps(origin)[-1]
    assert begun < 12, "the clock ended the run"
    branch = ["pretrain", "--branch", str(origin), "--run", str(run)]
    assert "set max_minutes higher" in mistake(*branch) and not run.exists()
    assert main([*branch, "max_minutes=60", "total_tokens=3072"]) == 0
    assert saved_steps(run)[-1] == 12


def test_a_branch_that_cannot_go_on_is_refused(whole, tiny, tmp_path, mistake):
    branch = ["pretrain", "--branch", at(whole["pretrain"], 6), "--run", tmp_path / "new"]
    assert "--branch needs --run" in mistake(*branch[:3])
    assert f"leave out {tiny.pretrain}" in mistake(*branch, tiny.pretrain)
    assert "leave out --resume" in mistake(*branch, "--resume")
    assert "is step 6, and --from-step says 3: leave one of them out" in mistake(*branch, "--from-step", 3)
    text = mistake(*branch, "batch_tokens=512")
    assert "is 1,536 tokens into its run" in text and "it would be 3,072" in text and "until_tokens=1536" in text
    assert "precision is pure-bf16 here and fp32 in" in mistake(*branch, "precision=pure-bf16")
    assert "nothing left to train" in mistake(*branch, "total_tokens=1536")
    assert "optim.type is muon here and adamw in" in mistake(*branch, "optim.type=muon")
    assert "branch it with `osler pretrain --branch`" in mistake("sft", *branch[1:])
    assert "The data changed since" in mistake(*branch, "data.seed=9")
    assert not (tmp_path / "new" / "config.yaml").exists()  # the mistake can be mended in the same folder
    shutil.rmtree(tmp_path / "new")
    harder = "tasks=[{task: {type: clinic, split: train, limit: 50}}]"
    assert "The data changed since" in mistake("grpo", "--branch", at(whole["grpo"], 6), harder, "--run", tmp_path / "new")
    assert "set steps higher" in mistake("grpo", "--branch", at(whole["grpo"], 6), "steps=6", "--run", tmp_path / "new")
    assert "another place in the data" in mistake("sft", "--branch", at(whole["sft"], 6), "seq_len=64", "--run", tmp_path / "new")
    with pytest.raises(UserError, match="there is no other"):
        go_back(RunFolder(tmp_path / "nowhere"), 6)
