"""N steps are k steps, an interruption and N - k steps: the same weights, optimizer and metrics, bit for bit."""

from __future__ import annotations

import shutil

import pytest
import torch
from run_folders import KINDS, STOPPED, at, logged, newest_step

from osler.inference.load import load_model


def test_runs_train_at_all(whole, runs):
    """What follows compares runs with each other; here they move, and GRPO is paid."""
    starts = {"pretrain": None, "sft": runs.pretrain, "grpo": runs.sft}
    for kind, start in starts.items():
        lines = logged(whole[kind])
        assert lines[-1]["step"] == 12
        if start is None:
            assert [line["step"] for line in lines if "train/loss" in line] == [5, 10, 12]
            continue
        before, after = load_model(start).model.state_dict(), load_model(whole[kind]).model.state_dict()
        assert any(not torch.equal(value, after[name]) for name, value in before.items())
    assert sum(line.get("reward", 0) for line in lines) > 0.5
    assert any(line.get("groups/effective", 0) > 0 for line in lines)


@pytest.mark.parametrize("kind", ["pretrain", "sft"])
@pytest.mark.parametrize("step", [1, 5, 6, 11])
def test_stopped_after_any_step_and_resumed(kind, step, launch, whole, assert_same_run, tmp_path):
    """Step 1 is before any line, 5 is logged, 6 is evaluated, 11 leaves half a log window."""
    assert launch(kind, tmp_path, fault=f"train-step:sigterm:{step}") == STOPPED
    assert newest_step(tmp_path) == step
    assert launch(kind, tmp_path) == 0
    assert_same_run(tmp_path, whole[kind])


@pytest.mark.parametrize("precision", ["pure-bf16", "fp8"])
def test_every_precision_resumes_exactly_and_loads_as_usual(precision, launch, assert_same_run, tmp_path):
    option = f"precision={precision}"
    assert launch("pretrain", tmp_path / "whole", option) == 0
    assert launch("pretrain", tmp_path / "cut", option, fault="train-step:sigterm:7") == STOPPED
    assert launch("pretrain", tmp_path / "cut", option) == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    model = load_model(tmp_path / "cut").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.isfinite(model.logits(model(torch.arange(64)[None]))).all()


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_stopped_twice_while_saving(kind, background, launch, whole, assert_same_run, tmp_path):
    """In the background the signal may find the run a few steps further; then those are saved too."""
    option = f"checkpoint.in_background={str(background).lower()}"
    assert launch(kind, tmp_path, option, fault="save-tensors:sigterm") == STOPPED
    saved = newest_step(tmp_path)
    assert 4 <= saved < 12 if background else saved == 4
    again = "save-tensors:sigterm:3" if kind == "grpo" else "train-step:sigterm:5"
    assert launch(kind, tmp_path, option, fault=again) in ((STOPPED, 0) if background else (STOPPED,))
    assert launch(kind, tmp_path, resume=True) == 0
    assert_same_run(tmp_path, whole[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_that_was_cut_off_is_made_up_for(kind, launch, whole, assert_same_run, tmp_path):
    """A stop during the save of step 6 leaves its checkpoint and not the evaluation that comes after it."""
    files_per_save = 3 if kind == "grpo" else 2  # model, optimizer and the reference of the KL term
    assert launch(kind, tmp_path, "checkpoint.in_background=false", fault=f"save-tensors:sigterm:{2 * files_per_save}") == STOPPED
    assert not any("eval/seconds" in line and line["step"] == 6 for line in logged(tmp_path))
    assert launch(kind, tmp_path, resume=True) == 0
    assert_same_run(tmp_path, whole[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_saving_in_the_foreground_gives_the_same_files(kind, launch, whole, assert_same_run, tmp_path):
    assert launch(kind, tmp_path, "checkpoint.in_background=false") == 0
    assert_same_run(tmp_path, whole[kind])
    for file in sorted(at(whole[kind], 12).glob("*.safetensors")):
        assert file.read_bytes() == (at(tmp_path, 12) / file.name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_run_is_left_alone(kind, launch, whole, tmp_path):
    run = shutil.copytree(whole[kind], tmp_path / "run")  # even such a start is an event, which other tests would find
    before = (run / "metrics.jsonl").read_bytes()
    assert launch(kind, run, resume=True) == 0
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_a_moved_run_needs_neither_recipe_nor_start(kind, launch, runs, tmp_path):
    """Everything a resume needs lies in the run folder."""
    (tmp_path / "base").symlink_to(runs.sft)
    start = f"init_from={tmp_path / 'base'}"
    assert launch(kind, tmp_path / "first", start, fault="save-tensors:sigterm") == STOPPED
    (tmp_path / "base").unlink()
    (tmp_path / "first").rename(tmp_path / "second")
    assert launch(kind, tmp_path / "second", resume=True) == 0
    assert load_model(tmp_path / "second").state["step"] == 12


def test_sigkill_at_named_and_random_moments_and_ctrl_c(run_cases, tiny, runs, tmp_path):
    given = (tiny.pretrain, tiny.sft, tiny.grpo, runs.pretrain, runs.sft, tmp_path)
    assert run_cases("faults/interrupted_runs.py", *given) == 18
