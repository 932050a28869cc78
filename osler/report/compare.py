"""Runs laid over one another: one self-contained page, and the same numbers as a table for the terminal.

Curves run over tokens seen, the one clock that runs of different batches share. Runs of one stage are compared with each other,
whatever their kind; runs with several stages, as a quickstart has, stage by stage. What fewer than two of them have is left out,
and so are metrics of single layers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from osler.monitor.metrics import declared_name
from osler.records.results import ExamScore
from osler.records.values import as_text
from osler.report import format as fmt
from osler.report import html
from osler.report.charts import (
    COLOURS,
    SPECS,
    Chart,
    Family,
    Figure,
    Spec,
    by_layer,
    figures,
    in_families,
    inner,
    line_of,
    spec_of,
)
from osler.report.curves import Floats
from osler.report.read import RunRecord, StageLog, count_parameters, find_model, read_run
from osler.report.words import stage_title
from osler.runtime.errors import UserError

LEFT_OUT = ("description",)  # fields that say nothing about a run
CELL_WIDTH = 36  # of a configuration's value in the terminal: three of them fit; the page has values whole


@dataclass(frozen=True)
class Member:
    """One stage of one run: the run's name, the number of its colour, and what is compared."""

    name: str
    colour: int
    stage: StageLog
    config: Mapping[str, Any]
    model: Mapping[str, Any]
    exams: Sequence[ExamScore]
    versions: Mapping[str, Any]


Table = list[tuple[str, list[str]]]  # rows: what, and a text for each run


def build_comparison(folders: Sequence[str], out: str | Path) -> tuple[str, Path]:
    """Write the page and return the table for the terminal and the page's path; raises UserError when nothing compares."""
    runs = _open(folders)
    groups = _groups(runs)
    path = html.write_page(Path(out), render(groups, list(runs)))
    return "\n\n".join(_as_text(title, members) for title, members in groups.items()), path


class RunGroup(NamedTuple):
    """What the page shows of stages that are compared with each other."""

    title: str
    members: Sequence[Member]
    tables: Mapping[str, Table]
    main: Sequence[Figure]
    families: Sequence[tuple[Family, Sequence[Figure]]]


def render(groups: Mapping[str, Sequence[Member]], names: Sequence[str]) -> str:
    """Return the whole page."""
    shown = {}
    for position, (title, members) in enumerate(groups.items()):
        tables = {"Numbers": numbers(members), "What differs in their configurations": differences(members)}
        shown[f"group-{position}"] = RunGroup(title, members, tables, *_curves(members))
    body = html.render("compare.html", names=names, groups=shown)
    links = {anchor: group.title or "Comparison" for anchor, group in shown.items()}
    return html.page(" · ".join(names), "Osler comparison", "the files of these runs", body, links)


def numbers(members: Sequence[Member]) -> Table:
    """Return how the runs ended, without rows that no run can fill."""
    stages = [m.stage for m in members]
    models = [count_parameters(dict(m.model)) if m.model else None for m in members]
    rows: Table = [
        ("parameters", [fmt.count(n) if n is not None else fmt.MISSING for n in models]),
        ("steps", [fmt.count(s.last_step) for s in stages]),
        ("tokens", [fmt.count(s.tokens) for s in stages]),
        ("time", [fmt.duration(s.seconds) for s in stages]),
    ]
    for what, name, of, write in (
        ("tokens/s, median", "perf/tokens_per_second", np.median, fmt.count),
        ("sampled tokens/s, median", "perf/rollout_tokens_per_second", np.median, fmt.count),
        ("training loss, mean of the last tenth", "train/loss", _last_tenth, fmt.number),
        ("held-out loss at the end", "eval/loss", _end, fmt.number),
        ("held-out loss, lowest", "eval/loss", np.min, fmt.number),
        ("bits per byte at the end", "eval/bits_per_byte", _end, fmt.number),
        ("reward, mean of the last tenth", "reward", _last_tenth, fmt.number),
    ):
        rows.append((what, [write(_value(s, name, of)) for s in stages]))
    for name in sorted({n for s in stages for n in s.curves if declared_name(n) == "eval/<split>_accuracy"}):
        split = inner("eval/<split>_accuracy", name)
        rows.append((f"accuracy on {split} while training, last", [fmt.percent(_value(s, name, _end)) for s in stages]))
    for split in dict.fromkeys(score.split for m in members for score in m.exams):
        rows.append((f"exam on {split}, 95% interval", [_exam(m, split) for m in members]))
    return [(what, row) for what, row in rows if any(cell != fmt.MISSING for cell in row)]


def differences(members: Sequence[Member]) -> Table:
    """Return the fields in which the configurations differ, then those of versions and machines."""
    flat = [_flat({**m.config, "versions": m.versions}) for m in members]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [(key, [_field(one, key) for one in flat]) for key in keys if key not in LEFT_OUT]
    return [(key, row) for key, row in rows if len(set(row)) > 1]


def _open(folders: Sequence[str]) -> dict[str, RunRecord]:
    """Read the runs, by name; raises UserError when they are too few, too many, not runs, or without metrics."""
    if not 2 <= len(folders) <= COLOURS:
        raise UserError(
            f"compare takes 2 to {COLOURS} run folders, whose colours can be told apart, and was given {len(folders)}."
        )
    places = [Path(folder).resolve() for folder in folders]
    if twice := [str(folder) for i, folder in enumerate(folders) if places[i] in places[:i]]:
        raise UserError(f"{twice[0]} is given twice.")
    unique = len({place.name for place in places}) == len(places)
    runs = {place.name if unique else str(folder): read_run(folder) for place, folder in zip(places, folders, strict=True)}
    for run in runs.values():
        if not any(stage.curves for stage in run.runs):
            raise UserError(f"{run.path} has no metrics yet: its metrics.jsonl is missing or empty. Compare it when it has run.")
    return runs


