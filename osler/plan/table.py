"""Tables of many plans, as Markdown or CSV: cost by model and tokens, tokens in a time by model and device, the devices.

Torch-free. A cell is a number with its interval. Rows are the shipped model families, trained as in the recipe ``osler-2day``
with the micro-batch and the recomputation that surely fit.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from operator import mul

from osler.config.devices import devices, find_device
from osler.plan.budget import DATA_RECIPE, decode_with, families, fitting
from osler.plan.estimate import Estimate, combined, exact
from osler.plan.plan import HOUR, Where
from osler.plan.words import money
from osler.runtime import format as fmt

BILLIONS = (0.5, 1, 2, 5, 10, 15, 50)
DEVICES = ("a100", "h100", "h200", "b200", "rtx4090")
NO_FIT = "does not fit"
Row = list[str]


def cost_table(where: Where) -> list[Row]:
    """Return what it costs to train each model family on so many tokens, and on how many hours of all devices."""
    rows = [["model", "parameters", "GFLOP a token", *(f"{billions:g}B tokens" for billions in BILLIONS)]]
    for name, model in families().items():
        plan = fitting(decode_with(DATA_RECIPE, [], name), where, name)
        cells = [NO_FIT] * len(BILLIONS)
        if plan is not None:
            beside = plan.seconds.value / plan.time["training"].value
            cells = []
            for billions in BILLIONS:
                hours = plan.pace.seconds(billions * 1e9).times(beside / HOUR)
                price = where.usd_per_hour
                if price is None:
                    cells.append(_span(hours, lambda number: f"{number:.3g} h"))
                else:
                    cells.append(_span(combined(mul, price, hours), money))
        rows.append([name, f"{model.num_parameters:,}", f"{model.flops_per_token(2048) / 1e9:.3g}", *cells])
    return rows


def tokens_table(hours: float, gpus: int) -> list[Row]:
    """Return how many tokens each model family learns in so many hours, by device."""
    places = [Where(find_device(name), gpus) for name in DEVICES]
    rows = [["model", "parameters", *(where.device.title for where in places)]]
    for family, model in families().items():
        config = decode_with(DATA_RECIPE, [], family)
        plans = [fitting(config, where, family) for where in places]
        cells = [NO_FIT if plan is None else _span(plan.tokens_within(exact(hours * HOUR)), fmt.count) for plan in plans]
        rows.append([family, f"{model.num_parameters:,}", *cells])
    return rows


def devices_table() -> list[Row]:
    """Return the table of devices: peaks of data sheets, memory, and the prices that were seen."""
    rows = [["name", "device", "TFLOP/s bf16", "fp8", "memory GiB", "GB/s", "USD an hour", "seen"]]
    for name, device in devices().items():
        fp8 = "" if device.fp8_tflops is None else f"{device.fp8_tflops:g}"
        usd = "" if device.usd is None else " to ".join(f"{price:.2f}" for price in dict.fromkeys(device.usd))
        sizes = [f"{number:g}" for number in (device.memory_gib, device.bandwidth_gb)]
        rows.append([name, device.title, f"{device.tflops:g}", fp8, *sizes, usd, device.seen])
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """Write rows as a table of Markdown, the first row as its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def as_csv(rows: Sequence[Row]) -> str:
    """Write rows as CSV."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue().rstrip("\n")


def _span(estimate: Estimate, write: Callable[[float], str]) -> str:
    low, value, high = map(write, estimate.numbers)
    return f"{value} ({low} to {high})"
