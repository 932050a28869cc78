"""What a run folder holds, read tolerantly: everything but `config.yaml` may be missing, torn or half right.

    config.yaml        resolved configuration (the one file a run folder must have)
    metrics.jsonl      {"step", "tokens", "time", "stage"?, metric: number or null} per line
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

import itertools
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from osler.errors import UserError
from osler.report.model import checkpoint_model
from osler.runtime.files import RunFolder, read_json
from osler.yaml12 import load_yaml

NAN = math.nan
STAGE_ORDER = ("untrained", "pretrain", "midtrain", "sft", "grpo", "rl")


@dataclass
class Series:
    """One metric over steps, in step order; NaN where the run logged a value that was not finite."""

    steps: list[int]
    values: list[float]

    def finite(self) -> list[tuple[int, float]]:
        return [(s, v) for s, v in zip(self.steps, self.values, strict=True) if math.isfinite(v)]


@dataclass
class StageRun:
    """The log of one stage: its curves by metric name and the clock beside them (by step)."""

    name: str
    curves: dict[str, Series] = field(default_factory=dict)
    clock: dict[int, tuple[float, float]] = field(default_factory=dict)  # step -> (tokens, unix seconds)
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    model: dict[str, Any] = field(default_factory=dict)  # as its checkpoints describe it, {} without one

    @property
    def last_step(self) -> int:
        return max(self.clock, default=0)

    @property
    def tokens(self) -> float:
        return max((t for t, _ in self.clock.values() if math.isfinite(t)), default=NAN)

    @property
    def seconds(self) -> float:
        """Time between the first and the last line, pauses left out."""
        gaps = self._gaps()
        return sum(gaps) - sum(self.pauses) if gaps else NAN

    @property
    def pauses(self) -> list[float]:
        """Gaps between lines, in seconds, far longer than the run's usual ones: it was stopped, or it slept."""
        gaps = self._gaps()
        return [g for g in gaps if g > max(60.0, 30 * statistics.median(gaps))] if len(gaps) >= 5 else []

    def _gaps(self) -> list[float]:
        times = [time for _, (_, time) in sorted(self.clock.items()) if math.isfinite(time)]
        return [max(b - a, 0.0) for a, b in itertools.pairwise(times)]


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


def read_run(folder: str | Path) -> Run:
    """Read a run folder; raises UserError when it has no config.yaml."""
    path = Path(folder)
    if not RunFolder(path).config.is_file():
        raise UserError(
            f"{path} is not a run folder: it has no config.yaml. Give the folder that a training run wrote "
            "(the one with config.yaml and metrics.jsonl in it)."
        )
    problems: list[str] = []
    text, config = _read_config(RunFolder(path).config, problems)
    stages = _read_stages(path, problems)
    names = [stage.name for stage in stages]
    runs = _read_metrics(path, problems)
    for sub in sorted(p for p in path.iterdir() if p.is_dir() and _is_run(p)):
        found = _read_metrics(sub, problems, sub.name) or [StageRun(sub.name)]
        if RunFolder(sub).config.is_file():
            found[0].config_text, found[0].config = _read_config(RunFolder(sub).config, problems)
        found[0].model = checkpoint_model(sub)
        runs += found
    runs.sort(key=lambda run: stage_rank(run.name, names))
    versions, groups = _read_versions(path, problems)
    return Run(
        path=path, config=config, config_text=text, model=checkpoint_model(path), runs=runs, stages=stages,
        exams=_read_exams(path, names, problems), comparisons=_read_comparisons(path, problems),
        samples=_read_samples(path, problems), versions=versions, groups=groups,
        notes=[_text(n) for n in _list(_read_json(path / "notes.json", problems)) if _text(n)],
        next_steps=_read_next(path, problems), problems=problems,
    )  # fmt: skip


def stage_rank(label: str, names: Iterable[str] = ()) -> float:
    """Where a stage or checkpoint label belongs in time: by stages.json, else by the usual order of training."""
    low = label.lower()
    for order in (list(names), STAGE_ORDER):
        hits = [i for i, name in enumerate(order) if name and name.lower() in low]
        if hits:
            return hits[-1]
    return -1 if any(word in low for word in ("untrained", "random", "base", "before")) else 100


