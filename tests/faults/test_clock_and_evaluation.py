"""A clock that jumps, an evaluation that crashes, and files that rot: the run is the same run."""

from __future__ import annotations

import itertools
import time

import pytest
from run_folders import KINDS, STOPPED, at, flip, logged, newest_step, tear, truncate

from osler.records.jsonl import read_events
from osler.runtime.faults import InjectedError

EVALUATIONS = {"pretrain": 2, "sft": 2, "grpo": 3}


@pytest.mark.parametrize("kind", KINDS)
def test_a_clock_that_jumps_changes_nothing_but_the_time_field(kind, launch, whole, assert_same_run, tmp_path, monkeypatch):
    """Every look at the time of day is a year after or two years before the last one; durations do not ask it."""
    year, looks, before = 365 * 86_400, itertools.count(), time.monotonic()
    jumps = itertools.cycle([year, -2 * year])
    monkeypatch.setattr("time.time", lambda: 1.8e9 + next(jumps) + next(looks))
    assert launch(kind, tmp_path) == 0
    monkeypatch.undo()
    assert_same_run(tmp_path, whole[kind])
    lines = logged(tmp_path)
    assert max(line["time"] for line in lines) - min(line["time"] for line in lines) > 2 * year
    spent = time.monotonic() - before
    assert all(0 < line["eval/seconds"] < spent for line in lines if "eval/seconds" in line)
    assert all(line[name] > 0 for line in lines for name in line if name.startswith("perf/") and name.endswith("_per_second"))


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_that_crashes_costs_nothing(kind, launch, whole, assert_same_run, tmp_path):
    """The one after step 6: its checkpoint is there already, and the next start makes up for it."""
    with pytest.raises(InjectedError):
        launch(kind, tmp_path, fault=f"evaluate:crash:{2 if kind == 'grpo' else 1}")  # GRPO also evaluates what it starts from
    assert newest_step(tmp_path) == 6
    assert launch(kind, tmp_path, resume=True) == 0
    assert_same_run(tmp_path, whole[kind])


@pytest.mark.parametrize(("kind", "which"), [(kind, which) for kind in KINDS for which in range(1, EVALUATIONS[kind] + 1)])
def test_a_stop_does_not_wait_for_an_evaluation(kind, which, launch, whole, assert_same_run, tmp_path):
    """Whichever it is, GRPO's first and everyone's last among them: it is left, and the next start makes up for it."""
    assert launch(kind, tmp_path, fault=f"evaluate:sigterm:{which}") == STOPPED
    assert sum("eval/seconds" in line for line in logged(tmp_path)) == which - 1
    assert [event.name for event in read_events(tmp_path / "events.jsonl") if event.kind == "end"] == ["stopped"]
    assert launch(kind, tmp_path) == 0
    assert_same_run(tmp_path, whole[kind])


@pytest.mark.parametrize(
    ("kind", "file", "damage"),
    [("pretrain", "model.safetensors", flip), ("sft", "state.json", truncate), ("grpo", "optimizer.safetensors", truncate)],
)
def test_a_damaged_checkpoint_costs_its_steps(kind, file, damage, launch, whole, assert_same_run, tmp_path, capsys):
    """The run goes on from the one before, says so, and ends as ever; a torn line of the metrics is nothing either."""
    assert launch(kind, tmp_path, fault="train-step:sigterm:9") == STOPPED
    assert newest_step(tmp_path) == 9
    damage(at(tmp_path, 9) / file)
    tear(tmp_path / "metrics.jsonl")
    assert launch(kind, tmp_path) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"step-000000009 is damaged ({file}" in said and "going on from" in said and "from step 8" in said
    assert_same_run(tmp_path, whole[kind])
    told = [event for event in read_events(tmp_path / "events.jsonl") if event.name == "damaged-checkpoint"]
    assert [event.step for event in told] == [9] and file in told[0].message
