"""A plan on one screen. Torch-free."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping

from osler.plan.estimate import COMPUTED, Estimate
from osler.plan.plan import Plan
from osler.runtime import format as fmt

COLUMNS = 120
Writer = Callable[[float], str]


def money(usd: float) -> str:
    """Write an amount: `$0.43`, `$19.20`, `$1,234`."""
    return f"${usd:,.0f}" if usd >= 99.995 else f"${usd:.2f}"


def words_of(plan: Plan) -> str:
    """Return the plan as text: a table of numbers with their intervals, and below it where they come from and warnings."""
    device = plan.where.device
    many = f"{plan.where.gpus} x " if plan.where.gpus > 1 else ""
    title = f"{plan.name or plan.kind} on {many}{device.title}"
    sources: dict[str, int] = {}
    rows = [[name, value, span, _mark(estimate, sources)] for name, value, span, estimate in _rows(plan)]
    lines = [title, "", fmt.table(rows, left=4)]
    lines += ["", *_fitting(plan)]
    if sources:
        lines += ["", *(line for text, number in sources.items() for line in wrapped(f"[{number}] {text}", "    "))]
    for word, texts in (("Not planned:", plan.not_planned), ("Note:", plan.notes)):
        lines += [line for text in texts for line in ("", *wrapped(f"{word} {text}", "  "))]
    return "\n".join(lines)


def _rows(plan: Plan) -> Iterator[tuple[str, str, str, Estimate | None]]:
    yield "parameters", f"{plan.parameters:,}", "", None
    yield _row("tokens", plan.tokens, fmt.count)
    yield _row("steps", plan.steps, fmt.count)
    yield _row("FLOPs", plan.flops, lambda number: f"{number:.3g}")
    yield _row("tokens/s", plan.tokens_per_second, fmt.count)
    yield from _parts("time", plan.time, plan.seconds, fmt.duration)
    yield from _parts("memory of a process", plan.memory, plan.memory_bytes, fmt.size)
    yield from _parts("disk", plan.disk, plan.disk_bytes, fmt.size)
    if plan.usd is None:
        if plan.where.device.kind == "gpu":
            yield "cost", "no price is known", "give --price USD_PER_GPU_HOUR", None
    else:
        yield _row("cost", plan.usd, money)


def _parts(
    name: str, parts: Mapping[str, Estimate], whole: Estimate, write: Writer
) -> Iterator[tuple[str, str, str, Estimate | None]]:
    first, value, span, _ = _row(name, whole, write)
    yield first, value, span, None
    if len(parts) > 1:
        for part, estimate in parts.items():
            yield _row(f"  {part}", estimate, write)


def _row(name: str, estimate: Estimate, write: Writer) -> tuple[str, str, str, Estimate]:
    low, value, high = map(write, estimate.numbers)
    return name, value, "" if low == high else f"{low} to {high}", estimate


def _mark(estimate: Estimate | None, sources: dict[str, int]) -> str:
    if estimate is None or estimate.source == COMPUTED:
        return ""
    return f"[{sources.setdefault(estimate.source, len(sources) + 1)}]"


def _fitting(plan: Plan) -> Iterator[str]:
    limit = fmt.size(plan.where.device.memory_bytes)
    verdict = {"yes": "fits", "no": "does not fit", "unsure": "may not fit"}[plan.fits]
    yield f"Memory: {plan.rows} x {plan.seq_len:,} tokens at once, recompute={plan.recompute}, {verdict} into {limit}."
    found = [f"{rows} rows ({rows * plan.seq_len:,} tokens) with {mode}" for mode, rows in plan.most_rows.items() if rows]
    yield f"Largest micro-batch that surely fits: {', '.join(found) or 'none'}."


def wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, COLUMNS, subsequent_indent=indent, break_on_hyphens=False)
