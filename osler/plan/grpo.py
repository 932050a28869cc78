"""The plan of GRPO: completions that are drawn, then learned from. Torch-free.

Nobody knows how long the answers will get, because that is learned. So a plan of GRPO has wide intervals; at the upper end every
completion runs to the limit.
"""

from __future__ import annotations

from dataclasses import replace

from osler.config.devices import Device
from osler.model.config import ModelConfig
from osler.parallel.config import FsdpConfig
from osler.plan.disk import checkpoint_bytes, kept_bytes
from osler.plan.estimate import Estimate, combined, exact, total
from osler.plan.memory import LOGIT_COPIES, MODES, Pass, logit_bytes, measured_memory, memory_of, most_rows, state_bytes
from osler.plan.notes import notes_of
from osler.plan.plan import Measured, Plan, Where
from osler.plan.scaling import counted_parameters
from osler.plan.speed import Arithmetic, Pace, Stretch, flops_per_second
from osler.rl.config import GrpoConfig
from osler.tasks.registry import ClinicTask

STARTS = {
    "gpu": Estimate(15, 40, 120, "assumed: libraries and questions"),
    "cpu": Estimate(1, 5, 60, "measured: 1 to 2 s on the clinic; assumed: up to 60 s for other questions"),
}  # fmt: skip
PROMPT_TOKENS = Estimate(60, 200, 500, "assumed: 60 to 500 tokens a question")
CLINIC_PROMPT_TOKENS = Estimate(40, 60, 80, "measured: 40 to 80 tokens a question of the clinic")
LENGTH = Estimate(0.2, 0.6, 1.0, "assumed: completions have 20 to 100 % of max_new_tokens")
# Time of a decode step over its least possible time: on a GPU one reading of weights and cache, on a CPU its FLOPs at the rate of
# fp32. The calls of a layer take seconds besides.
DECODING = {
    "gpu": Estimate(1.2, 2.0, 4.0, "assumed: 1.2 to 4 times reading weights and cache once; not measured"),
    "cpu": Estimate(1.5, 3.0, 8.0, "assumed: 1.5 to 8 times its FLOPs at the rate of matrix products"),
}  # fmt: skip
CALLS_OF_LAYER = Estimate(5e-5, 2e-4, 5e-4)
EXAM_QUESTIONS = 1000  # assumed of an exam without a limit


def arithmetic_of(config: GrpoConfig, device: Device) -> Arithmetic:
    """Return what GRPO computes with on a device; it is not compiled."""
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if device.bf16 and device.kind == "gpu" else "fp32"
    return Arithmetic(precision, compiled=False, recompute=config.recompute)