def _groups(runs: Mapping[str, RunRecord]) -> dict[str, list[Member]]:
    """Group by title what is compared: all runs when each has one stage, else the stages of one name or kind."""
    with_curves = {name: [stage for stage in run.runs if stage.curves] for name, run in runs.items()}
    alone = all(len(stages) == 1 for stages in with_curves.values())
    groups: dict[str, list[Member]] = {}
    for colour, (name, run) in enumerate(runs.items()):
        for stage in with_curves[name]:
            config = stage.config or run.own.config
            key = "" if alone else stage.name or as_text(config.get("kind"))
            labels = {stage.name, stage.name or (run.exams[-1].label if run.exams else "")}
            groups.setdefault(stage_title(key) if key else "", []).append(
                Member(
                    name, colour, stage, config, stage.model or find_model(config),
                    [score for score in run.exams if score.label in labels], {**run.versions, **run.groups},
                )
            )  # fmt: skip
    shared = {title: members for title, members in groups.items() if len(members) > 1}
    if {m.name for members in shared.values() for m in members} != set(runs):
        found = "; ".join(f"{name}: {', '.join(s.name or 'one stage' for s in stages)}" for name, stages in with_curves.items())
        raise UserError(f"A run has no stage in common with another ({found}). Give the folders of the stages to compare.")
    return shared


def _curves(members: Sequence[Member]) -> tuple[list[Figure], list[tuple[Family, list[Figure]]]]:
    """Draw each metric of two runs or more as one chart: the usual ones, then the others by family."""
    counts = Counter(name for member in members for name in member.stage.curves)
    shared = sorted(name for name, count in counts.items() if count > 1)
    main: list[Chart] = []
    for spec in SPECS:
        for row, label in spec.lines:
            for name in (n for n in shared if declared_name(n) == row):
                name_of_line = label or inner(row, name)
                one = replace(spec, lines=((row, name_of_line),))
                if len(spec.lines) > 1 or not label:  # its sentence is about several lines beside one another
                    one = replace(one, title=f"{spec.title}: {name_of_line}", good=spec_of(name).good)
                main.append(_overlay(one, name, members))
    used = {row for spec in SPECS for row, _ in spec.lines}
    rest = []
    for family, names in in_families(n for n in shared if declared_name(n) not in used):
        whole, _ = by_layer(names)  # layers of several runs over one another could not be told apart
        rest.append((family, figures(_overlay(spec_of(name), name, members) for name in whole)))
    return figures(main), rest


def _overlay(spec: Spec, name: str, members: Sequence[Member]) -> Chart:
    lines = [line_of(m.stage, name, m.name, m.colour, "tokens") for m in members if name in m.stage.curves]
    return replace(spec, over="tokens"), [line for line in lines if len(line.x)], None


def _as_text(title: str, members: Sequence[Member]) -> str:
    """Return numbers and differences as one table of text; for unlike kinds of run, only differences in fields that all have."""
    ended, apart = numbers(members), differences(members)
    rest = [] if len({as_text(m.config.get("kind")) for m in members}) == 1 else [row for row in apart if fmt.MISSING in row[1]]
    apart = [(key, [_cut(cell) for cell in row]) for key, row in apart if (key, row) not in rest]
    rows = [(title, [m.name for m in members]), *ended, *([("", [""] * len(members))] if apart else []), *apart]
    first = max(len(what) for what, _ in rows)
    widths = [max(len(row[i]) for _, row in rows) for i in range(len(members))]
    lines = [
        "  ".join([f"{what:<{first}}", *(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True))]).rstrip()
        for what, row in rows
    ]
    more = [f"and {fmt.plural(len(rest), 'field')} that not all kinds of run have: see the page"] if rest else []
    return "\n".join([*lines, *more])


def _cut(cell: str) -> str:
    """Shorten a value to a column of the terminal."""
    return cell if len(cell) <= CELL_WIDTH else cell[: CELL_WIDTH - 1] + "…"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping with dotted keys."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out


def _field(flat: Mapping[str, Any], key: str) -> str:
    """Return a field's value as text, or a dash where a configuration lacks the field."""
    return fmt.MISSING if key not in flat else "null" if flat[key] is None else as_text(flat[key])


def _exam(member: Member, split: str) -> str:
    score = next((score for score in member.exams if score.split == split), None)
    if score is None:
        return fmt.MISSING
    interval = f" ({fmt.percent(score.low)} to {fmt.percent(score.high)})" if math.isfinite(score.low + score.high) else ""
    return fmt.percent(score.accuracy) + interval


def _value(stage: StageLog, name: str, of: Callable[[Floats], float]) -> float:
    """Return what a function makes of a metric's finite values, NaN when there are none."""
    known = stage.finite(name).values
    return float(of(known)) if len(known) else math.nan


def _end(known: Floats) -> float:
    return float(known[-1])


def _last_tenth(known: Floats) -> float:
    return float(known[-max(1, len(known) // 10) :].mean())
