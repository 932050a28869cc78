"""Numbers that are not finite: once, for a while, for ever, and killed while going back; for each kind of run."""

from __future__ import annotations

import pytest
from run_folders import KINDS, STOPPED, logged, newest_step

from osler.checkpoint import store
from osler.records.jsonl import LIFETIME, read_events
from osler.runtime.faults import InjectedError

# GRPO looks at the numbers of every step, the others when they log: every fifth step, and the last.
BAD, OVERRIDES = "train-loss:nan:9-10", ("recovery.max_skipped_steps=2",)
BACK_TO, PASSED_STEPS = 8, 2


def state(folder):
    return store.load(store.resolve(folder)).state["incidents"]


@pytest.mark.parametrize("kind", KINDS)
def test_one_poisoned_batch_is_skipped_and_counted(kind, launch, tmp_path):
    assert launch(kind, tmp_path, *OVERRIDES, fault="train-loss:nan:9") == 0
    assert sum(line.get("train/skipped_steps", 0) for line in logged(tmp_path)) == 1
    (event,) = (event for event in read_events(tmp_path / "events.jsonl") if event.kind not in LIFETIME)
    assert (event.step, event.kind, event.name, event.details["grad_norm"]) == (9, "incident", "skipped-step", None)
    assert len(event.details["questions"]) == 3 if kind == "grpo" else event.details["rows"][1] - event.details["rows"][0] == 3
    assert state(tmp_path)["rollbacks"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_going_back_survives_kills_and_stops_bit_for_bit(kind, launch, assert_same_run, tmp_path):
    calm, killed, stopped = (tmp_path / name for name in ("calm", "killed", "stopped"))
    assert launch(kind, calm, *OVERRIDES, fault=BAD) == 0
    tokens_per_step = {"pretrain": 256, "sft": 512, "grpo": 1}[kind]
    assert state(calm)["rollbacks"] == 1 and state(calm)["data_offset"] == PASSED_STEPS * tokens_per_step

    with pytest.raises(InjectedError):  # dies behind the save, before the metrics of the lost steps are dropped
        launch(kind, killed, *OVERRIDES, fault=f"{BAD},rollback:crash")
    assert newest_step(killed) == BACK_TO and logged(killed)[-1]["step"] == BACK_TO + PASSED_STEPS
    assert launch(kind, killed, *OVERRIDES) == 0
    assert_same_run(killed, calm)

    # The first bad step is in the checkpoint of a stop; what follows from it and the second is the same.
    assert launch(kind, stopped, *OVERRIDES, fault="train-loss:nan:9,train-step:sigterm:9") == STOPPED
    assert launch(kind, stopped, *OVERRIDES, fault="train-loss:nan:1") == 0
    assert_same_run(stopped, calm)


@pytest.mark.parametrize("kind", KINDS)
def test_poison_without_end_ends_with_a_diagnosis(kind, launch, tmp_path, capsys):
    assert launch(kind, tmp_path, *OVERRIDES, fault="train-loss:nan:9-") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "osler: The gradient was not finite for 2 steps in a row (steps 9 to 10)" in said
    assert "gone back 2 times already" in said and "Traceback" not in said
    assert state(tmp_path)["rollbacks"] == 2  # kept, so that the same command does not begin to count anew
    assert launch(kind, tmp_path, *OVERRIDES, fault="train-loss:nan:1-") == 2
