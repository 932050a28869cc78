"""The picture: what a run is, how far, whether it lives; within the terminal, and without anything that would upset it."""

import errno
import json
import math
import os
from pathlib import Path
from socket import gethostname

import numpy as np
import pytest

from osler.checkpoint import store
from osler.checkpoint.folders import mark_best
from osler.model.config import ModelConfig
from osler.report.curves import Series
from osler.runtime import format as fmt
from osler.runtime.files import locked
from osler.watch.frame import blocks, columns, frame
from osler.watch.state import DEAD_SECONDS, WatchedFolder
from tests.report.conftest import write_run

NOW = 2_000_000.0
CONFIG = "kind: pretrain\n"
MODEL = {"num_layers": 2, "hidden_size": 64, "vocab_size": 512}


@pytest.fixture
def make_run(tmp_path):
    """A run folder whose newest trace is `ago` seconds before `NOW`."""

    def make(name="run", *, steps=40, ago=1.0, config=CONFIG, **metrics) -> Path:
        usual = {"train/grad_norm": 1.0, "perf/tokens_per_second": 50.0, "train/lr": 0.01, **metrics}
        own = ({"step": s, "tokens": 100 * s, "time": NOW - ago - (steps - s) * 2.0} for s in range(1, steps + 1))
        rows = [{**row, "train/loss": 4.0 - row["step"] / 20, **usual} for row in own]
        versions = {"machine": {"device": "cpu", "dtype": "bfloat16"}}
        folder = write_run(tmp_path / name, rows, config, versions_json=versions, model_json=MODEL)
        age(folder, ago)
        return folder

    return make


def age(folder: Path, ago: float) -> None:
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (NOW - ago, NOW - ago))


