"""What a person should know before a run begins: warnings, each with the evidence for it. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from osler.model.config import ModelConfig, SparseAttentionConfig
from osler.plan.estimate import Estimate
from osler.plan.plan import Plan
from osler.plan.speed import Arithmetic
from osler.rl.config import GrpoConfig
from osler.runtime import format as fmt
from osler.train.config import TrainConfig

KERNEL_SIZES = (64, 96, 128, 256)  # head sizes that fused attention kernels are made for
WASTEFUL_SIZES = {72: 96, 96: 128}  # head size: the larger one that kernels compute instead
FP8_GAINS_FROM = 1536  # hidden_size
FP8_LOSES_BELOW = 1024
FEW_TOKENS = 8192  # a forward pass with fewer hardly fills a GPU


def notes_of(plan: Plan, config: TrainConfig | GrpoConfig, model: ModelConfig, arithmetic: Arithmetic) -> tuple[str, ...]:
    """Return the warnings about a plan."""
    on_gpu = plan.where.device.kind == "gpu"
    found = [*memory_notes(plan), *sparse_notes(model, plan.seq_len)]
    if on_gpu:
        found += [*head_notes(model, plan.seq_len), *fp8_notes(plan, model, arithmetic), *gpu_notes(plan, config)]
    return tuple(found)


def memory_notes(plan: Plan) -> Iterator[str]:
    """Say what to do where a pass may not fit."""
    if plan.fits == "yes":
        return
    device, need = plan.where.device, plan.memory_bytes
    verb = "does not fit" if plan.fits == "no" else "may not fit"
    text = (
        f"{plan.rows} x {plan.seq_len:,} tokens with recompute={plan.recompute} {verb}: it takes {fmt.size(need.low)} to "
        f"{fmt.size(need.high)}, and {device.title} has {fmt.size(device.memory_bytes)}"
    )
    fitting = {mode: rows for mode, rows in plan.most_rows.items() if rows}
    mode = next(
        (mode for mode, rows in fitting.items() if rows >= plan.rows), max(fitting, key=lambda one: fitting[one], default="")
    )
    if not mode:
        yield f"{text}. Not even one row surely fits: take a smaller model, shorter rows, parallel.type=fsdp or another device."
    else:
        rows = min(fitting[mode], plan.rows)
        yield f"{text}. What surely fits: micro_batch_tokens={rows * plan.seq_len} recompute={mode}."


def head_notes(model: ModelConfig, seq_len: int) -> Iterator[str]:
    """Warn of a head size that attention kernels have to round up."""
    if (size := model.head_dim) not in WASTEFUL_SIZES:
        return
    kernel = WASTEFUL_SIZES[size]
    share = 12 * model.num_layers * model.query_size * seq_len / model.flops_per_token(seq_len)
    more = share * (kernel / size - 1)
    yield (
        f"head_dim {size}: kernels of current GPUs compute it as {kernel}, which adds {kernel / size - 1:.0%} to attention, "
        f"{share:.0%} of this model's FLOPs at {seq_len:,} tokens; up to {more:.0%} of a step is lost (computed from the "
        "sizes, not measured). Heads of 64 or 128 lose nothing; osler-400m is pure-medium-large with such heads."
    )


def fp8_notes(plan: Plan, model: ModelConfig, arithmetic: Arithmetic) -> Iterator[str]:
    """Warn of FP8 where a card has none, or where matrices are too small to gain."""
    if arithmetic.precision != "fp8":
        return
    device = plan.where.device
    if device.fp8_tflops is None:
        yield f"{device.title} has no FP8, and the run will be refused: set precision=bf16. The time here is that of bf16."
    elif model.hidden_size < FP8_GAINS_FROM:
        verdict = "loses" if model.hidden_size < FP8_LOSES_BELOW else "gains little"
        yield (
            f"precision=fp8 {verdict} at hidden_size {model.hidden_size}: nanochat measured it slower than bf16 at 768 and 17 % "
            "faster at 1,664. The time here is that of bf16; set precision=bf16."
        )


def sparse_notes(model: ModelConfig, seq_len: int) -> Iterator[str]:
    """Warn of sparse attention in rows that are too short for it to pay."""
    if not isinstance(model.attention, SparseAttentionConfig):
        return
    pays = model.sparse_wins_from
    if seq_len <= model.attention.top_k:
        yield f"sparse attention chooses nothing in rows of {seq_len:,} tokens, because top_k is {model.attention.top_k:,}."
    elif pays is None or seq_len < pays:
        length = "at no length" if pays is None else f"from rows of {pays:,} tokens on"
        yield (
            f"sparse attention costs more FLOPs than dense in rows of {seq_len:,} tokens; for this shape it saves {length} "
            "(computed). On two CPU cores it was slower at 2,048 and 8,192 tokens and faster at 16,384 (bench_sparse.py, top_k "
            "256); on a GPU it was not measured."
        )
    else:
        yield (
            "sparse attention: the time is computed from FLOPs, and gathering keys is slower than that. On two CPU cores it paid "
            "from rows of 16,384 tokens on (bench_sparse.py, top_k 256); on a GPU it was not measured."
        )


def gpu_notes(plan: Plan, config: TrainConfig | GrpoConfig) -> Iterator[str]:
    """Warn of several devices without a strategy, and of passes too small to fill a GPU."""
    where = plan.where
    if where.gpus > 1 and config.parallel.type == "none":
        yield (
            f"parallel.type is none, and {where.gpus} processes would be refused: start with `torchrun --nproc-per-node "
            f"{where.gpus} -m osler.cli {plan.kind} ... parallel.type=ddp`."
        )
    if plan.rows * plan.seq_len < FEW_TOKENS and plan.kind != "grpo":
        tokens = plan.rows * plan.seq_len
        yield f"A forward pass has {tokens:,} tokens, which hardly fills a GPU: expect the slow end of the interval."


def time_note(plan: Plan, seconds: Estimate, what: str) -> str:
    """Return whether the run's tokens fit into a time, and how many do."""
    need, fit, where = plan.seconds, plan.tokens_within(seconds), plan.where
    verdict = "fit" if need.high <= seconds.low else "do not fit" if need.low > seconds.high else "may not fit"
    text = (
        f"{fmt.count(plan.tokens.value)} tokens {verdict} into {what}: they take {fmt.duration(need.low)} to "
        f"{fmt.duration(need.high)}."
    )
    if verdict == "fit":
        return text
    at_peak = seconds.high * where.device.flops * where.gpus / (plan.flops.value / plan.tokens.value)
    limit = f" Even at 100 % of the peak it would be {fmt.count(at_peak)}." if at_peak < plan.tokens.value else ""
    if fit.value < plan.pace.stretches[0].step_tokens:
        return f"{text} Not even one step does."
    change = "" if plan.kind == "grpo" else f" (total_tokens={float(f'{fit.value:.2g}'):.0f})"
    return f"{text} About {fmt.count(fit.value)} do, {fmt.count(fit.low)} to {fmt.count(fit.high)}{change}.{limit}"
