"""Runs laid over one another: one self-contained page, and the same numbers as a table for the terminal.

Curves run over tokens seen, which runs with different batch sizes have in common. Runs of one stage are compared with each other,
whatever their kind; runs with several stages, such as a pipeline, are compared stage by stage. Curves that fewer than two runs
have are left out, and so are curves of single layers. Exams are compared question by question, where both runs' answers are
stored. Single checkpoints, quantised ones for example, are compared by their exams alone.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from osler.checkpoint.folders import is_checkpoint
from osler.config.schema import encode
from osler.eval.score import mcnemar, paired_difference
from osler.monitor.metrics import declared_name
from osler.records.answers import asked_differently, read_sheets
from osler.records.results import ExamScore, SampledAnswer
from osler.records.values import as_text
from osler.report import charts
from osler.report.charts import COLOURS, SPECS, Figure, Spec
from osler.report.curves import Floats
from osler.report.page import write_page
from osler.report.read import RunRecord, StageLog, read_run
from osler.report.words import interval, stage_title
from osler.runs.folder import flat
from osler.runtime import format as fmt
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder

logger = logging.getLogger(__name__)

LEFT_OUT = ("description",)  # fields that say nothing about a run
CELL_WIDTH = 36  # characters of a configuration's value in the terminal, where three fit; the page has whole values
EXAM = "eval/<split>_accuracy"  # a row of METRICS
PAIRED = ["exam", "runs", "before", "after", "difference", "95% interval", "gained", "lost", "McNemar's p", "questions"]
HOW_TO_PAIR = "Run `osler eval` for each on the same exam: it stores the answers that a comparison question by question needs."


class Member(NamedTuple):
    """One stage of one run, with the run's name and the number of its colour."""

    name: str
    colour: int
    stage: StageLog
    run: RunRecord

    @property
    def config(self) -> dict[str, Any]:
        """The stage's configuration, or else the configuration of its run."""
        return self.stage.config or self.run.own.config

    @property
    def exams(self) -> list[ExamScore]:
        """The stage's scores, or the scores of the last checkpoint for a run without stages."""
        labels = {self.stage.name, self.stage.name or (self.run.exams[-1].label if self.run.exams else "")}
        return [score for score in self.run.exams if score.label in labels]


Table = list[tuple[str, list[str]]]  # each row: its title, and a text for each run


def compare(folders: Sequence[str], out: str | Path) -> str:
    """Run the command ``compare``: write the page, and return the table for the terminal and the page's path.

    Single checkpoints get no page, nor do run folders that only hold one. Raises UserError when nothing can be compared.
    """
    pairs = paired(folders)
    pair_table = fmt.table([PAIRED, *pairs], left=2) if pairs else HOW_TO_PAIR
    if bare := [folder for folder in folders if _has_no_curves(Path(folder))]:
        if len(folders) < 2 or not pairs:
            raise UserError(f"These checkpoints have no answers to the same exam. {HOW_TO_PAIR}")
        logger.info(f"No page is written: it would show the curves of training, and there are none in {', '.join(bare)}.")
        return pair_table
    runs = _open(folders)
    groups, texts = [], []
    for title, members in _groups(runs).items():
        rows, apart = numbers(members), differences(members)
        main, families = _curves(members)
        tables = {"Numbers": rows, "What differs in their configurations": apart}
        groups.append({"title": title or "Comparison", "members": members, "tables": tables, "main": main, "families": families})
        groups[-1]["maps"] = charts.heat_maps((m.name, m.colour, score) for m in members for score in m.exams)
        names, short = [m.name for m in members], [(key, [cell[:CELL_WIDTH] for cell in row]) for key, row in apart]
        lines = [(title, names), *rows, ("", [""] * len(members)), *short]
        texts.append(fmt.table([[what, *row] for what, row in lines]).rstrip())
    about = {"name": " · ".join(runs), "what": "Osler comparison", "made_of": "the files of these runs"}
    path = write_page(Path(out), "compare.html", about, names=list(runs), groups=groups, titles=PAIRED, pairs=pairs)
    return "\n\n".join([*texts, pair_table, str(path)])


