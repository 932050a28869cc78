"""N steps are k steps, an interruption and N - k steps: the same weights, optimizer and metrics, bit for bit."""

from __future__ import annotations

import shutil

import pytest
import torch
from run_folders import STOPPED, TRAINERS, assert_same_run, at, logged, newest_step, saved_steps

from osler.inference.load import load_model
from osler.records.jsonl import read_events

FOREGROUND = "checkpoint.in_background=false"


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


@pytest.mark.parametrize(
    ("kind", "fault", "saved", "evaluations"),
    [
        # Step 1 is before any line, 5 is logged, 6 is evaluated, 11 leaves half a log window.
        *(("pretrain", f"train-step:sigterm:{step}", [step], step // 10) for step in (1, 5, 6)),
        ("sft", "train-step:sigterm:11", [11], 1),
        # During the save of step 6: its checkpoint is there, and the evaluation that comes after it is made up for.
        ("pretrain", "save-tensors:sigterm:4", [6], 0),
        ("grpo", "save-tensors:sigterm:6", [6], 1),  # a model, an optimizer and the reference of the KL term in each
        # In an evaluation, GRPO's first and everyone's last among them: the stop does not wait for it.
        *(("pretrain", f"evaluate:sigterm:{which}", [6 * which], which - 1) for which in (1, 2)),
        *(("grpo", f"evaluate:sigterm:{which}", [6 * (which - 1)] if which > 1 else [], which - 1) for which in (1, 2, 3)),
    ],
)
def test_stopped_and_resumed(kind, fault, saved, evaluations, launch, finish, tmp_path):
    assert launch(kind, tmp_path, *([FOREGROUND] if fault.startswith("save") else []), fault=fault) == STOPPED
    assert saved_steps(tmp_path)[-1:] == saved
    assert sum("eval/seconds" in line for line in logged(tmp_path)) == evaluations
    assert [event.name for event in read_events(tmp_path / "events.jsonl") if event.kind == "end"] == ["stopped"]
    finish(kind, tmp_path)


MUON = ["optim.type=muon", "optim.momentum_warmup.tokens=2304", "optim.weight_decay_schedule.type=linear"]
MUON += ["optim.decay_embeddings=true", "optim.input_embedding_lr=0.01"]

REPEATS = ["optim.weight_decay_schedule.type=repeats", "optim.decay_embeddings=true", "data.passages=5", "data.examples=2"]


def test_a_run_that_decays_repeats_resumes_exactly_in_a_later_epoch(launch, tmp_path):
    assert launch("pretrain", tmp_path / "whole", *REPEATS) == 0
    assert launch("pretrain", tmp_path / "cut", *REPEATS, fault="train-step:sigterm:9") == STOPPED
    epochs = {line["step"]: line["data/epoch"] for line in logged(tmp_path / "whole") if "data/epoch" in line}
    assert epochs[5] > 1 and saved_steps(tmp_path / "cut")[-1] > 5, "the first epoch was not over"
    assert launch("pretrain", tmp_path / "cut", *REPEATS) == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("options", [["precision=pure-bf16"], ["precision=fp8"], MUON], ids=lambda options: options[0])
def test_every_precision_and_optimizer_resumes_exactly_and_loads_as_usual(options, launch, tmp_path):
    """Muon's momentum and weight decay change from step to step, and the interruption falls into the momentum's warm-up."""
    assert launch("pretrain", tmp_path / "whole", *options) == 0
    assert launch("pretrain", tmp_path / "cut", *options, fault="train-step:sigterm:7") == STOPPED
    assert launch("pretrain", tmp_path / "cut", *options) == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    model = load_model(tmp_path / "cut").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.isfinite(model.logits(model(torch.arange(64)[None]))).all()


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("kind", TRAINERS)
def test_stopped_twice_while_saving(kind, background, launch, finish, tmp_path):
    """In the background the signal may find the run a few steps further; then those are saved too."""
    option = f"checkpoint.in_background={str(background).lower()}"
    assert launch(kind, tmp_path, option, fault="save-tensors:sigterm") == STOPPED
    saved = newest_step(tmp_path)
    assert 4 <= saved < 12 if background else saved == 4
    again = "save-tensors:sigterm:3" if kind == "grpo" else "train-step:sigterm:5"
    assert launch(kind, tmp_path, option, fault=again) in ((STOPPED, 0) if background else (STOPPED,))
    finish(kind, tmp_path, resume=True)


@pytest.mark.parametrize("kind", TRAINERS)
def test_saving_in_the_foreground_gives_the_same_files(kind, finish, whole, tmp_path):
    finish(kind, tmp_path, FOREGROUND)
    for file in sorted(at(whole[kind], 12).glob("*.safetensors")):
        assert file.read_bytes() == (at(tmp_path, 12) / file.name).read_bytes()


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_finished_run_is_left_alone_and_told(kind, launch, whole, tmp_path, capfd):
    run = shutil.copytree(whole[kind], tmp_path / "run")  # even such a start is an event, which other tests would find
    before = (run / "metrics.jsonl").read_bytes()
    assert launch(kind, run, resume=True) == 0
    assert (run / "metrics.jsonl").read_bytes() == before
    told, length = capfd.readouterr().err, "steps" if kind == "grpo" else "total_tokens"
    assert f"{run} is finished, at step 12 (" in told and "Continuing" not in told
    assert f"`osler {kind} --branch {run} --run NEW_FOLDER {length}=MORE`" in told


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_a_moved_run_needs_neither_recipe_nor_start(kind, launch, runs, tmp_path):
    """Everything a resume needs lies in the run folder."""
    (tmp_path / "base").symlink_to(runs.sft)
    assert launch(kind, tmp_path / "first", f"init_from={tmp_path / 'base'}", fault="save-tensors:sigterm") == STOPPED
    (tmp_path / "base").unlink()
    (tmp_path / "first").rename(tmp_path / "second")
    assert launch(kind, tmp_path / "second", resume=True) == 0
    assert load_model(tmp_path / "second").state["step"] == 12


@pytest.mark.slow
def test_sigkill_at_named_and_random_moments_and_ctrl_c(run_cases, tiny, runs, tmp_path):
    given = (tiny.pretrain, tiny.sft, tiny.grpo, runs.pretrain, runs.sft, tmp_path)
    assert run_cases("faults/interrupted_runs.py", *given) == 13
