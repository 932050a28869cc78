"""What a run folder holds, read tolerantly: everything but `config.yaml` may be missing, torn or half right.

    config.yaml        resolved configuration (the one file a run folder must have)
    metrics.jsonl      {"step", "tokens", "time", metric: number or null} per line
    events.jsonl       {"step", "time", "kind", "name", "message", ...} per line: alerts, incidents, rollbacks
    checkpoints/       step-XXXXXXXXX/model.json: the model that was trained
    <stage>/           run folders of a quickstart's stages (pretrain/, sft/, grpo/ ...), read the same way
    stages.json        [{"name", "seconds", "what"}]
    exams.json         {label of a checkpoint: {split: {"n", "correct", "accuracy", "interval": [low, high], "chance",
                       "constant_letter_baseline", "letters": {"A": n, ...}, "unparsed", "method", "presentations",
                       "too_long", "max_seq_len", "max_new_tokens"}}}       the last four may be missing
    comparison.json    [{"split", "before", "after", "difference", "interval", "n", "before_label", "after_label",
                       "branch"?: true when `after` does not go on from the run's best checkpoint}]
    samples.jsonl      {"id", "stage", "question", "options", "thinking", "answer", "correct_answer", "correct"} a line
    versions.json      {package: version, ..., "machine": {...}, any other group: {...}}
    notes.json         [sentence, ...]       what the run wants its reader to know
    next.json          [sentence or {"text", "command"}, ...]       what to do next

Accuracies, intervals and differences are fractions. A file that cannot be read becomes a line in `Run.problems`, which
the page shows; a torn last line of a .jsonl is what a kill leaves behind and is dropped without a word.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from osler.checkpoint.manifest import MANIFEST
from osler.errors import UserError
from osler.records import jsonl
from osler.records.events import Event, read_events
from osler.records.values import NAN, as_dict, as_dicts, as_list, as_number, as_pair, as_text
from osler.report.curves import Floats, Series, read_curves
from osler.report.model import checkpoint_model
from osler.runtime.files import RunFolder, read_json
from osler.yaml12 import load_yaml

MOST_NAMED = 8  # runs that a message spells out
STAGE_ORDER = ("untrained", "pretrain", "midtrain", "sft", "grpo", "rl")


@dataclass
class StageRun:
    """The log of one stage: its curves by metric name, and beside them tokens seen and unix seconds."""

    name: str
    curves: dict[str, Series] = field(default_factory=dict)
    seen: Series = field(default_factory=Series)  # tokens
    clock: Series = field(default_factory=Series)  # unix seconds
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    model: dict[str, Any] = field(default_factory=dict)  # as its checkpoints describe it, {} without one
    events: list[Event] = field(default_factory=list)  # oldest first

    def finite(self, name: str) -> Series:
        """The finite points of a curve, none when the metric was not logged."""
        return self.curves.get(name, Series()).finite()

    @property
    def last_step(self) -> int:
        return int(self.seen.steps[-1]) if len(self.seen) else 0

    @property
    def tokens(self) -> float:
        known = self.seen.finite().values
        return float(known.max()) if len(known) else NAN

    @property
    def seconds(self) -> float:
        """Time between the first and the last line, pauses left out."""
        gaps = self._gaps()
        return float(gaps.sum()) - sum(self.pauses) if len(gaps) else NAN

    @property
    def pauses(self) -> list[float]:
        """Gaps between lines, in seconds, far longer than the run's usual ones: it was stopped, or it slept."""
        gaps = self._gaps()
        return [float(g) for g in gaps[gaps > max(60.0, 30 * np.median(gaps))]] if len(gaps) >= 5 else []

    def _gaps(self) -> Floats:
        return np.maximum(np.diff(self.clock.finite().values), 0.0)


@dataclass
class ExamScore:
    """The score of one checkpoint on one split."""

    label: str
    split: str
    n: float
    correct: float
    accuracy: float
    low: float
    high: float
    chance: float
    constant: float
    letters: dict[str, float]
    unparsed: float
    method: str
    presentations: float  # questions times the option orders that each was shown in; `correct` and the counts are of these
    too_long: float
    max_seq_len: float
    max_new_tokens: float


@dataclass
class Comparison:
    """Two checkpoints on the same questions: the paired difference and its interval."""

    split: str
    before: float
    after: float
    difference: float
    low: float
    high: float
    n: float
    before_label: str
    after_label: str
    branch: bool


