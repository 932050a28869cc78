"""A disk that refuses, files that rot, a clock that jumps, an evaluation that crashes, numbers that are not finite."""

from __future__ import annotations

import itertools
import time

import pytest
from run_folders import STOPPED, TRAINERS, assert_same_run, at, flip, logged, newest_step, saved_steps, tear, truncate

from osler.checkpoint import store
from osler.records.jsonl import LIFETIME, read_events
from osler.runtime.faults import InjectedError

NO_WARMUP = "schedule={type: constant, warmup_tokens: 0}"
# GRPO looks at the numbers of every step, the others when they log: every fifth step, and the last.
BAD, PATIENCE = "train-loss:nan:9-10", "recovery.max_skipped_steps=2"


# -- the clock, evaluations, rot ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_clock_that_jumps_changes_nothing_but_the_time_field(kind, finish, tmp_path, monkeypatch):
    """Every look at the time of day is a year after or two years before the last one; durations do not ask it."""
    year, looks, before = 365 * 86_400, itertools.count(), time.monotonic()
    jumps = itertools.cycle([year, -2 * year])
    with monkeypatch.context() as patched:
        patched.setattr("time.time", lambda: 1.8e9 + next(jumps) + next(looks))
        finish(kind, tmp_path)
    lines = logged(tmp_path)
    assert max(line["time"] for line in lines) - min(line["time"] for line in lines) > 2 * year
    spent = time.monotonic() - before
    assert all(0 < line["eval/seconds"] < spent for line in lines if "eval/seconds" in line)
    assert all(line[name] > 0 for line in lines for name in line if name.startswith("perf/") and name.endswith("_per_second"))


@pytest.mark.parametrize("kind", TRAINERS)
def test_an_evaluation_that_crashes_costs_nothing(kind, launch, finish, tmp_path):
    """The one after step 6: its checkpoint is there already, and the next start makes up for it."""
    with pytest.raises(InjectedError):
        launch(kind, tmp_path, fault=f"evaluate:crash:{2 if kind == 'grpo' else 1}")  # GRPO also evaluates what it starts from
    assert newest_step(tmp_path) == 6
    finish(kind, tmp_path, resume=True)


@pytest.mark.parametrize(
    ("kind", "file", "damage"),
    [("pretrain", "model.safetensors", flip), ("sft", "state.json", truncate), ("grpo", "optimizer.safetensors", truncate)],
)
def test_a_damaged_checkpoint_costs_its_steps(kind, file, damage, launch, finish, tmp_path, capsys):
    """The run goes on from the one before, says so, and ends as ever; a torn line of the metrics is nothing either."""
    assert launch(kind, tmp_path, fault="train-step:sigterm:9") == STOPPED
    assert newest_step(tmp_path) == 9
    damage(at(tmp_path, 9) / file)
    tear(tmp_path / "metrics.jsonl")
    finish(kind, tmp_path)
    said = " ".join(capsys.readouterr().err.split())
    assert f"step-000000009 is damaged ({file}" in said and "going on from" in said and "from step 8" in said
    told = [event for event in read_events(tmp_path / "events.jsonl") if event.name == "damaged-checkpoint"]
    assert [event.step for event in told] == [9] and file in told[0].message


def test_a_checkpoint_that_rots_while_the_run_stands_still_does_not_count(launch, tmp_path, capsys):
    """It is found when it would be counted on, said and recorded, and an older good one stays in its stead."""
    assert launch("pretrain", tmp_path, "checkpoint.keep_last=3", fault="train-step:sigterm:9") == STOPPED
    flip(at(tmp_path, 8) / "model.safetensors")
    assert launch("pretrain", tmp_path, "checkpoint.keep_last=3") == 0
    assert "step-000000008 is damaged (model.safetensors: its content changed" in capsys.readouterr().err
    told = [event for event in read_events(tmp_path / "events.jsonl") if event.name == "damaged-checkpoint"]
    assert [event.step for event in told] == [8]
    assert saved_steps(tmp_path) == [6, 9, 12]


# -- a disk that refuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        *(("pretrain", fault) for fault in ("save-tensors:enospc:3", "save-manifest:ioerror:2", "save-rename:ioerror:2")),
        ("grpo", "save-tensors:enospc:2"),
    ],
)
def test_a_save_that_fails_costs_no_step(kind, fault, finish, tmp_path, capsys):
    """It is told, earlier checkpoints stay, and the run ends as any other; only the best may have been lost."""
    finish(kind, tmp_path, fault=fault, same_best=kind != "pretrain")
    text = capsys.readouterr().err
    assert f"step-00000000{6 if kind == 'pretrain' else 4} could not be saved" in text
    assert "earlier checkpoints are untouched" in text and ("No space left" in text or "Input/output error" in text)
    assert saved_steps(tmp_path)[-2:] == [8, 12]


