"""A clock that jumps, an evaluation that crashes, and files that rot: the run is the same run."""

from __future__ import annotations

import itertools
import json
import time

import pytest

from osler.checkpoint import store
from osler.runtime.faults import InjectedError

KINDS = ("pretrain", "sft", "grpo")
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
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(line["time"] for line in lines) - min(line["time"] for line in lines) > 2 * year
    spent = time.monotonic() - before
    assert all(0 < line["eval/seconds"] < spent for line in lines if "eval/seconds" in line)
    assert all(line[name] > 0 for line in lines for name in line if name.startswith("perf/") and name.endswith("_per_second"))


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_that_crashes_costs_nothing(kind, launch, whole, assert_same_run, tmp_path):
    """The one after step 6: its checkpoint is there already, and the next start makes up for it."""
    with pytest.raises(InjectedError):
        launch(kind, tmp_path, fault=f"evaluate:crash:{2 if kind == 'grpo' else 1}")  # GRPO also evaluates what it starts from
    assert store.newest_good(tmp_path / "checkpoints")[0].name == store.folder_name(6)
    assert launch(kind, tmp_path, resume=True) == 0
    assert_same_run(tmp_path, whole[kind])


@pytest.mark.parametrize(("kind", "which"), [(kind, which) for kind in KINDS for which in range(1, EVALUATIONS[kind] + 1)])
def test_a_stop_does_not_wait_for_an_evaluation(kind, which, launch, whole, assert_same_run, tmp_path):
    """Whichever it is, GRPO's first and everyone's last among them: it is left, and the next start makes up for it."""
    assert launch(kind, tmp_path, fault=f"evaluate:sigterm:{which}") == 130
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert sum("eval/seconds" in line for line in lines) == which - 1
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["name"] for event in events if event["kind"] == "end"] == ["stopped"]
    assert launch(kind, tmp_path) == 0
    assert_same_run(tmp_path, whole[kind])


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("kind", "file", "damage"),
    [("pretrain", "model.safetensors", flip), ("sft", "state.json", truncate), ("grpo", "optimizer.safetensors", truncate)],
)
def test_a_damaged_checkpoint_costs_its_steps(kind, file, damage, launch, whole, assert_same_run, tmp_path, capsys):
    """The run goes on from the one before, says so, and ends as ever; a torn line of the metrics is nothing either."""
    assert launch(kind, tmp_path, fault="train-step:sigterm:9") == 130
    assert store.newest_good(tmp_path / "checkpoints")[0].name == store.folder_name(9)
    damage(tmp_path / "checkpoints" / store.folder_name(9) / file)
    with open(tmp_path / "metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 10, "tok')
    assert launch(kind, tmp_path) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"step-000000009 is damaged ({file}" in said and "going on from" in said
    assert_same_run(tmp_path, whole[kind])
