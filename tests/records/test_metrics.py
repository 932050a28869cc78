"""metrics.jsonl survives kills: whole lines stay, torn ones go, a resume logs each step once."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from osler.monitor.alerts import replay
from osler.monitor.history import RunSettings
from osler.records.metrics import MetricsFile
from osler.runtime.errors import UserError


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]


def log(path: Path, first: int, last: int, **how: int | None) -> None:
    with MetricsFile(path, **how) as sink:  # type: ignore[arg-type]
        for step in range(first, last + 1):
            sink.write(step, step * 100, {"train/loss": 1.0 / (step + 1)}, time=1000.0 + step)


def test_a_line_holds_step_tokens_time_and_metrics(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    with MetricsFile(path) as sink:
        sink.write(3, 300, {"train/loss": 0.5, "groups/effective": 7}, time=12.5)
    line = json.loads(path.read_text(encoding="utf-8"))
    assert line == {"step": 3, "tokens": 300, "time": 12.5, "train/loss": 0.5, "groups/effective": 7}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
def test_a_full_disk_costs_lines_and_not_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, full = tmp_path / "metrics.jsonl", Path("/dev/full")
    with MetricsFile(path) as sink:
        sink.write(1, 100, {"train/loss": 2.0})
        sink._file = full.open("a", buffering=1)  # as if the disk had filled up
        sink.write(2, 200, {"train/loss": 1.9})
        sink.write(3, 300, {"train/loss": 1.8})  # there is room again
        sink._file = full.open("a", buffering=1)
        sink.write(4, 400, {"train/loss": 1.7})
    assert steps(path) == [1, 3]
    said = capsys.readouterr().err
    assert said.count("metrics cannot be written") == 1 and "No space left" in said


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = MetricsFile(path)
    sink.write(1, 100, {"train/loss": 2.0})
    assert steps(path) == [1]
    sink.close()
    sink.close()


def test_values_that_are_not_finite_become_null_and_the_file_stays_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as sink:
        sink.write(1, 100, {"train/loss": math.nan, "train/grad_norm": math.inf, "train/lr": 0.1})
    line = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line["train/loss"] is None and line["train/grad_norm"] is None and line["train/lr"] == 0.1


def test_a_metric_may_not_take_the_name_of_a_field(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "metrics.jsonl") as sink, pytest.raises(ValueError, match="tokens"):
        sink.write(1, 100, {"tokens": 5.0})


def test_resume_drops_what_lies_beyond_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log(path, 0, 9)
    log(path, 5, 12, last_step=4)
    assert steps(path) == list(range(13))


def test_resume_from_the_start_drops_everything(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log(path, 0, 9)
    log(path, 0, 3, last_step=-1)
    assert steps(path) == [0, 1, 2, 3]


def test_reopening_keeps_whole_lines_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log(path, 0, 4)
    before = path.read_bytes()
    MetricsFile(path).close()
    MetricsFile(path, last_step=4).close()
    assert path.read_bytes() == before


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_a_torn_last_line_is_dropped_and_the_next_line_is_whole(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    log(path, 0, 4)
    path.write_bytes(path.read_bytes()[:-cut])
    log(path, 5, 5)
    kept = [0, 1, 2, 3, 4, 5] if cut == 1 else [0, 1, 2, 3, 5]  # without its newline only, the line is still whole
    assert steps(path) == kept


def test_bytes_that_are_not_text_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log(path, 0, 1)
    path.write_bytes(path.read_bytes() + b"\x00\xff\x80\n[1]\n{}\n")
    log(path, 2, 2)
    assert steps(path) == [0, 1, 2]


@pytest.mark.parametrize("last_step", [math.inf, 2500])
def test_a_long_log_is_not_held_in_memory(tmp_path: Path, last_step: float) -> None:
    path, wide = tmp_path / "metrics.jsonl", "x" * 2000
    rows = [json.dumps({"step": step, "text": wide}) for step in range(1, 3001)]
    path.write_text("\n".join([*rows, '{"st']), encoding="utf-8")
    tracemalloc.start()
    try:
        MetricsFile(path, last_step=last_step).close()
        replay(RunSettings(lr=1e-3, clip_norm=1.0), path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(steps(path)) == min(last_step, 3000)
    assert peak < path.stat().st_size / 4


def test_a_folder_in_the_files_place_is_the_users_to_fix(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        MetricsFile(tmp_path / "metrics.jsonl")


def test_a_killed_and_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    script = (
        "import os, sys\nfrom osler.records.metrics import MetricsFile\nsink = MetricsFile(sys.argv[1])\n"
        "for step in range(7):\n    sink.write(step, step, {'train/loss': 1.0})\nos.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(path)], cwd=Path(__file__).parents[2], check=False)
    assert killed.returncode == -9
    assert steps(path) == list(range(7)), "what was written before the kill is there"
    log(path, 4, 9, last_step=3)  # the last checkpoint was at step 3
    assert steps(path) == list(range(10))


def test_a_run_that_goes_back_makes_its_lines_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as sink:
        for step in (1, 2, 3, 4, 5, 3, 4, 6):
            if step == 3 and steps(path)[-1] == 5:
                sink.rewind(2)
            sink.write(step, step, {"train/loss": 1.0})
        assert steps(path) == [1, 2, 3, 4, 6]
        sink.rewind(6)
        assert steps(path) == [1, 2, 3, 4, 6]