def test_a_last_save_that_fails_is_an_error(launch, finish, tmp_path, capsys):
    """Otherwise the run would call itself finished, and what follows would use an older model."""
    assert launch("pretrain", tmp_path, fault="save-state:enospc:4") == 2
    text = capsys.readouterr().err
    assert "step-000000012 could not be saved: No space left" in text and "the same command goes on" in text
    assert "Traceback" not in text and saved_steps(tmp_path) == [6, 8]
    finish("pretrain", tmp_path)


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_run_goes_on_where_a_full_disk_keeps_its_notes_out(kind, launch, finish, tmp_path, capsys):
    """Full when the run goes on: what describes it cannot be written, and its torn log is cut in place all the same."""
    assert launch(kind, tmp_path, fault="train-step:sigterm:7") == STOPPED
    tear(tmp_path / "metrics.jsonl")
    capsys.readouterr()
    finish(kind, tmp_path, fault="write-atomic:enospc:1-2")
    text = capsys.readouterr().err
    assert all(f"{name}.json could not be written: No space left" in text for name in ("versions", "model"))
    assert "metrics.jsonl cannot be written" not in text


@pytest.mark.parametrize("write", [1, 2, 3])
@pytest.mark.parametrize("kind", TRAINERS)
def test_a_run_that_finds_the_disk_full_says_so(kind, write, launch, tmp_path, capsys):
    """At its first writes (shards, config, tokenizer, versions) and from then on."""
    assert launch(kind, tmp_path, fault=f"write-atomic:enospc:{write}-") == 2
    text = capsys.readouterr().err
    assert "No space left" in text and "Traceback" not in text


def test_a_stop_that_cannot_save_does_not_claim_to_have_saved(launch, tmp_path, capsys):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    assert launch("pretrain", tmp_path, fault="train-step:sigterm:3") == 2
    text = capsys.readouterr().err
    assert "step-000000003 could not be saved" in text and "Stopped and saved" not in text


# -- numbers that are not finite ---------------------------------------------------------------------------------------


def state(folder):
    return store.load(store.resolve(folder)).state["incidents"]


@pytest.mark.parametrize("kind", TRAINERS)
def test_one_poisoned_batch_is_skipped_and_counted(kind, launch, tmp_path):
    assert launch(kind, tmp_path, PATIENCE, fault="train-loss:nan:9") == 0
    assert sum(line.get("train/skipped_steps", 0) for line in logged(tmp_path)) == 1
    (event,) = (event for event in read_events(tmp_path / "events.jsonl") if event.kind not in LIFETIME)
    assert (event.step, event.kind, event.name, event.details["grad_norm"]) == (9, "incident", "skipped-step", None)
    assert len(event.details["questions"]) == 3 if kind == "grpo" else event.details["rows"][1] - event.details["rows"][0] == 3
    assert state(tmp_path)["rollbacks"] == 0


@pytest.mark.parametrize(("kind", "tokens_per_step"), [("pretrain", 256), ("sft", 512), ("grpo", 1)])
def test_going_back_survives_kills_and_stops_bit_for_bit(kind, tokens_per_step, launch, tmp_path):
    calm, killed, stopped = (tmp_path / name for name in ("calm", "killed", "stopped"))
    assert launch(kind, calm, PATIENCE, fault=BAD) == 0
    assert state(calm)["rollbacks"] == 1 and state(calm)["data_offset"] == 2 * tokens_per_step

    with pytest.raises(InjectedError):  # dies behind the save, before the metrics of the lost steps are dropped
        launch(kind, killed, PATIENCE, fault=f"{BAD},rollback:crash")
    assert newest_step(killed) == 8 and logged(killed)[-1]["step"] == 10
    assert launch(kind, killed, PATIENCE) == 0
    assert_same_run(killed, calm)

    # The first bad step is in the checkpoint of a stop; what follows from it and the second is the same.
    assert launch(kind, stopped, PATIENCE, fault="train-loss:nan:9,train-step:sigterm:9") == STOPPED
    assert launch(kind, stopped, PATIENCE, fault="train-loss:nan:1") == 0
    assert_same_run(stopped, calm)


@pytest.mark.parametrize(
    ("kind", "options", "fault", "words"),
    [
        *((kind, [PATIENCE], "train-loss:nan:9-", "for 2 steps in a row (steps 9 to 10)") for kind in TRAINERS),
        *((kind, [PATIENCE, "optim.lr=1e30", NO_WARMUP], "", "optim.lr=3.3e+29") for kind in TRAINERS),
    ],
)
def test_trouble_without_end_ends_with_a_diagnosis(kind, options, fault, words, launch, tmp_path, capsys):
    """Each such step is skipped, and the message says where the last good weights are; that is not counted anew."""
    assert launch(kind, tmp_path, *options, fault=fault) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "osler: The gradient was not finite for" in said and words in said
    assert str(tmp_path / "checkpoints") in said and "Traceback" not in said
    if fault:
        assert "gone back 2 times already" in said and state(tmp_path)["rollbacks"] == 2
        assert launch(kind, tmp_path, *options, fault="train-loss:nan:1-") == 2
