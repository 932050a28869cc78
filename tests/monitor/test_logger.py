"""Lines and alerts reach the file, the events, the log and the trackers; a resumed run goes on as if it had not stopped."""

from __future__ import annotations

import json
import time

import pytest

from osler.monitor.config import MonitorConfig
from osler.monitor.history import RunSettings
from osler.monitor.logger import RunLogger, check_trackers
from osler.records.jsonl import read_events
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder

SETTINGS = RunSettings(lr=1e-3, clip_norm=1.0)
SICK = {"model/dead_units_frac/0": 0.6}
PATIENCE_SECONDS = 300.0


@pytest.fixture(autouse=True)
def patience_at_the_end(monkeypatch):
    monkeypatch.setattr("osler.monitor.logger.CLOSE_SECONDS", PATIENCE_SECONDS)


def steps(run: RunFolder) -> list[int]:
    return [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()]


def test_an_alert_reaches_log_and_events_and_no_tracker_holds_up_the_file(tmp_path, capsys):
    run = RunFolder.create(tmp_path)
    with RunLogger(MonitorConfig(alert_command="false"), run, SETTINGS, step=0) as logger:
        for step in (1, 2, 3):
            logger.write(step, step, SICK)
            assert steps(run)[-1] == step
    (event,) = read_events(run.events)
    assert (event.kind, event.name, event.step, event.details["severity"]) == ("alert", "dead-layers", 1, "critical")
    said = capsys.readouterr().err
    assert said.count("Critical: step 1: 60% of the feed-forward units in layer 0 give nothing") == 1
    assert said.count("Warning: monitor.alert_command failed") == 1


def test_a_resumed_run_does_not_say_again_what_it_said(tmp_path, capsys):
    run = RunFolder.create(tmp_path)
    for step in (0, 3):
        with RunLogger(MonitorConfig(), run, SETTINGS, step=step) as logger:
            for n in range(step + 1, step + 6):
                logger.write(n, n, SICK)
    assert steps(run) == list(range(1, 9))
    assert [event.step for event in read_events(run.events)] == [1] and capsys.readouterr().err.count("Critical: ") == 1


def test_the_advice_for_a_stage_of_a_quickstart_names_the_key_of_its_recipe(tmp_path, capsys):
    for parent, key in (("pretrain", "optim.lr=0.00033"), ("quickstart", "sft.optim.lr=0.00033")):
        run = RunFolder.create(tmp_path / parent / "sft")
        RunFolder(run.root.parent).config.write_text(f"kind: {parent}\n")
        with RunLogger(MonitorConfig(), run, SETTINGS, step=0) as logger:
            logger.write(1, 1, SICK)
        assert f"try {key} (now 0.001)" in capsys.readouterr().err


def test_a_run_that_goes_on_finds_out_anew_how_fast_it_is(tmp_path):
    run = RunFolder(tmp_path)
    for begun, speed in ((0, 5e4), (10, 1e4)):  # the second time on a smaller machine
        with RunLogger(MonitorConfig(), run, SETTINGS, step=begun) as logger:
            assert logger.alerter.history.best_speed == 0.0 and logger.alerter.history.lines == begun
            for step in range(begun + 1, begun + 11):
                logger.write(step, 1_000_000 * step, {"perf/tokens_per_second": speed})
            assert logger.alerter.history.best_speed == speed
    assert read_events(run.events) == []


def test_a_run_that_goes_back_forgets_the_lines_that_it_makes_again(tmp_path):
    run = RunFolder.create(tmp_path)
    with RunLogger(MonitorConfig(), run, SETTINGS, step=0) as logger:
        for step in (*range(1, 9), *range(5, 9)):
            if step == 5:
                logger.rewind(4)
            logger.write(step, step, SICK if step == 6 else {"train/lr": 1.0})
    assert steps(run) == list(range(1, 9))
    assert [event.step for event in read_events(run.events)] == [6, 6]


def test_other_ranks_write_nothing(tmp_path, capsys):
    run = RunFolder.create(tmp_path)
    with RunLogger(MonitorConfig(alert_command="false"), run, SETTINGS, step=0, is_first=False) as logger:
        logger.write(1, 1, SICK)
        logger.events.write(1, "rollback", "rollback", "back to step 0")
        logger.rewind(0)
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().err == ""


@pytest.mark.parametrize("field", ["tensorboard", "wandb", "clearml"])
def test_a_missing_tracker_is_refused_before_training_and_names_the_extra(field, monkeypatch):
    monkeypatch.setattr("osler.monitor.logger.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"pip install -e '\.\[{field}\]'"):
        check_trackers(MonitorConfig(**{field: True if field == "tensorboard" else "project"}))


def test_tensorboard_has_every_step_once_after_a_resume(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="extra `tensorboard`")
    run = RunFolder.create(tmp_path)
    for step in (0, 3):
        with RunLogger(MonitorConfig(tensorboard=True), run, SETTINGS, step=step) as logger:
            for n in range(step + 1, step + 6):
                logger.write(n, n, {"train/loss": 1.0 / n, **(SICK if n == 1 else {})})
        time.sleep(1.1)  # event files are read in the order of the seconds in their names
    events = accumulator.EventAccumulator(str(run.trackers / "tensorboard"))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("train/loss")}
    assert len(events.Scalars("train/loss")) == 8 and found == pytest.approx({n: 1.0 / n for n in range(1, 9)}, rel=1e-6)
    assert "alerts/dead-layers/text_summary" in events.Tags()["tensors"]


@pytest.mark.parametrize(("field", "offline"), [("wandb", {"WANDB_MODE": "offline"}), ("clearml", {"CLEARML_OFFLINE_MODE": "1"})])
def test_a_tracker_without_network_takes_a_run_and_its_resume(field, offline, tmp_path, monkeypatch, capsys):
    pytest.importorskip(field, reason=f"extra `{field}`")
    for name, value in {**offline, "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    run = RunFolder.create(tmp_path / "run")
    run.config.write_text("kind: pretrain\noptim: {lr: 0.1}\n")
    for step in (0, 2):
        with RunLogger(MonitorConfig(**{field: "osler-test"}), run, SETTINGS, step=step) as logger:
            for n in range(step + 1, step + 4):
                logger.write(n, n, {"train/loss": 1.0 / n, **SICK})
    assert "failed" not in capsys.readouterr().err
    if field == "wandb":
        ids = {folder.name.rpartition("-")[2] for folder in (run.trackers / "wandb").glob("offline-run-*")}
        assert ids == {(run.trackers / "wandb.id").read_text()}
