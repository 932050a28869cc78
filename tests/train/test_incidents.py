"""Going back: which checkpoint, with which data, and what is said when there is no way back."""

from __future__ import annotations

import math
import re
import shutil
import sys
from itertools import islice

import pytest
from run_folders import assert_same_tensors, at, logged

from osler.checkpoint import folders, store
from osler.monitor.config import MonitorConfig, SpikeConfig
from osler.records.jsonl import LIFETIME, read_events
from osler.runs.incidents import last_good
from osler.runs.loop import Loop
from osler.runtime import faults
from osler.runtime.errors import UserError

STEADY = {"log_every_steps": 1, "checkpoint": {"keep_last": 9, "every_tokens": 4 * 256}}


@pytest.fixture
def trained(make_trainer, fault, tmp_path):
    """A function that trains with a fault to the end and returns the trainer."""

    def run(spec, **fields):
        fault(spec)
        trainer = make_trainer(tmp_path, **{**STEADY, **fields})
        assert Loop(trainer).fit()
        return trainer

    return run


def values(folder, name="train/loss"):
    return {line["step"]: line[name] for line in logged(folder) if name in line}


def test_the_run_is_the_one_whose_data_never_had_those_batches(make_trainer, fault, tmp_path):
    """NaN in steps 6 and 7: back to step 4, and on with the eighth batch."""
    clean = make_trainer(tmp_path / "clean", **STEADY)
    batches = clean.loader.batches

    def without_three(step, skipped):
        for number, batch in enumerate(batches(step, skipped)):
            if number not in (4, 5, 6):
                yield batch

    clean.loader.batches = without_three
    assert Loop(clean).fit()
    fault("train-loss:nan:6-7")
    trainer = make_trainer(tmp_path / "run", recovery={"max_skipped_steps": 2}, **STEADY)
    assert Loop(trainer).fit()
    assert (trainer.incidents.rollbacks, trainer.incidents.data_offset) == (1, 3 * 256)
    assert_same_tensors(tmp_path / "run", tmp_path / "clean")
    assert values(tmp_path / "run") == values(tmp_path / "clean")


def test_every_incident_is_in_the_diary(trained, tmp_path, capsys):
    trained("train-loss:nan:6-7", recovery={"max_skipped_steps": 2})
    events = [event for event in read_events(tmp_path / "events.jsonl") if event.kind not in LIFETIME]
    assert [(event.kind, event.name, event.step) for event in events] == [
        ("incident", "skipped-step", 6),
        ("incident", "skipped-step", 7),
        ("rollback", "rollback", 4),
    ]
    skipped, _, back = events
    details = skipped.details
    assert (details["rows"], details["data_offset"]) == ([20, 23], 0)
    assert details["tokens"] == 6 * 256 and details["loss"] is details["grad_norm"] is None
    assert details["lr"] == pytest.approx(values(tmp_path, "train/lr")[6], rel=1e-6)
    assert (back.details["from_step"], back.details["number"], back.details["data_offset"]) == (7, 1, 3 * 256)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("The gradient was not finite: the update was skipped") == 1
    assert "Going back from step 7 to step-000000004 and on with the data after step 7 (rollback 1 of at most 2)." in said


def test_of_skipped_steps_in_a_row_the_first_alone_is_told_outside(trained, tmp_path):
    out, script = tmp_path / "told", tmp_path / "copy.py"
    script.write_text("import sys; open(sys.argv[1], 'a').write(sys.stdin.read())")
    monitor = MonitorConfig(alert_command=f"'{sys.executable}' '{script}' '{out}'")
    trained("train-loss:nan:2-4", monitor=monitor, recovery={"max_skipped_steps": 9})
    noted = [event.step for event in read_events(tmp_path / "events.jsonl") if event.name == "skipped-step"]
    assert noted == [2, 3, 4] and out.read_text().count('"skipped-step"') == 1