def read_jsonl(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a JSON-lines file and how many lines before the last were not objects."""
    try:
        # The newline byte alone ends a line; str.splitlines would also cut at characters JSON strings may hold.
        lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    except FileNotFoundError:
        return [], 0
    found: list[dict[str, Any]] = []
    bad = 0
    for i, line in enumerate(lines):
        try:
            item = json.loads(line)
        except ValueError:
            item = None
        if isinstance(item, dict):
            found.append(item)
        elif i < len(lines) - 1:
            bad += 1
    return found, bad


def _is_run(folder: Path) -> bool:
    return RunFolder(folder).config.is_file() or RunFolder(folder).metrics.is_file()


def _read_config(path: Path, problems: list[str]) -> tuple[str, dict[str, Any]]:
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = load_yaml(text, path.name)
    except UserError as error:
        problems.append(f"{error} The file is shown as it stands.")
        config = None
    return text, config if isinstance(config, dict) else {}


def _read_metrics(folder: Path, problems: list[str], default: str = "") -> list[StageRun]:
    """One StageRun per stage named in metrics.jsonl (lines without a stage belong to `default`)."""
    lines, bad = read_jsonl(RunFolder(folder).metrics)
    if bad:
        where = f"{default}/metrics.jsonl" if default else "metrics.jsonl"
        problems.append(f"{where}: {bad} unreadable line{'s' if bad > 1 else ''} skipped.")
    points: dict[str, dict[str, dict[int, float]]] = {}
    clocks: dict[str, dict[int, tuple[float, float]]] = {}
    for line in lines:
        step = _number(line.get("step"))
        if not math.isfinite(step):
            continue
        stage = default or _text(line.get("stage"))
        clocks.setdefault(stage, {})[int(step)] = (_number(line.get("tokens")), _number(line.get("time")))
        for name, raw in line.items():
            numeric = raw is None or isinstance(raw, (int, float)) or raw in ("NaN", "Infinity", "-Infinity")
            if name not in ("step", "tokens", "time", "stage") and numeric:
                # A step logged twice (a resume without truncation) counts once, the later line wins.
                points.setdefault(stage, {}).setdefault(name, {})[int(step)] = _number(raw)
    runs = []
    for stage, clock in clocks.items():
        curves = {
            name: Series(sorted(by_step), [by_step[step] for step in sorted(by_step)])
            for name, by_step in points.get(stage, {}).items()
        }
        runs.append(StageRun(stage, curves, clock))
    return runs


def _read_stages(path: Path, problems: list[str]) -> list[Stage]:
    rows = _dicts(_read_json(RunFolder(path).stages, problems))
    return [Stage(_text(r.get("name")), _number(r.get("seconds")), _text(r.get("what"))) for r in rows]


def _read_exams(path: Path, stage_names: list[str], problems: list[str]) -> list[ExamScore]:
    """Scores, the checkpoints in order of training, the splits of each in the file's order."""
    table = _read_json(path / "exams.json", problems)
    scores = []
    for label, splits in sorted(_dict(table).items(), key=lambda item: stage_rank(item[0], stage_names)):
        for split, row in _dict(splits).items():
            if not isinstance(row, dict):
                continue
            low, high = _pair(row.get("interval"))
            scores.append(
                ExamScore(
                    label, split, _number(row.get("n")), _number(row.get("correct")), _number(row.get("accuracy")),
                    low, high, _number(row.get("chance")), _number(row.get("constant_letter_baseline")),
                    {_text(k): _number(v) for k, v in _dict(row.get("letters")).items()},
                    _number(row.get("unparsed")), _text(row.get("method")), _number(row.get("presentations", row.get("n"))),
                    _number(row.get("too_long")), _number(row.get("max_seq_len")), _number(row.get("max_new_tokens")),
                )
            )  # fmt: skip
    return scores


def _read_comparisons(path: Path, problems: list[str]) -> list[Comparison]:
    rows = _dicts(_read_json(path / "comparison.json", problems))
    return [
        Comparison(
            _text(r.get("split")), _number(r.get("before")), _number(r.get("after")), _number(r.get("difference")),
            *_pair(r.get("interval")), _number(r.get("n")), _text(r.get("before_label")), _text(r.get("after_label")),
            r.get("branch") is True,
        )
        for r in rows
    ]  # fmt: skip


def _read_samples(path: Path, problems: list[str]) -> list[Sample]:
    rows, bad = read_jsonl(RunFolder(path).samples)
    if bad:
        problems.append(f"samples.jsonl: {bad} unreadable line{'s' if bad > 1 else ''} skipped.")
    samples = []
    for r in rows:
        correct = r.get("correct")
        options = r.get("options")
        if isinstance(options, dict):
            options = list(options.values())
        question = _text(r.get("question"))
        samples.append(
            Sample(
                _text(r.get("id")) or question, _text(r.get("stage")), question, [_text(o) for o in _list(options)],
                _text(r.get("thinking")), _text(r.get("answer")), _text(r.get("correct_answer")),
                correct if isinstance(correct, bool) else None,
            )
        )  # fmt: skip
    return samples


def _read_versions(path: Path, problems: list[str]) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    table = _dict(_read_json(path / "versions.json", problems))
    flat = {k: _text(v) for k, v in table.items() if not isinstance(v, (dict, list))}
    groups = {k: {str(a): _text(b) for a, b in v.items()} for k, v in table.items() if isinstance(v, dict) and v}
    return flat, groups


def _read_next(path: Path, problems: list[str]) -> list[tuple[str, str]]:
    steps = []
    for item in _list(_read_json(path / "next.json", problems)):
        if isinstance(item, dict):
            steps.append((_text(item.get("text")), _text(item.get("command"))))
        else:
            steps.append((_text(item), ""))
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


def _number(raw: object) -> float:
    if isinstance(raw, (int, float, str)):
        try:
            value = float(raw)
        except (ValueError, OverflowError):
            return NAN
        return value if math.isfinite(value) else NAN
    return NAN


def _pair(raw: object) -> tuple[float, float]:
    pair = _list(raw)
    return (_number(pair[0]), _number(pair[1])) if len(pair) == 2 else (NAN, NAN)


def _text(raw: object) -> str:
    if raw is None:
        return ""
    return raw if isinstance(raw, str) else json.dumps(raw, ensure_ascii=False, default=str)


def _list(raw: object) -> list[Any]:
    return list(raw) if isinstance(raw, (list, tuple)) else []


def _dict(raw: object) -> dict[str, Any]:
    return {str(k): v for k, v in raw.items()} if isinstance(raw, dict) else {}


def _dicts(raw: object) -> list[dict[str, Any]]:
    return [row for row in _list(raw) if isinstance(row, dict)]
