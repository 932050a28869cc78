"""Which curves the page draws, in which order, and what each should look like when all is well.

A chart names rows of the `METRICS` table; a metric that no chart names is drawn after the others, in its family, with its
meaning from the table as the caption, so that nothing a run logs is hidden.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np

from osler.monitor.metrics import declared_name, describe
from osler.records.results import ExamScore
from osler.records.values import as_dict, as_list, as_number
from osler.report.curves import Series
from osler.report.read import StageLog
from osler.report.svg import Band, Line, heat_map, line_chart
from osler.runtime import format as fmt
from osler.tasks.needle import cells_in

COLOURS = 8  # how many the palette has
# How the values of a unit are written; the values of other units are plain numbers.
KINDS = {"fraction": "percent", "tokens": "count", "tokens/s": "count", "steps": "count", "number": "count", "bytes": "bytes"}
EXACT = ("eval/", "train/lr", "train/stage", "train/seq_len", "train/batch_tokens")  # metrics without noise to smooth


@dataclass(frozen=True)
class Spec:
    """A chart: rows of METRICS with their legend labels, and one sentence on what good looks like."""

    title: str
    lines: tuple[tuple[str, str], ...]
    good: str
    zero: bool = True  # whether the axis starts at zero

    @property
    def kind(self) -> str:
        """The kind of number that its values are, which decides how they are written."""
        return kind_of(self.lines[0][0])

    @property
    def unit(self) -> str:
        """The unit of its first metric, empty for fractions, whose axis says `%` already."""
        metric = describe(self.lines[0][0])
        return "" if metric is None or metric.unit == "fraction" else metric.unit


SPECS: tuple[Spec, ...] = (
    Spec("Loss", (("train/loss", "train"), ("eval/loss", "held out")),
         "Good: both lines fall and stay together. Held-out loss that rises while train loss falls is memorising.", zero=False),
    Spec("Reward", (("reward", "mean"),),
         "Good: a steady climb. Flat from the start means that the questions are all too hard or all too easy."),
    Spec("Exam accuracy", (("eval/<split>_accuracy", ""),),
         "Good: climbs away from guessing and stays there. Judge the end by its interval, not by the last wiggle."),
    Spec("Held-out bits per byte", (("eval/bits_per_byte", "held out"), ("eval/<set>/bits_per_byte", "")),
         "Good: falls, in every set. Unlike the loss it compares models with different tokenizers.", zero=False),
    Spec("Distance from the reference", (("kl", "KL"),),
         "Good: grows slowly and levels off. A leap means that the policy has run away from what it was taught."),
    Spec("Entropy", (("entropy", "entropy"),),
         "Good: sinks gently and stays above zero. At zero the policy always says the same and can learn nothing new."),
    Spec("Completion length", (("completions/mean_length", "mean"),),
         "Good: settles. Growth up to the limit, or a collapse to a few tokens, is often a reward being gamed."),
    Spec("Completions cut at the limit", (("completions/clipped_ratio", "cut"),),
         "Good: near zero. A completion that never ends never learns to end."),
    Spec("Groups without a lesson", (("frac_reward_zero_std", "all rewards equal"),),
         "Good: well below 100%. A group whose answers all score the same gives no gradient."),
    Spec("Letters answered", (("answer/letter_<X>_frac", ""),),
         "Good: all letters near one another, as the options are shuffled. One letter taking over is a cheap cheat."),
    Spec("Readable answers", (("answer/format_ok", "readable"),),
         "Good: near 100%, and early. What cannot be read cannot be right."),
    Spec("Speed", (("perf/tokens_per_second", "training"), ("perf/rollout_tokens_per_second", "sampling"),
          ("perf/train_tokens_per_second", "updating")),
         "Good: level. Dips are evaluations, checkpoints, or a machine that is busy with something else."),
    Spec("Learning rate", (("train/lr", "learning rate"),),
         "The plan rather than a result: a short warm-up, then down. Read the other curves by it."),
    Spec("Gradient norm", (("train/grad_norm", "norm"),),
         "Good: calm after the start. Growing, or full of spikes, asks for a lower learning rate."),
)  # fmt: skip


class Family(NamedTuple):
    """Metrics whose names begin alike, one sentence on what good looks like, and the charts of metrics that are read together."""

    title: str
    prefixes: tuple[str, ...]
    good: str
    charts: tuple[Spec, ...] = ()


FAMILIES: tuple[Family, ...] = (  # a metric is in the first family whose prefix fits
    Family("Gradients", ("train/grad_norm", "train/skipped_steps", "grad/", "update/"),
           "Good: calm, of one order of magnitude in all layers, and every value finite."),
    Family("Plan", ("train/lr", "train/stage", "train/seq_len", "train/batch_tokens"),
           "What was set rather than what came out; the other curves are read by it."),
    Family("Quality", ("train/", "eval/", "distill/"),
           "Good: losses fall, accuracies climb, and what is measured on held-out text follows what is measured in training.",
           (Spec("How right and how sure", (("train/token_accuracy", "likeliest token right"),
                  ("train/label_probability", "given to the right one"), ("train/top_probability", "given to the likeliest")),
                 "Good: all climb, and the model is about as often right as it is sure. Much surer is overconfident."),)),
    Family("Sparse attention", ("index/",),
           "Good: the distance from attention falls and the recall climbs towards 1: the indexers find the keys that matter."),
    Family("Performance", ("perf/",),
           "Good: level from the first minutes on. Memory that grows, or time that goes into data, is worth a look.",
           (Spec("Where a step's time goes", (("perf/data_ms", "data"), ("perf/forward_ms", "forward"),
                  ("perf/backward_ms", "backward"), ("perf/optimizer_ms", "optimizer"), ("perf/monitor_ms", "watching")),
                 "Good: level, and nearly all of it forward and backward. While a step waits for data, the device is idle."),
            Spec("Memory", (("perf/memory_allocated_bytes", "allocated"), ("perf/memory_reserved_bytes", "reserved"),
                  ("perf/memory_resident_bytes", "of the process"), ("perf/memory_peak_bytes", "at most")),
                 "Good: level after the first steps. What climbs steadily ends the run one day."))),
    Family("Model health", ("model/",),
           "Good: all layers move together and settle. One layer that leaves the others, or a share near 100%, is ill."),
    Family("Data", ("data/",),
           "Good: the share consumed of each source matches its target, and no source is read many times over."),
    Family("Reinforcement learning", ("reward", "frac_reward", "rewards/", "loss", "kl", "entropy", "clip_ratio/", "completions/",
            "sampling/", "opsm/", "groups/", "filters/", "answer/", "tasks/", "approx_kl"),
           "Good: rewards climb while the distance from the reference stays small and answers stay varied."),
)  # fmt: skip
OTHER = Family("Other", (), "Metrics that the table does not know; the run that logged them does.")

LAYER = re.compile(r"(.+)/(?:layer_)?(\d+)")
MARKED = ("Loss", "Reward")  # the charts that show when things happened


Figure = dict[str, Any]  # a chart for the template: its parts, its `spec`, its `lines`; empty without a finite point


def figure(
    spec: Spec, lines: list[Line], *, over: str = "step", band: Band | None = None, marks: Sequence[tuple[float, str, str]] = ()
) -> Figure:
    """Draw a chart; only the charts of `MARKED` get the marks."""
    own = marks if spec.title in MARKED else ()
    parts = line_chart(lines, title=spec.title, kind=spec.kind, zero=spec.zero, over=over, marks=own, band=band)
    return parts and {**parts, "spec": spec, "lines": lines}


def charts_of(
    run: StageLog, colour: int, marks: Sequence[tuple[float, str, str]] = ()
) -> tuple[list[Figure], list[tuple[Family, list[Figure]]]]:
    """Draw the charts that a stage's log fills: the charts of `SPECS`, and by family a chart of every metric left over.

    A metric that every layer has is one chart. colour: palette number of the stage, which the first line of each chart takes.
    """
    palette = [colour, *(c for c in (2, 1, 0, 3, 4, 6, 7, 5) if c != colour)]
    left = dict.fromkeys(sorted(run.curves))  # the metrics that no chart has drawn yet

    def draw(spec: Spec, names: Iterable[tuple[str, str]]) -> Figure:
        lines = [line_of(run, name, label, c) for (name, label), c in zip(names, cycle(palette), strict=False)]
        return figure(spec, lines, marks=marks)

    def draw_specs(specs: Iterable[Spec]) -> Iterator[Figure]:
        rows = by_row(left)
        for spec in specs:
            names = [(name, label or inner(row, name)) for row, label in spec.lines for name in rows.get(row, [])]
            for name, _ in names:
                left.pop(name, None)
            yield draw(spec, names)

    def draw_rest(family: Family, names: Iterable[str]) -> Iterator[Figure]:
        yield from draw_specs(family.charts)
        whole, layers = by_layer(name for name in names if name in left)
        for base, name_of_layer in sorted(layers.items()):
            spec = spec_of(next(iter(name_of_layer.values())))
            good = f"{spec.good} The grey area spans all {len(name_of_layer)} layers."
            lines, band = bundle({layer: run.curves[name] for layer, name in name_of_layer.items()})
            yield figure(replace(spec, title=f"{base} by layer", good=good), lines, band=band)
        for row, alike in by_row(whole).items():
            for start in range(0, len(alike), COLOURS):
                some = alike[start : start + COLOURS]
                labels = [inner(row, name) if len(some) > 1 else name.split("/")[-1] for name in some]
                spec = replace(spec_of(some[0]), title=row if len(some) > 1 else some[0])
                yield draw(spec, zip(some, labels, strict=True))

    main = list(filter(None, draw_specs(SPECS)))
    return main, [(family, list(filter(None, draw_rest(family, names)))) for family, names in in_families(left)]


def heat_maps(scores: Iterable[tuple[str, int, ExamScore]]) -> dict[str, list[Figure]]:
    """Draw needle tests by length and depth, a map for each of the ``scores`` (title and colour of a checkpoint, score), by exam.

    The raw score beside a likelihood that was divided by a length gets no map.
    """
    found: dict[str, list[Figure]] = {}
    for title, colour, score in scores:
        cells = {}
        for (length, depth), value in cells_in(score.groups).items():
            cell = as_dict(value)
            share, n = as_number(cell.get("accuracy")), as_number(cell.get("n"))
            ends = [*map(as_number, as_list(cell.get("interval")))]
            where = f"{length:,} tokens, {depth}% deep: {fmt.percent(share)} of {fmt.plural(n, 'question')}"
            told = f"{where}, 95% interval {' to '.join(map(fmt.percent, ends))}"
            cells[f"{length // 1024}k" if length % 1024 == 0 else str(length), f"{depth}%"] = share, told
        base = score.chance if 0 <= score.chance < 1 else 0.0
        parts = heat_map(cells, title=f"{title} on {score.split}, accuracy by length and depth", base=base)
        if parts and not score.method.endswith(", raw"):
            found.setdefault(score.split, []).append({**parts, "title": title, "colour": colour, "score": score})
    return found


def spec_of(name: str) -> Spec:
    """Return the chart of a metric that no entry of `SPECS` names, with its meaning from the table."""
    metric = describe(name)
    good = f"{metric.meaning[:1].upper()}{metric.meaning[1:]}." if metric else "Not described in the table of metrics."
    return Spec(name, ((name, name),), good, zero=False)


def kind_of(name: str) -> str:
    """Return how a metric's values are written, by its unit or, when the table does not know it, by the end of its name."""
    metric = describe(name)
    unit = metric.unit if metric else {"frac": "fraction", "bytes": "bytes"}.get(name.rpartition("_")[2], "")
    return KINDS.get(unit, "number")