def test_no_checkpoint_of_a_bad_moment_is_gone_back_to(trained, tmp_path):
    """Step 8 is saved between two skipped steps: what it holds may be what makes them bad. Step 6 is saved for its evaluation."""
    trainer = trained("train-loss:nan:8-9", recovery={"max_skipped_steps": 2})
    assert trainer.incidents.data_offset == (9 - 6) * 256
    assert store.load(at(tmp_path, 8)).state["incidents"]["good_step"] == 8  # made again since


def test_a_damaged_checkpoint_is_passed_by(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, **STEADY)
    assert Loop(trainer).fit()
    root = tmp_path / "checkpoints"
    assert last_good(root, None)[0] is None
    assert last_good(root, 12)[0] == at(tmp_path, 12)
    aside = at(tmp_path, 12).rename(f"{at(tmp_path, 12)}.replaced")  # by a save that was killed
    assert last_good(root, 12)[0] == aside
    assert last_good(root, 11)[0] == at(tmp_path, 8)
    with open(at(tmp_path, 8) / "model.safetensors", "r+b") as file:
        file.truncate(100)
    assert last_good(root, 8)[0] == at(tmp_path, 6)
    shutil.rmtree(at(tmp_path, 6))
    shutil.rmtree(at(tmp_path, 4))
    assert last_good(root, 8)[0] is None


def test_without_end_it_is_an_error_that_says_everything(make_trainer, fault, tmp_path):
    fault("train-loss:nan:6-")
    trainer = make_trainer(tmp_path, recovery={"max_skipped_steps": 3}, **STEADY)
    with pytest.raises(UserError) as caught:
        Loop(trainer).fit()
    told = str(caught.value)
    assert "The gradient was not finite for 3 steps in a row (steps 5 to 7); those steps changed nothing." in told
    assert "The run has gone back 2 times already, of at most recovery.max_rollbacks=2." in told
    assert all(re.search(rf"\n  step {step}: loss [56]\.\d+, gradient norm", told) for step in (1, 4))
    # Steps 5 to 8, 5 to 7 and 5 to 7 of data: the last batch is the fourteenth.
    assert "step 7: the learning rate was 0.00" in told
    assert "learned from rows 24 ... 27, 1,792 tokens further on in the data" in told
    assert f"are in {tmp_path / 'events.jsonl'}" in told
    good = at(tmp_path, 4)
    assert f"`--run NEW_FOLDER init_from={good} optim.lr=" in told and "middle of the trouble" not in told
    events = read_events(tmp_path / "events.jsonl")
    assert [event.kind for event in events].count("rollback") == 2
    assert (events[-1].kind, events[-1].name, events[-1].step, events[-1].message) == ("end", "failed", 7, told.splitlines()[0])


@pytest.mark.parametrize(
    ("fields", "reason", "advice"),
    [
        ({"checkpoint": {"every_tokens": 10**9}, "eval_every_tokens": 10**9}, "There is no good checkpoint from", "optim.lr="),
        ({"recovery": {"max_skipped_steps": 2, "max_rollbacks": 0}}, "With recovery.max_rollbacks=0 a run", "init_from="),
    ],
)
def test_no_way_back(make_trainer, fault, tmp_path, fields, reason, advice):
    fault("train-loss:nan:6-")
    with pytest.raises(UserError, match=reason) as caught:
        Loop(make_trainer(tmp_path, **{**STEADY, "recovery": {"max_skipped_steps": 2}, **fields})).fit()
    told = str(caught.value)
    assert f"`--run NEW_FOLDER {advice}" in told and ("from the middle of the trouble" in told) == ("init_from" not in told)


def test_a_run_that_only_skipped_ends_with_an_error_however_short_it_is(make_trainer, fault, tmp_path):
    fault("train-loss:nan:1-")
    trainer = make_trainer(tmp_path, recovery={"max_skipped_steps": 20}, **STEADY)
    with pytest.raises(UserError, match=r"not finite for 12 steps in a row \(steps 1 to 12\)[\s\S]*no good step came before"):
        Loop(trainer).fit()
    *_, end = read_events(tmp_path / "events.jsonl")
    assert (end.kind, end.name, end.step) == ("end", "failed", 12)


