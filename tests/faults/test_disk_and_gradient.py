"""A disk that refuses and a gradient that is not finite: what is lost, what is kept, what the run says."""

from __future__ import annotations

import pytest
from run_folders import KINDS, STOPPED, at, logged, saved_steps, tear

from osler.checkpoint import store
from osler.inference.load import load_model


@pytest.mark.parametrize("fault", ["save-tensors:enospc:3", "save-manifest:ioerror:2", "save-rename:ioerror:2"])
def test_a_save_that_fails_costs_no_step(fault, launch, whole, tmp_path, capsys):
    """The second of three saves fails: the first checkpoint stays, the run says so and ends as any other."""
    assert launch("pretrain", tmp_path, fault=fault) == 0
    text = capsys.readouterr().err
    assert "step-000000006 could not be saved" in text and "earlier checkpoints are untouched" in text
    assert "No space left" in text or "Input/output error" in text
    assert saved_steps(tmp_path) == [8, 12]
    last = store.load(store.resolve(tmp_path)).tensors
    expected = store.load(store.resolve(whole["pretrain"])).tensors
    assert all(value.equal(expected[part][name]) for part, tensors in last.items() for name, value in tensors.items())


def test_a_last_save_that_fails_is_an_error(launch, whole, assert_same_run, tmp_path, capsys):
    """Otherwise the run would call itself finished, and what follows would use an older model."""
    assert launch("pretrain", tmp_path, fault="save-state:enospc:4") == 2
    text = capsys.readouterr().err
    assert "step-000000012 could not be saved: No space left" in text and "the same command goes on" in text
    assert "Traceback" not in text and saved_steps(tmp_path) == [6, 8]
    assert launch("pretrain", tmp_path) == 0
    assert_same_run(tmp_path, whole["pretrain"])


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_a_save_that_fails_costs_the_others_no_step_either(kind, launch, whole, assert_same_run, tmp_path, capsys):
    assert launch(kind, tmp_path, fault="save-tensors:enospc:2") == 0
    assert "could not be saved: No space left" in capsys.readouterr().err
    assert_same_run(tmp_path, whole[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_where_a_full_disk_keeps_its_notes_out(kind, launch, whole, assert_same_run, tmp_path, capsys):
    """Full when the run goes on: neither can its versions be written nor its torn log be healed. Later there is room again."""
    assert launch(kind, tmp_path, fault="train-step:sigterm:7") == STOPPED
    tear(tmp_path / "metrics.jsonl")
    capsys.readouterr()
    assert launch(kind, tmp_path, fault="write-atomic:enospc:1-2") == 0
    text = capsys.readouterr().err
    assert "versions.json could not be written: No space left" in text and "metrics.jsonl cannot be written" in text
    assert_same_run(tmp_path, whole[kind])


@pytest.mark.parametrize("write", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_finds_the_disk_full_says_so(kind, write, launch, tmp_path, capsys):
    """At its first writes (shards, config, tokenizer, versions) and from then on."""
    assert launch(kind, tmp_path, fault=f"write-atomic:enospc:{write}-") == 2
    text = capsys.readouterr().err
    assert "No space left" in text
    assert "Traceback" not in text


def test_a_stop_that_cannot_save_does_not_claim_to_have_saved(launch, tmp_path, capsys):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    assert launch("pretrain", tmp_path, fault="train-step:sigterm:3") == 2
    text = capsys.readouterr().err
    assert "step-000000003 could not be saved" in text and "Stopped and saved" not in text


@pytest.mark.parametrize("kind", ["pretrain", "grpo"])
def test_a_gradient_that_stays_infinite_ends_the_run(kind, launch, tmp_path, capsys):
    """Each such step is skipped; after ``max_skipped_steps`` of them the run ends and says where the last good weights are."""
    warmup = ["schedule={type: constant, warmup_tokens: 0}"]
    assert launch(kind, tmp_path, "optim.lr=1e30", "recovery.max_skipped_steps=3", *warmup) == 2
    text = " ".join(capsys.readouterr().err.split())
    assert "The gradient was not finite for" in text and "optim.lr=3.3e+29" in text
    assert str(tmp_path / "checkpoints") in text and "Traceback" not in text


def test_skipped_steps_are_counted_and_weights_stay(launch, tmp_path):
    """One wild step, then only skipped ones: the weights of the checkpoints no longer change."""
    warmup = ["schedule={type: constant, warmup_tokens: 0}", "recovery.max_skipped_steps=100", "checkpoint.keep_last=9"]
    assert launch("pretrain", tmp_path, "optim.lr=1e30", *warmup) == 0
    assert 9 <= sum(line.get("train/skipped_steps", 0) for line in logged(tmp_path)) <= 11
    states = [load_model(at(tmp_path, step)).model.state_dict() for step in (4, 12)]
    assert all(value.equal(states[1][name]) for name, value in states[0].items())
