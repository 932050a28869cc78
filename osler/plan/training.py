"""The plan of pretraining and fine-tuning, from the config. Torch-free."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import mul

from osler.config.devices import Device
from osler.data.curriculum import rows_per_micro_batch
from osler.model.config import ModelConfig
from osler.parallel.config import COMPILE_MIN_STEPS, DeepSpeedConfig, FsdpConfig
from osler.plan.disk import checkpoint_bytes, disk_of
from osler.plan.estimate import Estimate, combined, exact, spanning
from osler.plan.memory import MODES, Pass, measured_memory, memory_of, most_rows
from osler.plan.notes import notes_of
from osler.plan.plan import Measured, Plan, Where
from osler.plan.speed import Arithmetic, Pace, Stretch, flops_per_second, step_seconds
from osler.train.config import PLANNED_SHARE, TrainConfig

STARTS = {
    "gpu": Estimate(30, 120, 600, "assumed: libraries, tokenizer, first data, compilation"),
    "cpu": Estimate(10, 45, 180, "assumed: libraries, tokenizer, data, compilation; more with many files"),
}  # fmt: skip
READING = Estimate(
    0.2, 0.45, 1.2, "assumed: reading a token takes a third of the time of learning it, more where it is not compiled"
)
QUESTION_SECONDS = Estimate(0.002, 0.02, 0.2, "assumed: 2 to 200 ms for a question, drawn together with others")
DISK_SPEED = Estimate(100e6, 400e6, 2e9, "assumed: a disk that writes 0.1 to 2 GB/s")


def arithmetic_of(config: TrainConfig, device: Device) -> Arithmetic:
    """Return what a run will compute with on a device, where ``auto`` chooses as on a machine with a compiler."""
    compiled = config.compile == "always" or (config.compile == "auto" and config.steps_to_compile_for >= COMPILE_MIN_STEPS)
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if device.bf16 and (device.kind == "gpu" or compiled) else "fp32"
    return Arithmetic(precision, compiled, config.recompute)


def plan_training(
    config: TrainConfig,
    where: Where,
    *,
    name: str = "",
    model: ModelConfig | None = None,
    teacher: ModelConfig | None = None,
    arithmetic: Arithmetic | None = None,
    measured: Measured | None = None,
) -> Plan:
    """Return the plan of a supervised run. ``model`` is the model of ``init_from``, ``teacher`` that of ``teacher.path``.

    Raises UserError for processes that cannot train together.
    """
    model, measured = model or config.model, measured or Measured()
    arithmetic = arithmetic or arithmetic_of(config, where.device)
    config.check_processes(where.gpus)
    pace = pace_of(config, model, teacher, arithmetic, where, measured)
    start = measured.start_seconds or STARTS[where.device.kind]
    pauses = pauses_of(config, pace, measured)
    size = checkpoint_bytes(model, config.optim.type, config.precision)
    last = exact(size).over(DISK_SPEED, "assumed: all but the last are written while training goes on, at 0.1 to 2 GB/s")
    counts: list[float] = []
    cases: list[dict[str, float]] = []
    for place in range(3):  # the fast case, the middle and the slow one
        count = tokens_of_case(config, pace, start, pauses, place)
        paused = {name: pause.times(count) * pause.seconds.numbers[place] for name, pause in pauses.items()}
        training = pace.seconds(count).numbers[place]
        cases.append({"start": start.numbers[place], "training": training, **paused, "checkpoints": last.numbers[place]})
        counts.append(float(count))
    tokens = spanning(counts)
    sources = {"start": start.source, "checkpoints": last.source} | {name: pause.seconds.source for name, pause in pauses.items()}
    sources["training"] = pace.stretches[0].seconds.source if tokens.low == config.total_tokens else "the clock (max_minutes)"
    one = widest_pass(config, model, arithmetic, where, teacher)
    plan = Plan(
        name=name,
        kind=config.kind,
        where=where,
        parameters=model.num_parameters,
        tokens=tokens,
        steps=tokens.through(lambda count: config.timeline.steps_for(int(count))),
        flops=tokens.through(pace.flops),
        pace=pace,
        time={name: spanning([case[name] for case in cases], sources[name]) for name in cases[0]},
        seconds=spanning([sum(case.values()) for case in cases]),
        memory=measured_memory(memory_of(one, config.recompute), measured.memory_bytes),
        rows=one.rows,
        seq_len=one.seq_len,
        recompute=config.recompute,
        most_rows={mode: most_rows(one, mode, where.device.memory_bytes, measured=measured.memory_bytes) for mode in MODES},
        disk=disk_of(config, model, tokens),
        not_planned=not_planned(config, teacher),
    )
    return replace(plan, notes=notes_of(plan, config, model, arithmetic))


def pace_of(
    config: TrainConfig, model: ModelConfig, teacher: ModelConfig | None, arithmetic: Arithmetic, where: Where, measured: Measured
) -> Pace:
    """Return how long the steps of each stage take."""
    rate = flops_per_second(where.device, arithmetic, where.gpus, model.hidden_size)
    stretches = []
    for span in config.timeline.spans:
        flops = float(model.flops_per_token(span.seq_len))
        if teacher is not None:
            flops += teacher.flops_per_token(span.seq_len) / 3  # a forward pass
        seconds = measured.step_seconds.get(span.number)
        if seconds is None:
            seconds = step_seconds(flops * span.batch_tokens, rate, where.device, model.num_parameters)
        stretches.append(Stretch(span.first_token, span.batch_tokens, seconds, flops))
    return Pace(stretches)


@dataclass(frozen=True)
class Pause:
    """What interrupts training: how many tokens are learned until it comes again, and how long it takes."""

    every_tokens: int
    seconds: Estimate

    def times(self, tokens: int) -> int:
        """Return how often it comes in a run of so many tokens; the last time is at the end of the run."""
        return -(-tokens // self.every_tokens)


def pauses_of(config: TrainConfig, pace: Pace, measured: Measured) -> dict[str, Pause]:
    """Return the evaluations and exams of a run."""
    last = pace.stretches[-1]  # evaluations read rows of the run's whole length, which are those of the last stage
    sets = max(1, len(config.validation) or len(config.sources))
    reading = READING.times(sets * config.evaluated_tokens(sets) / last.step_tokens)
    seconds = measured.evaluation_seconds or combined(mul, reading, last.seconds)
    pauses = {"evaluations": Pause(config.evaluation_tokens, seconds)}
    if config.exam.every_tokens:
        exam = config.exam
        questions = sum(task.limit or 1000 for task in exam.tasks) if exam.tasks else exam.items * len(exam.splits)
        pauses["exams"] = Pause(exam.every_tokens, QUESTION_SECONDS.times(questions))
    return pauses


def tokens_of_case(config: TrainConfig, pace: Pace, start: Estimate, pauses: Mapping[str, Pause], place: int) -> int:
    """Return the tokens that a run learns until its clock ends it, in the fast case (place 0), the middle or the slow one.

    The clock runs from the start, and on through pauses. It ends the run after a step, and what comes at the end of a run comes
    after the clock.
    """
    if config.max_minutes is None:
        return config.total_tokens
    clock = PLANNED_SHARE * 60 * config.max_minutes

    def passed(tokens: int) -> float:
        paused = sum((pause.times(tokens) - 1) * pause.seconds.numbers[place] for pause in pauses.values())
        return start.numbers[place] + pace.seconds(tokens).numbers[place] + paused

    one_step = pace.stretches[0].step_tokens  # a run makes one step, however late it begins
    within = bisect_right(range(1, config.total_tokens), clock, key=passed)
    return min(max(within + 1, one_step), config.total_tokens)


def widest_pass(
    config: TrainConfig, model: ModelConfig, arithmetic: Arithmetic, where: Where, teacher: ModelConfig | None
) -> Pass:
    """Return the forward pass of one process that takes the most memory."""
    passes = []
    for span in config.timeline.spans:
        share = span.rows_per_batch // where.gpus
        rows = rows_per_micro_batch(share, span.seq_len, config.micro_batch_tokens)
        passes.append((span.seq_len * rows, span.seq_len, rows, rows < share))
    _, seq_len, rows, accumulates = max(passes)
    on_cpu = where.device.kind == "cpu"
    is_cut = isinstance(config.parallel, FsdpConfig) or (
        isinstance(config.parallel, DeepSpeedConfig) and config.parallel.stage == 3
    )
    return Pass(
        model=model,
        rows=rows,
        seq_len=seq_len,
        arithmetic=arithmetic,
        on_cpu=on_cpu,
        optimizer=config.optim.type,
        accumulates=accumulates,
        document_mask=config.document_mask,
        shards=where.gpus if is_cut else 1,
        copies=on_cpu and config.checkpoint.in_background and config.checkpoint.every_tokens < config.total_tokens,
        evaluates=True,
        teacher=teacher,
    )


def not_planned(config: TrainConfig, teacher: ModelConfig | None) -> tuple[str, ...]:
    """Return what the plan leaves out, in words."""
    found = []
    if config.teacher is not None and teacher is None:
        found.append(
            f"the teacher {config.teacher.path or '(not named)'}, whose model is not there: time and memory are without it"
        )
    if config.trains == "indexers":
        found.append("trains=indexers: time and memory are those of training all weights, which is more")
    if isinstance(config.parallel, DeepSpeedConfig):
        found.append("what DeepSpeed keeps for itself")
    return tuple(found)