def line_of(run: StageLog, name: str, label: str, colour: int, over: str = "step") -> Line:
    """Return a stage's curve of one metric, over steps or over tokens."""
    series, tokens = run.curves[name], run.log.tokens
    smooth = not name.startswith(EXACT)
    if over == "tokens":
        x = tokens.values[np.searchsorted(tokens.steps, series.steps)]
        return Line(label, x[np.isfinite(x)], series.values[np.isfinite(x)], colour, smooth)
    return Line(label, series.steps, series.values, colour, smooth)


def bundle(layers: dict[int, Series]) -> tuple[list[Line], Band]:
    """Return the curves of the first, the middle, the last and the oddest layer, and the area that all layers span.

    The oddest is farthest from the others at the end; a layer whose newest value is not finite is the farthest of all.
    """
    numbers = sorted(layers)
    steps = np.unique(np.concatenate([series.steps for series in layers.values()]))
    values = np.full((len(numbers), len(steps)), math.nan)
    for row, layer in zip(values, numbers, strict=True):
        row[np.searchsorted(steps, layers[layer].steps)] = layers[layer].values
    known = np.isfinite(values)
    ends = values[known[:, -1], -1]
    distance = np.where(known[:, -1], abs(values[:, -1] - (np.median(ends) if len(ends) else 0.0)), math.inf)
    odd = numbers[distance.argmax()]
    lines: list[Line] = []
    for layer in dict.fromkeys((numbers[0], numbers[len(numbers) // 2], numbers[-1], odd)):
        farthest = ", farthest from the others" if layer == odd and len(numbers) > 2 else ""
        series = layers[layer]
        lines.append(Line(f"layer {layer}{farthest}", series.steps, series.values, (0, 1, 3, 2)[len(lines)], smooth=False))
    shown, ways = known.any(axis=0), ((math.inf, np.min), (-math.inf, np.max))
    low, high = (extreme(np.where(known, values, other), axis=0)[shown] for other, extreme in ways)
    return lines, Band(steps[shown], low, high)


def family_of(name: str) -> Family:
    """Return the family of a metric."""
    return next((family for family in FAMILIES if name.startswith(family.prefixes)), OTHER)


def in_families(names: Iterable[str]) -> list[tuple[Family, list[str]]]:
    """Group names by family, keeping the order of both; families without a name are left out."""
    found: dict[Family, list[str]] = {}
    for name in names:
        found.setdefault(family_of(name), []).append(name)
    return [(family, found[family]) for family in (*FAMILIES, OTHER) if family in found]


def by_row(names: Iterable[str]) -> dict[str, list[str]]:
    """Group metrics by the row of the table that declares them; a metric that no row declares is a separate group."""
    rows: dict[str, list[str]] = {}
    for name in names:
        rows.setdefault(declared_name(name) or name, []).append(name)
    return rows


def by_layer(names: Iterable[str]) -> tuple[list[str], dict[str, dict[int, str]]]:
    """Return the metrics of the whole model, and the names by layer of each metric that layers have."""
    whole: list[str] = []
    layers: dict[str, dict[int, str]] = {}
    for name in names:
        if found := LAYER.fullmatch(name):
            layers.setdefault(found[1], {})[int(found[2])] = name
        else:
            whole.append(name)
    return whole, {base: dict(sorted(name_of_layer.items())) for base, name_of_layer in layers.items()}


def inner(row: str, name: str) -> str:
    """Return the part of a name that replaces the angle brackets of its row: `test` in `eval/test_accuracy`."""
    before, after = row[: row.index("<")], row[row.index(">") + 1 :]
    return name[len(before) : len(name) - len(after)]