@pytest.mark.parametrize("action", ["report", "rollback"])
def test_a_loss_that_spikes(make_trainer, tmp_path, capsys, action):
    """The labels of one batch are scrambled beyond guessing: its loss is far above the others."""
    spike = SpikeConfig(action=action, threshold=20.0, window_steps=6)
    trainer = make_trainer(tmp_path, recovery={"spike": spike}, **STEADY)
    loss = trainer.train_step.engine.loss
    calls = []

    def spiking(*batch):
        calls.append(1)
        return loss(*batch) * (9.0 if len(calls) == 9 else 1.0)

    trainer.train_step.engine.loss = spiking
    assert Loop(trainer).fit()
    events = [event for event in read_events(tmp_path / "events.jsonl") if event.kind not in LIFETIME]
    assert (events[0].kind, events[0].name, events[0].step, events[0].details["rows"]) == ("incident", "loss-spike", 9, [32, 35])
    assert events[0].details["deviations"] > 20 and events[0].details["loss"] > 40
    assert [event.kind for event in events[1:]] == (["rollback"] if action == "rollback" else [])
    assert "Warning: step 9: The loss spiked" in capsys.readouterr().err
    assert trainer.incidents.data_offset == (256 if action == "rollback" else 0)
    assert (max(values(tmp_path).values()) > 40) == (action == "report")


def test_checkpoints_of_a_bad_time_do_not_push_out_the_good_one(trained, tmp_path):
    every_step = {"keep_last": 1, "every_tokens": 256}
    trainer = trained("train-loss:nan:6-8", recovery={"max_skipped_steps": 3}, checkpoint=every_step)
    assert (trainer.incidents.rollbacks, trainer.incidents.data_offset) == (1, 3 * 256)
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == [folders.folder_name(12)]


DEATHS = ("train-step:crash:3", "load-batch:crash", "save-tensors:crash:2", "save-rename:crash", "rollback:crash")
DEATHS += ("evaluate:crash", "save-best:crash", "rotate:crash")


def test_bad_data_and_crashes_end_where_bad_data_alone_ends(make_trainer, fault, tmp_path):
    """The fourth and fifth batch, and the eleventh and twelfth, are NaN whoever meets them; every process dies somewhere."""
    settings = {"log_every_steps": 3, "recovery": {"max_skipped_steps": 2}}
    settings["checkpoint"] = {"keep_last": 1, "every_tokens": 256}

    def start(folder):
        trainer = make_trainer(folder, evaluate=lambda: {"eval/loss": 5.0 + trainer.step * 37 % 97 / 97}, **settings)
        loss, batches = trainer.train_step.engine.loss, list(islice(trainer.loader.batches(0, 0), 12))
        bad = [batches[number].ids for number in (3, 4, 10, 11)]
        trainer.train_step.engine.loss = lambda ids, *rest: loss(ids, *rest) * (math.nan if any(map(ids.equal, bad)) else 1.0)
        return trainer

    calm = start(tmp_path / "calm")
    assert Loop(calm).fit() and calm.incidents.rollbacks == 2
    for death in DEATHS:
        loop = Loop(start(tmp_path / "run"))
        found, _ = folders.newest_good(tmp_path / "run" / "checkpoints")
        if found is not None:
            loop.restore(store.load(found))
        fault(death)
        with pytest.raises(faults.InjectedError):
            loop.fit()
    fault("none:crash")
    loop = Loop(start(tmp_path / "run"))
    loop.restore(store.load(folders.newest_good(tmp_path / "run" / "checkpoints")[0]))
    assert loop.fit()
    assert_same_tensors(tmp_path / "run", tmp_path / "calm")
    found, expected = (store.load(store.resolve(tmp_path / name)).state for name in ("run", "calm"))
    assert found["incidents"] == expected["incidents"]
    assert values(tmp_path / "run") == values(tmp_path / "calm")
