"""Plan against actual: of runs in their folders, and of a probe."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from osler.cli.plan import plan
from osler.config.devices import this_machine
from osler.config.recipe import load_recipe
from osler.config.schema import decode
from osler.model.config import ModelConfig
from osler.plan.actual import PLAN, compare, keep_plan, planned, table_of, working_seconds
from osler.plan.estimate import Estimate, exact
from osler.plan.plan import Measured, Where
from osler.plan.planner import plan_of
from osler.plan.probe import (
    FEWEST_GRPO_STEPS,
    FEWEST_STEPS,
    MOST_GRPO_STEPS,
    PASSES,
    evaluation_share,
    shortened,
    shortened_grpo,
    step_times,
    steps_of,
)
from osler.plan.speed import Pace
from osler.records.jsonl import END, OUT_OF_MEMORY, START, Event, MetricsLine, read_events
from osler.report.page import build_report
from osler.rl.config import GrpoConfig
from osler.runs.folder import read_config, taken
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder, read_json
from osler.train.config import TrainConfig

HERE = Where(this_machine())


def test_every_run_keeps_its_plan_and_its_report_compares_it(runs, tmp_path) -> None:
    run = RunFolder(runs.pretrain)
    kept = read_json(run.root / PLAN)
    assert kept["steps"] == 12 and kept["processes"] == 1 and kept["tokens"] == 3072
    parts = {part.name: part for part in compare(run)}
    assert set(parts) == {"training", "evaluations", "start, checkpoints", "time", "memory of a process"}
    assert parts["time"].actual >= parts["training"].actual + parts["evaluations"].actual > 0
    assert parts["memory of a process"].ratio > 0.5
    assert "Plan against actual" in Path(build_report(run.root, tmp_path / "report.html")).read_text(encoding="utf-8")
    start = next(event for event in read_events(run.events) if event.kind == START)
    assert start.details["processes"] == 1 and start.details["preparing_seconds"] > 0


@pytest.mark.slow
def test_a_run_in_a_process_of_its_own_takes_about_the_memory_of_its_plan(tiny, tmp_path) -> None:
    """The peak of a process is of all that it ever did, so the runs of other tests would count."""
    command = [sys.executable, "-m", "osler.cli", "pretrain", tiny.pretrain, "--run", str(tmp_path)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    (memory,) = [part for part in compare(RunFolder(tmp_path)) if part.name == "memory of a process"]
    assert 0.5 < memory.ratio < 1.5, memory


def test_a_kept_plan_stays_and_one_is_made_where_none_is(runs, tmp_path) -> None:
    run = RunFolder(tmp_path)
    for name in ("config.yaml", "metrics.jsonl", "model.json", "versions.json"):
        (tmp_path / name).write_bytes((runs.pretrain / name).read_bytes())
    configured = read_config(run)["micro_batch_tokens"]
    event = {"step": 3, "kind": "incident", "name": OUT_OF_MEMORY, "message": "less"}
    limits = [(128, configured), (64, 999_936)]  # the second was found with another micro-batch, which is no longer there
    found = [{**event, "micro_batch_tokens": tokens, "configured": of} for tokens, of in limits]
    run.events.write_text("".join(json.dumps(event) + "\n" for event in found), encoding="utf-8")
    assert planned(run).rows * planned(run).seq_len == 128, "the plan is of the micro-batch that the run has"
    assert compare(run) and not (tmp_path / PLAN).exists()
    keep_plan(run)
    kept = read_json(tmp_path / PLAN)
    kept["seconds"]["training"] = {"low": 1.0, "value": 2.0, "high": 3.0, "source": "another version of Osler"}
    without_rows = {name: value for name, value in kept.items() if name != "rows"}  # as older versions stored it
    (tmp_path / PLAN).write_text(json.dumps(without_rows), encoding="utf-8")
    keep_plan(run)
    assert compare(run)[0].planned == Estimate(1.0, 2.0, 3.0, "another version of Osler")
    (tmp_path / PLAN).write_text(json.dumps({**kept, "steps": kept["steps"] / 2}), encoding="utf-8")
    assert compare(run)[0].planned.value == 4.0, "a clock let the run make twice the steps of its plan"
    run.events.write_text(json.dumps({**found[0], "micro_batch_tokens": 64}) + "\n", encoding="utf-8")
    keep_plan(run)
    assert compare(run)[0].planned.value != 4.0, "the plan is of the passes that the run has"


def test_an_error_ends_a_run_and_not_the_plan_that_it_would_keep(tmp_path) -> None:
    kept = []
    with taken(RunFolder(tmp_path / "good"), at_end=kept.append):
        pass
    with pytest.raises(ZeroDivisionError), taken(RunFolder(tmp_path / "bad"), at_end=kept.append):
        (tmp_path / "bad" / "config.yaml").touch()
        raise ZeroDivisionError
    assert [folder.root.name for folder in kept] == ["good"]


def test_the_time_of_a_run_is_that_of_its_processes_and_one_that_was_killed_ends_with_its_last_line() -> None:
    events = [
        Event(0, 100.0, START, "begun", "", {"preparing_seconds": 5.0}),
        Event(4, 500.0, START, "resumed", "", {"preparing_seconds": 2.0}),
        Event(9, 530.0, END, "finished", ""),
    ]
    lines = [MetricsLine(2, 0, 110.0, {}), MetricsLine(4, 0, 140.0, {}), MetricsLine(9, 0, 529.0, {})]
    assert working_seconds(events, lines) == 5 + 40 + 2 + 30


def test_a_short_run_has_the_passes_of_the_long_one_and_their_times_are_scaled(tiny, tmp_path) -> None:
    given = load_recipe(tiny.pretrain)
    stages = [{"seq_len": 32, "until_tokens": 4096}, {"seq_len": 64}]
    sizes = {"batch_tokens": 1024, "micro_batch_tokens": 128, "total_tokens": 9999}
    config = decode(TrainConfig, {**given, **sizes, "curriculum": stages})
    steps = steps_of(config, plan_of(config, HERE))
    short = shortened(config, config.model, tmp_path, steps)
    for span, own, count in zip(config.timeline.spans, short.timeline.spans, steps, strict=True):
        assert (own.seq_len, own.rows_per_batch * own.seq_len) == (span.seq_len, PASSES * 128)
        assert own.end_step in (None, own.first_step + count)
    assert short.total_steps == sum(steps) and short.data == config.data, "the clinic is prepared as it is"
    parts = {"perf/data_ms": 0.0, "perf/forward_ms": 30.0, "perf/backward_ms": 70.0, "perf/tokens_per_second": 2560.0}
    slow = {name: 3 * value for name, value in parts.items()} | {"perf/tokens_per_second": 853.0}  # as first steps are
    first = {own.first_step + step for own in short.timeline.spans for step in range(1, FEWEST_STEPS // 2)}
    lines = [MetricsLine(step, 0, 0.0, slow if step in first else parts) for step in range(1, short.total_steps + 1)]
    times = step_times(config, short, lines)
    assert {number: time.value for number, time in times.items()} == pytest.approx({1: 0.1 + 3 * 0.1, 2: 0.1 + 3 * 0.1})

    data = {"type": "turns", "path": "nowhere.jsonl"}
    elsewhere = decode(TrainConfig, {**given, "kind": "sft", "data": data, "total_tokens": 10**9})
    short = shortened(elsewhere, elsewhere.model, tmp_path, [5])
    row = json.loads((tmp_path / "words.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert short.data.path == str(tmp_path / "words.jsonl") and set(row) == {"question", "answer"}
    held = {"validation": {}, "sources": {"words": {"splits": {"validation": {"documents": 9, "tokens": 200_000}}}}}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(held), encoding="utf-8")
    assert evaluation_share(elsewhere, short, RunFolder(tmp_path)) == 131_072 / elsewhere.evaluated_tokens(1)


def test_a_short_run_of_grpo_has_as_many_steps_as_fit_and_an_exam_that_fills_the_sampler(tiny) -> None:
    given = {**load_recipe(tiny.grpo), "init_from": "run", "steps": 50, "eval_permutations": 2, "rollout_rows": 8}
    config = decode(GrpoConfig, {**given, "eval_task": {"type": "clinic", "split": "validation", "limit": 100}})
    planned = plan_of(config, HERE, model=ModelConfig())
    for step_seconds, steps in ((4.0, 5), (0.01, MOST_GRPO_STEPS), (100.0, FEWEST_GRPO_STEPS)):
        pace = Pace([replace(planned.pace.stretches[0], seconds=exact(step_seconds))])
        short = shortened_grpo(config, replace(planned, pace=pace))
        assert (short.steps, short.eval_every_steps) == (steps, -(-steps // 2))
        assert short.eval_task is not None and short.eval_task.limit == 8 // 2, "two permutations of each question"
    slow = shortened_grpo(config, replace(planned, time={"sampling": exact(1e6)}))
    assert slow.eval_task is not None and slow.eval_task.limit == 1, "an exam takes no longer than the steps"
    few = shortened_grpo(replace(config, steps=1), planned)
    assert (few.steps, few.eval_every_steps, few.checkpoint.every_steps) == (1, 1, 1)


def test_what_a_probe_cannot_make_is_refused_with_what_to_do(tiny, tmp_path) -> None:
    config = decode(TrainConfig, load_recipe(tiny.pretrain))
    taught = replace(config, teacher=SimpleNamespace(path="runs/large"))
    with pytest.raises(UserError, match="a teacher: leave --probe out"):
        shortened(taught, config.model, tmp_path, [5])
    servers = decode(
        GrpoConfig, {**load_recipe(tiny.grpo), "init_from": "run", "rollout": {"type": "server", "urls": ["http://a"]}}
    )
    with pytest.raises(UserError, match="rollout servers"):
        shortened_grpo(servers, plan_of(servers, HERE, model=config.model))
    with pytest.raises(UserError, match="leave --gpu and --gpus out"):
        plan("debug", [], gpu="h100", probe=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pretrain", "grpo"])
def test_a_probe_makes_steps_and_its_measurements_are_in_the_plan(kind, tiny, runs) -> None:
    start = [f"init_from={runs.sft}"] if kind == "grpo" else []
    text = plan(getattr(tiny, kind), start, probe=True)
    assert "measured here" in text and "The plan without the probe, and the probe:" in text
    with pytest.raises(UserError, match=r"could not make its steps: .*Device"):
        plan(tiny.pretrain, ["device=cuda"], probe=True)


def test_a_table_has_a_line_for_each_part(runs) -> None:
    lines = table_of(compare(RunFolder(runs.sft))).splitlines()
    assert lines[0].split()[:2] == ["Part", "Plan"] and len(lines) == 6


def test_an_exam_is_sat_before_the_first_step_and_after_the_last(tiny) -> None:
    given = {**load_recipe(tiny.grpo), "init_from": "run", "steps": 25, "eval_every_steps": 10}
    config = decode(GrpoConfig, {**given, "eval_task": {"type": "clinic", "split": "validation", "limit": 100}})
    measured = Measured(evaluation_seconds=exact(1.0))
    assert plan_of(config, HERE, model=ModelConfig(), measured=measured).time["exams"].value == 1 + 3