@dataclass
class Sample:
    """One answered question."""

    id: str
    stage: str
    question: str
    options: list[str]
    thinking: str
    answer: str
    correct_answer: str
    correct: bool | None


@dataclass
class Stage:
    """One stage of the pipeline and the time it took."""

    name: str
    seconds: float
    what: str


@dataclass
class Run:
    """All there is to tell about one run folder."""

    path: Path
    config: dict[str, Any]
    config_text: str
    model: dict[str, Any]  # as the checkpoints describe it, {} without one
    runs: list[StageRun]
    stages: list[Stage]
    exams: list[ExamScore]
    comparisons: list[Comparison]
    samples: list[Sample]
    versions: dict[str, str]
    groups: dict[str, dict[str, str]]  # machine, fingerprints, ...: the nested parts of versions.json
    notes: list[str]
    next_steps: list[tuple[str, str]]  # (sentence, command or "")
    problems: list[str]


def read_run(folder: str | Path | Run) -> Run:
    """Read a run folder; raises UserError when it has no config.yaml. A run that was read already is returned as it is."""
    if isinstance(folder, Run):
        return folder
    path = Path(folder)
    if not RunFolder(path).config.is_file() or is_checkpoint(path):
        raise UserError(why_no_run(path))
    problems: list[str] = []
    text, config = _read_config(RunFolder(path).config, problems)
    stages = _read_stages(path, problems)
    names = [stage.name for stage in stages]
    runs, events = _read_metrics(path, problems), read_events(RunFolder(path).events)
    if events:
        runs = runs or [StageRun("")]
        runs[-1].events = events
    for sub in sub_runs(path):
        found = _read_metrics(sub, problems, sub.name) or [StageRun(sub.name)]
        if RunFolder(sub).config.is_file():
            found[0].config_text, found[0].config = _read_config(RunFolder(sub).config, problems)
        found[0].model, found[0].events = checkpoint_model(sub), read_events(RunFolder(sub).events)
        runs += found
    runs.sort(key=lambda run: stage_rank(run.name, names))
    versions, groups = _read_versions(path, problems)
    return Run(
        path=path, config=config, config_text=text, model=checkpoint_model(path), runs=runs, stages=stages,
        exams=_read_exams(path, names, problems), comparisons=_read_comparisons(path, problems),
        samples=_read_samples(path, problems), versions=versions, groups=groups,
        notes=[as_text(n) for n in as_list(_read_json(path / "notes.json", problems)) if as_text(n)],
        next_steps=_read_next(path, problems), problems=problems,
    )  # fmt: skip


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint, which has the configuration of its run too."""
    return (path / MANIFEST).is_file()


def why_no_run(path: Path) -> str:
    """What a path is that is no run folder, and what to give instead, as a paragraph."""
    what = "the folder that a training run wrote (the one with config.yaml and metrics.jsonl in it)"
    if not path.is_dir():
        return f"{path} is {'a file and ' if path.exists() else ''}no folder. Give {what}: the one named by --run."
    if is_checkpoint(path):
        return f"{path} is a checkpoint and not a run folder. Give the folder of its run: {path.resolve().parent.parent}."
    if runs := sub_runs(path):
        names = ", ".join(str(run) for run in runs[:MOST_NAMED]) + (" ..." if len(runs) > MOST_NAMED else "")
        holds = "is not a run folder itself but holds"
        return f"{path} {holds} {len(runs)} run{'s' if len(runs) > 1 else ''}. Give one of them: {names}."
    return f"{path} is not a run folder: it has no config.yaml. Give {what}."


def stage_rank(label: str, names: Iterable[str] = ()) -> float:
    """Where a stage or checkpoint label belongs in time: by stages.json, else by the usual order of training."""
    low = label.lower()
    for order in (list(names), STAGE_ORDER):
        hits = [i for i, name in enumerate(order) if name and name.lower() in low]
        if hits:
            return hits[-1]
    return -1 if any(word in low for word in ("untrained", "random", "base", "before")) else 100


def sub_runs(folder: Path) -> list[Path]:
    """The run folders inside a run folder: the stages of a quickstart."""
    return sorted(path for path in folder.iterdir() if is_run(path))


def is_run(path: Path) -> bool:
    """Whether a folder is one that a run has begun to write."""
    return (RunFolder(path).config.is_file() or RunFolder(path).metrics.is_file()) and not is_checkpoint(path)


def _read_config(path: Path, problems: list[str]) -> tuple[str, dict[str, Any]]:
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = load_yaml(text, path.name)
    except UserError as error:
        problems.append(f"{error} The file is shown as it stands.")
        config = None
    return text, config if isinstance(config, dict) else {}


def _read_metrics(folder: Path, problems: list[str], default: str = "") -> list[StageRun]:
    found = read_curves(RunFolder(folder).metrics)
    if found.unreadable:
        where = f"{default}/metrics.jsonl" if default else "metrics.jsonl"
        problems.append(f"{where}: {found.unreadable} unreadable line{'s' if found.unreadable > 1 else ''} skipped.")
    return [StageRun(default, found.metrics, found.tokens, found.clock)] if len(found.clock) else []


def _read_stages(path: Path, problems: list[str]) -> list[Stage]:
    rows = as_dicts(_read_json(RunFolder(path).stages, problems))
    return [Stage(as_text(r.get("name")), as_number(r.get("seconds")), as_text(r.get("what"))) for r in rows]


def _read_exams(path: Path, stage_names: list[str], problems: list[str]) -> list[ExamScore]:
    """Scores, the checkpoints in order of training, the splits of each in the file's order."""
    table = _read_json(path / "exams.json", problems)
    scores = []
    for label, splits in sorted(as_dict(table).items(), key=lambda item: stage_rank(item[0], stage_names)):
        for split, row in as_dict(splits).items():
            if not isinstance(row, dict):
                continue
            low, high = as_pair(row.get("interval"))
            scores.append(
                ExamScore(
                    label, split, as_number(row.get("n")), as_number(row.get("correct")), as_number(row.get("accuracy")),
                    low, high, as_number(row.get("chance")), as_number(row.get("constant_letter_baseline")),
                    {as_text(k): as_number(v) for k, v in as_dict(row.get("letters")).items()},
                    as_number(row.get("unparsed")), as_text(row.get("method")), as_number(row.get("presentations", row.get("n"))),
                    as_number(row.get("too_long")), as_number(row.get("max_seq_len")), as_number(row.get("max_new_tokens")),
                )
            )  # fmt: skip
    return scores