def _has_no_curves(path: Path) -> bool:
    """Return whether a path is a checkpoint, or a run folder that was made of one and trained nothing."""
    return is_checkpoint(path) or (RunFolder(path).checkpoints.is_dir() and not RunFolder(path).metrics.exists())


def paired(folders: Sequence[str]) -> list[list[str]]:
    """Return what changed from the first run or checkpoint to each other one, on the questions that both were asked.

    The interval allows for questions that ask for the same fact and so depend on each other. McNemar's test does not, so it is
    given for independent questions alone.
    """
    sheets = [_answers(Path(folder)) for folder in folders]
    rows = []
    for folder, later in zip(folders[1:], sheets[1:], strict=True):
        for exam in [name for name in sheets[0] if name in later]:
            (before, settings), (after, others) = sheets[0][exam], later[exam]
            if told := asked_differently(settings, others):
                logger.warning(f"{exam} is not compared question by question, because it was asked differently: {told}.")
                continue
            shared = [question for question in before if question in after]
            if not shared:
                continue
            old, new = ([fmean(one.correct is True for one in run[question]) for question in shared] for run in (before, after))
            clusters = [before[question][0].cluster for question in shared]
            change = paired_difference(old, new, clusters)
            gained, lost = (sum(one > other for one, other in zip(*pair, strict=True)) for pair in ((new, old), (old, new)))
            is_single = len(set(clusters)) == len(shared) and {0.0, 1.0}.issuperset(old + new)
            asked = max(len(before), len(after))
            rows.append([
                exam, f"{Path(folders[0]).name} → {Path(folder).name}",
                *(fmt.percent(fmean(each)) for each in (old, new)),
                fmt.points(change.mean), " to ".join(map(fmt.points, change.interval)), fmt.count(gained), fmt.count(lost),
                f"{mcnemar(gained, lost):.4f}" if is_single else fmt.MISSING,
                fmt.count(len(shared)) + (f" of {fmt.count(asked)}" if asked > len(shared) else ""),
            ])  # fmt: skip
    return rows


def _answers(path: Path) -> dict[str, tuple[dict[str, list[SampledAnswer]], Mapping[str, Any]]]:
    """Return the stored answers of a run, or of one checkpoint of it, by exam and question, and how each exam was asked."""
    found: dict[str, tuple[dict[str, list[SampledAnswer]], Mapping[str, Any]]] = {}
    alone = is_checkpoint(path)
    for sheet in read_sheets(RunFolder(path.resolve().parent.parent if alone else path).answers):
        if sheet.checkpoint == path.name if alone else sheet.is_of_run:
            by_question: dict[str, list[SampledAnswer]] = {}
            for answer in sheet.answers:
                by_question.setdefault(answer.id, []).append(answer)
            found[sheet.name] = by_question, sheet.settings
    return found


def numbers(members: Sequence[Member]) -> Table:
    """Return how the runs ended, without rows that no run can fill."""
    stages = [m.stage for m in members]
    rows: Table = [
        ("parameters", [fmt.count(s.model.num_parameters if s.model else math.nan) for s in stages]),
        ("steps", [fmt.count(s.last_step) for s in stages]),
        ("tokens", [fmt.count(s.tokens) for s in stages]),
        ("time", [fmt.duration(s.seconds) for s in stages]),
    ]
    curves: list[tuple[str, str, Callable[[Floats], float], Callable[[float], str]]] = [
        ("tokens/s, median", "perf/tokens_per_second", np.median, fmt.count),
        ("sampled tokens/s, median", "perf/rollout_tokens_per_second", np.median, fmt.count),
        ("training loss, mean of the last tenth", "train/loss", _last_tenth, fmt.number),
        ("held-out loss at the end", "eval/loss", itemgetter(-1), fmt.number),
        ("held-out loss, lowest", "eval/loss", np.min, fmt.number),
        ("bits per byte at the end", "eval/bits_per_byte", itemgetter(-1), fmt.number),
        ("reward, mean of the last tenth", "reward", _last_tenth, fmt.number),
        *(
            (f"accuracy on {charts.inner(EXAM, name)} while training, last", name, itemgetter(-1), fmt.percent)
            for name in sorted({n for s in stages for n in s.curves if declared_name(n) == EXAM})
        ),
    ]
    for what, name, reduced, write in curves:
        known = [s.finite(name).values for s in stages]
        rows.append((what, [write(float(reduced(values))) if len(values) else fmt.MISSING for values in known]))
    for split in dict.fromkeys(score.split for m in members for score in m.exams):
        scores = [next((score for score in m.exams if score.split == split), None) for m in members]
        told = [f"{fmt.percent(score.accuracy)} ({interval(score)})" if score else fmt.MISSING for score in scores]
        rows.append((f"exam on {split}, 95% interval", told))
    return [(what, row) for what, row in rows if any(cell != fmt.MISSING for cell in row)]


