"""What a run took beside what its plan says: the plan in its folder, and the comparison. Torch-free.

The plan of a run is made of its config, its model, and the machine in ``versions.json``. When a process of the run ends, the plan
is kept as ``plan.json``, so that a later version of Osler with other assumptions does not change it. What the run took is in its
metrics and events. The planned training is that of the steps that the run has made, which a clock may decide.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from osler.config.devices import device_of_gpu, this_machine
from osler.config.schema import decode
from osler.model.config import ModelConfig
from osler.plan.estimate import Estimate, total
from osler.plan.plan import PACED, Plan, Where
from osler.plan.planner import plan_of
from osler.plan.speed import Arithmetic
from osler.records.jsonl import END, START, Event, MetricsLine, read_events, read_metrics, recorded_limits
from osler.records.values import as_number
from osler.rl.config import GrpoConfig
from osler.runs.folder import read_config
from osler.runtime import format as fmt
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder, read_json, write_json
from osler.train.config import TrainConfig

logger = logging.getLogger(__name__)

PLAN = "plan.json"  # in the run folder
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}  # of a dtype; the config knows better where it says pure-bf16 or fp8


@dataclass(frozen=True)
class Part:
    """A part of a plan and what it really was."""

    name: str
    planned: Estimate
    actual: float
    write: Callable[[float], str]

    @property
    def ratio(self) -> float:
        """The actual number over the planned one."""
        return self.actual / self.planned.value

    @property
    def row(self) -> list[str]:
        low, value, high = map(self.write, self.planned.numbers)
        span = "" if low == high else f"{low} to {high}"
        return [self.name, value, span, self.write(self.actual), f"{self.ratio:.2f}"]


HEAD = ["Part", "Plan", "Interval", "Actual", "Actual over plan"]


def table_of(parts: Sequence[Part]) -> str:
    """Return plan against actual as text."""
    return fmt.table([HEAD, *(part.row for part in parts)])


def of_probe(assumed: Plan, measured: Plan) -> list[Part]:
    """Return each part of a plan that a probe has measured, beside the assumption."""
    parts = [
        Part(name, estimate, measured.time[name].value, fmt.duration)
        for name, estimate in assumed.time.items()
        if measured.time[name] != estimate
    ]
    parts.append(Part("time", assumed.seconds, measured.seconds.value, fmt.duration))
    if measured.memory_bytes != assumed.memory_bytes:
        parts.append(Part("memory of a process", assumed.memory_bytes, measured.memory_bytes.value, fmt.size))
    return parts


# -- the plan in a run folder --------------------------------------------------------------------------------------------------


def plan_in(run: RunFolder) -> dict[str, Any]:
    """Return the plan of the run in a folder as JSON: the kept one, else a new one. Raises UserError where none can be made."""
    kept = run.root / PLAN
    return read_json(kept) if kept.is_file() else as_json(planned(run))


def keep_plan(run: RunFolder) -> None:
    """Write the plan of a run into its folder once it has begun; where none can be made, say so.

    A plan that is there stays, unless memory ran out since and the run has smaller passes. Older versions stored no rows.
    """
    if not run.metrics.is_file():
        return
    try:
        kept, plan = run.root / PLAN, as_json(planned(run))
        if not kept.is_file() or read_json(kept).get("rows", plan["rows"]) != plan["rows"]:
            write_json(kept, plan)
    except (UserError, OSError) as error:
        logger.info(f"The run has no plan to be compared with: {error}")


def planned(run: RunFolder) -> Plan:
    """Return the plan of a run that has begun, for the machine, the processes and the micro-batch that it has."""
    stored, machine = read_config(run), read_json(run.root / "versions.json")["machine"]
    events = read_events(run.events)
    cls: type[TrainConfig | GrpoConfig] = GrpoConfig if stored.get("kind") == "grpo" else TrainConfig
    config = decode(cls, stored, source=str(run.config))
    limits = recorded_limits(events, config.micro_batch_tokens)
    if limits:
        config = replace(config, micro_batch_tokens=min(tokens for _, tokens in limits))
    precision = PRECISIONS[machine["dtype"]] if config.precision == "auto" else config.precision
    processes = next((event.details.get("processes", 1) for event in events if event.kind == START), 1)
    arithmetic = Arithmetic(precision, bool(machine["compiled"]), config.recompute)
    model = decode(ModelConfig, read_json(run.model), source=str(run.model))
    where = Where(device_of_gpu(machine["device"]) or this_machine(), processes)
    return plan_of(config, where, name=str(run.root), model=model, arithmetic=arithmetic)


def as_json(plan: Plan) -> dict[str, Any]:
    """Return what a comparison needs of a plan."""
    beside = {name: estimate for name, estimate in plan.time.items() if name not in PACED}
    return {
        "device": plan.where.device.title,
        "processes": plan.where.gpus,
        "tokens": plan.tokens.value,
        "steps": plan.steps.value,
        "rows": plan.rows,
        "seconds": {name: asdict(part) for name, part in (beside | {"training": plan.pace.seconds(plan.tokens.value)}).items()},
        "memory_bytes": asdict(plan.memory_bytes),
    }


# -- what the run took ---------------------------------------------------------------------------------------------------------


def compare(run: RunFolder) -> list[Part]:
    """Return plan against actual of the run in a folder: time by parts, and the memory of a process.

    Raises UserError when it has no plan and none can be made of it.
    """
    plan = plan_in(run)
    lines, events = list(read_metrics(run.metrics)), read_events(run.events)
    if not lines or not lines[-1].step:  # there is nothing to compare before the first step
        return []
    planned = {name: Estimate(**fields) for name, fields in plan["seconds"].items()}
    training = training_seconds(lines)
    evaluating = sum(line.values.get("eval/seconds", 0.0) for line in lines)
    whole = working_seconds(events, lines)
    done = lines[-1].step / plan["steps"]
    parts = [Part("training", planned["training"].times(done), training, fmt.duration)]
    if evaluating:
        of_evaluations = [planned[name].times(done) for name in ("evaluations", "exams") if name in planned]
        parts.append(Part("evaluations", total(of_evaluations), evaluating, fmt.duration))
    rest = total(planned[name] for name in ("start", "checkpoints") if name in planned)
    parts.append(Part("start, checkpoints", rest, max(0.0, whole - training - evaluating), fmt.duration))
    parts.append(Part("time", total(part.planned for part in parts), whole, fmt.duration))
    peaks = [line.values["perf/memory_peak_bytes"] for line in lines if "perf/memory_peak_bytes" in line.values]
    if peaks:
        parts.append(Part("memory of a process", Estimate(**plan["memory_bytes"]), max(peaks), fmt.size))
    return parts


def training_seconds(lines: Sequence[MetricsLine]) -> float:
    """Return the time of the steps: at the speed of each line, or where a line is a step, what the step took."""
    seconds, tokens = 0.0, 0.0
    speeds = [line.values["perf/tokens_per_second"] for line in lines if "perf/tokens_per_second" in line.values]
    for line in lines:
        if "perf/step_seconds" in line.values:
            seconds += line.values["perf/step_seconds"]
        elif speeds and line.tokens > tokens:  # a line whose only step compiled has no speed of its own
            seconds += (line.tokens - tokens) / line.values.get("perf/tokens_per_second", speeds[0])
            tokens = line.tokens
    return seconds


def working_seconds(events: Sequence[Event], lines: Sequence[MetricsLine]) -> float:
    """Return the time in which processes of a run were at work; one that was killed ends with its last line."""
    starts = [place for place, event in enumerate(events) if event.kind == START]
    seconds = 0.0
    if not starts:  # the events are lost
        return lines[-1].time - lines[0].time
    for place, after in zip(starts, [*starts[1:], len(events)], strict=True):
        start = events[place]
        until = events[after].time if after < len(events) else float("inf")
        ends = [event.time for event in events[place:after] if event.kind == END]
        ends = ends or [line.time for line in lines if start.time <= line.time <= until]
        seconds += as_number(start.details.get("preparing_seconds", 0.0)) + max(ends, default=start.time) - start.time
    return seconds