def plan_grpo(
    config: GrpoConfig,
    where: Where,
    *,
    name: str = "",
    model: ModelConfig,
    arithmetic: Arithmetic | None = None,
    measured: Measured | None = None,
) -> Plan:
    """Return the plan of GRPO on ``model``, the model of ``init_from``."""
    measured = measured or Measured()
    arithmetic = arithmetic or arithmetic_of(config, where.device)
    algorithm = config.algorithm
    is_clinic = all(isinstance(task.task, ClinicTask) for task in config.tasks)
    prompt = CLINIC_PROMPT_TOKENS if is_clinic else PROMPT_TOKENS
    drawn = LENGTH.times(algorithm.max_new_tokens)
    row = total([prompt, drawn])
    seq_len = min(round(row.high), model.max_seq_len)
    sampling = sampling_seconds(config, model, where, arithmetic, prompt)
    learning, flops = learning_seconds(config, model, where, arithmetic, row)
    step = measured.step_seconds.get(1)
    if step is not None:  # a probe gives the time of a whole step; the parts keep their shares
        share = sampling.value / (sampling.value + learning.value)
        sampling, learning = step.times(share), step.times(1 - share)
    pace = Pace([Stretch(0, algorithm.completions_per_step * round(drawn.value), total([sampling, learning]), flops)])
    questions = getattr(config.eval_task, "limit", None) or EXAM_QUESTIONS if config.eval_task is not None else 0
    exam = sampling.times(config.eval_permutations * questions / algorithm.completions_per_step)
    exams = 1 + -(-config.steps // config.eval_every_steps)  # the first before any step, the last after all of them
    limit = algorithm.max_new_tokens + round(prompt.high)
    shards = where.gpus if isinstance(config.parallel, FsdpConfig) else 1
    one = Pass(
        model=model,
        rows=max(1, config.micro_batch_tokens // min(limit, model.max_seq_len)),
        seq_len=min(limit, model.max_seq_len),
        arithmetic=arithmetic,
        on_cpu=where.device.kind == "cpu",
        optimizer=config.optim.type,
        accumulates=True,
        shards=shards,
        copies=where.device.kind == "cpu" and config.checkpoint.in_background,
    )
    beside = sampler_memory(config, model, one, where)
    size = checkpoint_bytes(model, config.optim.type, "fp32")
    size += state_bytes(model, config.optim.type, "fp32")[0] if algorithm.beta > 0 else 0
    keep = config.checkpoint
    saves = [keep.every_steps, keep.keep_every_steps, config.eval_every_steps if questions else 0]
    milestones = config.steps // keep.keep_every_steps if keep.keep_every_steps else 0
    time = {
        "start": measured.start_seconds or STARTS[where.device.kind],
        "sampling": sampling.times(config.steps),
        "learning": learning.times(config.steps),
        **({"exams": (measured.evaluation_seconds or exam).times(exams)} if questions else {}),
    }
    plan = Plan(
        name=name,
        kind=config.kind,
        where=where,
        parameters=model.num_parameters,
        tokens=drawn.times(config.steps * algorithm.completions_per_step),
        steps=exact(config.steps),
        flops=drawn.times(config.steps * algorithm.completions_per_step * flops),
        pace=pace,
        time=time,
        seconds=total(time.values()),
        memory=measured_memory({**memory_of(one, config.recompute), **beside}, measured.memory_bytes),
        rows=one.rows,
        seq_len=seq_len,
        recompute=config.recompute,
        most_rows={
            mode: most_rows(one, mode, where.device.memory_bytes, beside=beside, measured=measured.memory_bytes) for mode in MODES
        },
        disk={"checkpoints": kept_bytes(size, config.steps, saves, keep.keep_last, milestones)},
        not_planned=("vLLM's servers and their GPUs",) if config.rollout.type == "server" else (),
    )
    return replace(plan, notes=notes_of(plan, config, model, arithmetic))


def sampling_seconds(config: GrpoConfig, model: ModelConfig, where: Where, arithmetic: Arithmetic, prompt: Estimate) -> Estimate:
    """Return the time in which the completions of a step are drawn."""
    algorithm, device = config.algorithm, where.device
    waiting = -(-algorithm.completions_per_step // where.gpus)
    rows = min(waiting, config.rollout_rows)
    rounds = -(-waiting // rows)
    over = DECODING[device.kind]
    matrices = counted_parameters(model)
    if device.kind == "gpu":
        cache = model.kv_cache_bytes(rows, round(prompt.value) + algorithm.max_new_tokens // 2, arithmetic.width)
        once = (matrices * arithmetic.width + cache) / (device.bandwidth_gb * 1e9)
    else:
        once = 2 * matrices * rows / (device.fp32_flops)
    steps = LENGTH.times(rounds * algorithm.max_new_tokens)
    of_step = combined(lambda factor, call: factor * once + call * model.num_layers, over, CALLS_OF_LAYER)
    return combined(lambda count, seconds: count * seconds, steps, of_step, source=f"{over.source}; {LENGTH.source}")


def learning_seconds(
    config: GrpoConfig, model: ModelConfig, where: Where, arithmetic: Arithmetic, row: Estimate
) -> tuple[Estimate, float]:
    """Return the time in which a step's completions are learned, and the FLOPs of a token that is drawn."""
    algorithm = config.algorithm
    passes = algorithm.updates_per_batch * (1 + (1 / 3 if algorithm.beta > 0 else 0))
    rate = flops_per_second(where.device, arithmetic, where.gpus, model.hidden_size)
    of_token = passes * model.flops_per_token(round(row.value))
    flops = row.times(algorithm.completions_per_step * of_token)
    drawn = LENGTH.value * algorithm.max_new_tokens
    return flops.over(rate, rate.source), of_token * row.value / drawn


def sampler_memory(config: GrpoConfig, model: ModelConfig, one: Pass, where: Where) -> dict[str, Estimate]:
    """Return the bytes that GRPO needs besides a pass: sampler, cache, reference, logits."""
    rows = min(config.rollout_rows, -(-config.algorithm.completions_per_step // where.gpus))
    cache = model.kv_cache_bytes(rows, one.seq_len, one.width)
    weights = state_bytes(model, config.optim.type, "fp32")[0]
    return {
        "sampler": exact(counted_parameters(model) * one.width, "computed: the weights in the layout of decoding"),
        "cache": Estimate(0.5 * cache, cache, cache, "computed: keys and values of all rows that are drawn together"),
        **({"reference": exact(weights)} if config.algorithm.beta > 0 else {}),
        "log-probabilities": LOGIT_COPIES.times(logit_bytes(model, one.tokens)),
    }