def differences(members: Sequence[Member]) -> Table:
    """Return the fields in which the configurations differ, then the versions and machines that differ."""
    every = [flat({**_config_of(m), "versions": {**m.run.versions, **m.run.groups}}) for m in members]
    keys = dict.fromkeys(key for fields in every for key in fields if key not in LEFT_OUT)
    rows = []
    for key in keys:
        values = [fields.get(key, fmt.MISSING) for fields in every]
        rows.append((key, ["null" if value is None else as_text(value) for value in values]))
    return [(key, row) for key, row in rows if len(set(row)) > 1]


def _config_of(member: Member) -> dict[str, Any]:
    """Return the configuration with the model that is trained: with ``init_from`` the fields of ``model`` are unused defaults."""
    config, model = member.config, member.stage.model
    if model is None:
        return {key: value for key, value in config.items() if key != "model" or not config.get("init_from")}
    return {**config, "model": encode(model)}


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
    """Group the stages to compare, by title: all together when each run has one stage, else by name or kind."""
    every = [(name, colour, stage, run) for colour, (name, run) in enumerate(runs.items()) for stage in run.runs]
    members = [Member(*each) for each in every if each[2].curves]
    groups: dict[str, list[Member]] = {}
    for member in members:
        key = "" if len(members) == len(runs) else member.stage.name or as_text(member.config.get("kind"))
        groups.setdefault(stage_title(key) if key else "", []).append(member)
    shared = {title: alike for title, alike in groups.items() if len(alike) > 1}
    if {m.name for alike in shared.values() for m in alike} != set(runs):
        found = "; ".join(f"{m.name}: {m.stage.name or 'one stage'}" for m in members)
        raise UserError(f"A run has no stage in common with another ({found}). Give the folders of the stages to compare.")
    return shared


def _curves(members: Sequence[Member]) -> tuple[list[Figure], list[tuple[charts.Family, list[Figure]]]]:
    """Draw each metric that two runs or more have as one chart: the usual ones, then the others by family."""

    def overlay(spec: Spec, name: str) -> Figure:
        lines = [charts.line_of(m.stage, name, m.name, m.colour, "tokens") for m in members if name in m.stage.curves]
        return charts.figure(spec, [line for line in lines if len(line.x)], over="tokens")

    counts = Counter(name for member in members for name in member.stage.curves)
    left = dict.fromkeys(sorted(name for name, count in counts.items() if count > 1))
    rows = charts.by_row(left)
    main = []
    for spec in SPECS:
        for row, label in spec.lines:
            for name in rows.get(row, []):
                del left[name]
                line = label or charts.inner(row, name)
                one = replace(spec, lines=((row, line),))
                if len(spec.lines) > 1 or not label:  # the chart's sentence is about several lines side by side
                    one = replace(one, title=f"{spec.title}: {line}", good=charts.spec_of(name).good)
                main.append(overlay(one, name))
    whole, _ = charts.by_layer(left)  # layers of several runs over one another could not be told apart
    rest = [(family, [overlay(charts.spec_of(name), name) for name in names]) for family, names in charts.in_families(whole)]
    return list(filter(None, main)), [(family, list(filter(None, drawn))) for family, drawn in rest]


def _last_tenth(known: Floats) -> float:
    return float(known[-max(1, len(known) // 10) :].mean())