def _read_comparisons(path: Path, problems: list[str]) -> list[Comparison]:
    rows = as_dicts(_read_json(path / "comparison.json", problems))
    return [
        Comparison(
            as_text(r.get("split")), as_number(r.get("before")), as_number(r.get("after")), as_number(r.get("difference")),
            *as_pair(r.get("interval")), as_number(r.get("n")), as_text(r.get("before_label")), as_text(r.get("after_label")),
            r.get("branch") is True,
        )
        for r in rows
    ]  # fmt: skip


def _read_samples(path: Path, problems: list[str]) -> list[Sample]:
    rows, bad = jsonl.read(RunFolder(path).samples)
    if bad:
        problems.append(f"samples.jsonl: {bad} unreadable line{'s' if bad > 1 else ''} skipped.")
    samples = []
    for r in rows:
        correct = r.get("correct")
        options = r.get("options")
        if isinstance(options, dict):
            options = list(options.values())
        question = as_text(r.get("question"))
        samples.append(
            Sample(
                as_text(r.get("id")) or question, as_text(r.get("stage")), question, [as_text(o) for o in as_list(options)],
                as_text(r.get("thinking")), as_text(r.get("answer")), as_text(r.get("correct_answer")),
                correct if isinstance(correct, bool) else None,
            )
        )  # fmt: skip
    return samples


def _read_versions(path: Path, problems: list[str]) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    table = as_dict(_read_json(path / "versions.json", problems))
    flat = {k: as_text(v) for k, v in table.items() if not isinstance(v, (dict, list))}
    groups = {k: {str(a): as_text(b) for a, b in v.items()} for k, v in table.items() if isinstance(v, dict) and v}
    return flat, groups


def _read_next(path: Path, problems: list[str]) -> list[tuple[str, str]]:
    steps = []
    for item in as_list(_read_json(path / "next.json", problems)):
        if isinstance(item, dict):
            steps.append((as_text(item.get("text")), as_text(item.get("command"))))
        else:
            steps.append((as_text(item), ""))
    return [step for step in steps if any(step)]


def _read_json(path: Path, problems: list[str]) -> Any:
    """The parsed file, or None when it is missing or (with a problem noted) unreadable."""
    if not path.exists():
        return None
    try:
        return read_json(path)
    except UserError:
        problems.append(f"{path.name} could not be read; its part of this page is missing.")
        return None