def note(folder: Path, step: int, when: float, kind: str, name: str, message: str = "", **details: object) -> None:
    line = {"step": step, "time": when, "kind": kind, "name": name, "message": message, **details}
    with (folder / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def picture(folder: Path, width: int = 300, height: int | None = None) -> str:
    watched = WatchedFolder(folder)
    watched.refresh()
    return "\n".join(line.text for line in frame(watched, NOW, width, height))


def save(folder: Path, step: int, ago: float) -> None:
    store.save(folder / "checkpoints", step, tensors={}, state={"step": step}, files={})
    age(folder, ago)


def test_a_running_run(make_run):
    metrics = {"model/activation_rms/0": 1.0, "model/activation_rms/1": 3.0, "perf/eta_seconds": 80.0}
    text = picture(make_run(**metrics))
    lines = text.splitlines()
    parameters = fmt.count(ModelConfig(**MODEL).num_parameters)
    assert lines[0].endswith(f"run · pretrain · {parameters} parameters · cpu · bfloat16") and lines[1] == "running"
    assert lines[2] == "step 40 · 4,000 of 8,000 tokens · 1 min 18 s so far · 1 min 19 s to go"
    assert lines[3].endswith("50.0%") and lines[3].count("━") == lines[3].count("─") - 1
    assert "loss 2.000" in text and "2.000 to 3.950" in text and "gradient norm 1.000" in text and "tokens/s 50" in text
    assert "Model health: activation_rms 1.000 to 3.000 (most in layer 1)" in text


LONG = DEAD_SECONDS + 60
KILLED = "dead: no sign of it for 21 min 00 s (killed, or the machine went down); last line at step 40"


@pytest.mark.parametrize(
    ("ago", "saved", "steps", "expected"),
    [
        (1.0, None, 40, "running"),
        (1.0, None, 80, "running"),  # the last evaluation is to come
        (90.0, None, 40, "running, no sign of it for 1 min 30 s"),
        (LONG, None, 40, f"{KILLED}, nothing saved"),
        (LONG, 20, 40, f"{KILLED}, saved at step 20"),
    ],
)
def test_what_silence_means(make_run, ago, saved, steps, expected):
    folder = make_run(ago=ago, steps=steps, **{"perf/eta_seconds": 79.0})
    if saved is not None:
        save(folder, saved, ago)
    note(folder, 0, NOW - 1000, "start", "begun")
    age(folder, ago)
    text = picture(folder)
    assert text.splitlines()[1] == expected and ("to go" in text) == expected.startswith("running")


@pytest.mark.parametrize(
    ("name", "message", "expected"),
    [
        ("finished", "The run is complete.", "finished 30 s ago at step 40, saved at step 20: The run is complete."),
        ("stopped", "Stopped.", "stopped 30 s ago at step 40, saved at step 20: Stopped."),
        ("failed", "Lower optim.lr.", "failed 30 s ago at step 40, saved at step 20: Lower optim.lr."),
    ],
)
@pytest.mark.parametrize("steps", [40, 0])  # a run may end before its first line
def test_how_a_run_ended_is_what_it_wrote(make_run, steps, name, message, expected):
    folder = make_run(ago=31.0, steps=steps)
    save(folder, 20, 31.0)
    note(folder, 0, NOW - 200, "start", "begun")
    note(folder, 40, NOW - 30, "end", name, message)
    text = picture(folder)
    assert text.splitlines()[1] == expected and "to go" not in text and text.count(message) == expected.count(message)
    note(folder, 20, NOW - 2, "start", "resumed")
    age(folder, 2.0)
    assert picture(folder).splitlines()[1] == ("running" if steps else "no metrics yet; begun 2.0 s ago")


@pytest.mark.parametrize("change", [{}, {"config": "kind: grpo\nsteps: 50", "reward": 0.5}])
def test_the_length_of_a_run_is_in_steps_or_what_its_speed_allows(make_run, change):
    text = picture(make_run(**change, **{"perf/eta_seconds": 20.0, "eval/test_accuracy": 0.25}))  # at 50 tokens per second
    is_grpo = "reward" in change
    told = "step 40 of 50 · 4,000 tokens" if is_grpo else "step 40 · 4,000 of 5,000 tokens"
    assert f"{told} · 1 min 18 s so far · 19 s to go" in text and "80.0%" in text
    assert "test accuracy 25.0%" in text and ("Reinforcement learning: reward 0.500" in text) == is_grpo


def test_newest_values_say_what_they_are_of_and_are_no_wall_of_names(make_run):
    metrics = {"grad/mean": 9.1e29, "grad/norm/0": 1.0, "rewards/a/mean": 0.5, "update/ratio": 0.25}
    files = {f"data/tokens/file-{n:03}.txt": 100.0 + n for n in range(40)}
    text = picture(make_run(**metrics, **files), 1000)
    assert "Gradients: train/grad_norm 1.000 · grad/mean 9.1e+29 · update/ratio 0.250 · grad/norm 1.000" in text
    assert "tokens/file-005.txt 105 · and 34 more of tokens/<source>" in text and "file-006" not in text


def test_a_silent_run_whose_folder_is_held_runs(make_run):
    pytest.importorskip("fcntl", reason="locks of this kind are Unix's")
    folder = make_run(ago=LONG)
    with (folder / "metrics.jsonl").open("a"):  # whoever has the log open is not the run
        assert picture(folder).splitlines()[1].startswith("dead")
    with locked(folder):
        assert picture(folder).splitlines()[1] == "running, no sign of it for 21 min 00 s"


@pytest.mark.parametrize(
    ("host", "has_locks", "expected"),
    [
        (gethostname(), True, "dead: no sign of it for 1.0 s (killed"),
        ("far", True, "running"),  # on another machine the lock may not be seen
        (gethostname(), False, "running"),
    ],
)
def test_a_run_that_is_killed_on_this_machine_is_dead_at_once(make_run, monkeypatch, host, has_locks, expected):
    """Its start is noted, its end is not, and it holds the folder no more."""
    fcntl = pytest.importorskip("fcntl", reason="locks of this kind are Unix's")

    def no_locks(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    if not has_locks:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    folder = make_run()
    note(folder, 0, NOW - 100, "start", "begun", host=host)
    age(folder, 1.0)
    with locked(folder):
        assert picture(folder).splitlines()[1] == "running"
    watched = WatchedFolder(folder)
    watched.refresh()
    assert watched.root.state(NOW).words.startswith(expected)
    note(folder, 40, NOW, "end", "finished")
    assert watched.root.state(NOW).kind == "running", "an end that is noted after the events were read is no death"


def test_events_and_checkpoints_are_shown(make_run):
    folder = make_run()
    for step in range(1, 9):
        note(folder, step, NOW, "alert", "stalled_loss", f"Number {step}.")
    for number in range(5):
        note(folder, 10, NOW, "note", f"note_{number}", "Noted.")
    save(folder, 20, 1.0)
    save(folder, 40, 1.0)
    mark_best(folder / "checkpoints" / "step-000000020", "eval/loss", 1.0)
    text = picture(folder)
    assert text.count("Noted.") == 5 and "Number" not in text, "the newest"
    note(folder, 11, NOW, "alert", "stalled_loss", "Number 11.\nNext line \x1b[31m\u202e.")
    text = picture(folder)
    assert "Alert: stalled loss, 9 times, at steps 1, 2, …, 8 and 11: Number 11. Next line  [31m ." in text and "\x1b" not in text
    assert "checkpoints: step 40, 20 (best)" in text or "checkpoints: step 20 (best), 40" in text


def test_a_pipeline_shows_the_stage_at_work_and_names_the_others(make_run, tmp_path):
    make_run("story/pretrain", ago=500.0, steps=80)
    make_run("story/sft", ago=1.0, config=CONFIG.replace("pretrain", "sft"))
    config = "kind: pipeline\npretrain: {kind: pretrain}\nsft: {kind: sft}\ntune: {kind: grpo}\nexam: {kind: exam}\n"
    write_run(tmp_path / "story", (), config, stages_json=[{"name": "pretrain", "seconds": 163.0, "what": "x"}])
    lines = picture(tmp_path / "story").splitlines()
    assert "story · pipeline · sft" in lines[0] and lines[1] == "running"
    assert "pretrain 2 min 43 s   ▶ sft   tune to come" in lines


@pytest.mark.parametrize(("width", "height"), [(200, 60), (100, 30), (80, 24), (40, 50), (20, 5), (1, 1), (40, None)])
def test_the_picture_fits_the_terminal_and_a_message_is_whole(make_run, width, height):
    folder = make_run(**{f"rewards/a_rather_long_name_{i}/mean": 0.5 for i in range(12)})
    message = "A long message. " * 30 + "Lower optim.lr."
    note(folder, 3, NOW, "incident", "non_finite", message)
    text = picture(folder, width, height)
    lines = text.split("\n")
    assert len(lines) <= (height or 200) and max(map(len, lines)) <= width
    if height is None or height >= 24:
        assert "running" in lines and any("█" in line for line in lines) and message in " ".join(text.split())


@pytest.mark.parametrize(
    ("points", "drawn"),
    [
        ({0: 1.0, 1: 3.0, 2: 5.0, 3: 7.0}, [2.0, 6.0]),
        ({0: 1.0, 10: 4.0}, [1.0, 2.0, 3.0, 4.0]),
        ({0: 1.0, 1: math.nan, 2: 2.0}, [1.0, math.nan, 2.0]),
        ({7: 5.0}, [5.0, 5.0, 5.0]),
    ],
)
def test_columns_are_means_with_straight_lines_between(points, drawn):
    assert columns(Series(list(points), list(points.values())), len(drawn)).tolist() == pytest.approx(drawn, nan_ok=True)


@pytest.mark.parametrize(
    ("values", "rows", "drawn"),
    [
        (range(8), 1, ["▁▂▃▄▅▆▇█"]),
        ([0.0, 15.0, math.nan], 2, [" █ ", "▁█ "]),
        ([math.nan, math.nan], 2, ["  ", "  "]),
        ([2.0, 2.0], 1, ["▄▄"]),
    ],
)
def test_blocks_rise_with_the_values(values, rows, drawn):
    assert blocks(np.array(values, float), rows) == drawn
