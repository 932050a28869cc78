"""The contents of a run folder. Every file but `config.yaml` may be missing, torn or partly wrong.

    config.yaml        the resolved configuration (the one file that a run folder must have)
    metrics.jsonl, events.jsonl, exams.json, comparison.json, samples.jsonl, stages.json, answers/       see osler/records
    model.json         the model that is trained
    <stage>/           run folders of a pipeline's stages (pretrain/, sft/, grpo/ ...), read the same way
    versions.json      {package: version, ..., "machine": {...}, any other group: {...}}
    notes.json         [sentence, ...]       what the run wants its reader to know

A file that cannot be read becomes a line in `RunRecord.problems`, which the page shows. A kill may leave a torn last line in a
.jsonl, which is skipped without a word.
"""

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from osler.checkpoint.folders import is_checkpoint
from osler.config.recipe import load_yaml
from osler.config.schema import decode
from osler.model.config import ModelConfig
from osler.records.answers import AnswerSheet, read_sheets
from osler.records.jsonl import Event, read_events
from osler.records.results import Comparison, ExamScore, FinishedStage, read_exams, read_samples
from osler.records.values import NAN, as_dict, as_list, as_text, read_records
from osler.report.curves import MetricsLog, Series, time_at_work
from osler.runs.folder import first_of
from osler.runtime import format as fmt
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder, read_json

T = TypeVar("T")
STAGE_ORDER = ("untrained", "pretrain", "midtrain", "sft", "grpo", "rl")


class StageLog:
    """The files that one stage has written so far: its curves, its configuration, its model, its events."""

    def __init__(self, folder: Path, name: str = "") -> None:
        self.folder, self.name = RunFolder(folder), name
        self.log = MetricsLog(self.folder.metrics)
        self.config: dict[str, Any] = {}
        self.config_text = ""
        self.model: ModelConfig | None = None
        self.events: list[Event] = []  # oldest first
        self.problems: list[str] = []
        self._stamps: dict[Path, tuple[int, int]] = {}

    def refresh(self) -> None:
        """Read what has changed since the last call; raises UserError when a log is there and cannot be read."""
        if self._has_changed(self.folder.events):
            self.events = read_events(self.folder.events)
        self.log.poll()
        if self._has_changed(self.folder.config):
            self.config_text, self.config = _read_config(self.folder.config, self.problems)
        if self._has_changed(self.folder.model):
            with suppress(UserError):  # torn
                self.model = decode(ModelConfig, read_json(self.folder.model))

    def _has_changed(self, path: Path) -> bool:
        old, self._stamps[path] = self._stamps.get(path, (0, 0)), stamp(path)
        return self._stamps[path] != old

    @property
    def curves(self) -> dict[str, Series]:
        """The curves by metric name."""
        return self.log.curves

    def finite(self, name: str) -> Series:
        """Return the finite points of a curve, none when the metric was not logged."""
        return self.curves.get(name, Series()).finite()

    @property
    def last_step(self) -> int:
        return int(self.log.tokens.steps[-1]) if len(self.log.tokens) else 0

    @property
    def tokens(self) -> float:
        return max(self.log.tokens.finite().values.tolist(), default=NAN)

    @property
    def seconds(self) -> float:
        """Time between the first and the last line, pauses left out."""
        return time_at_work(self.log.times)[0]


class RunRecord:
    """Everything that a report needs from one run folder."""

    def __init__(self, path: Path) -> None:
        self.path, run = path, RunFolder(path)
        self.problems: list[str] = []
        self.stages: list[FinishedStage] = self._read(run.stages, partial(read_records, FinishedStage)) or []
        names = [stage.name for stage in self.stages]
        self.own, *inner = [StageLog(path), *(StageLog(sub, sub.name) for sub in sub_runs(path))]
        for stage in (self.own, *inner):
            stage.refresh()
            self.problems += stage.problems
            self._count_unreadable(f"{stage.name}/metrics.jsonl".lstrip("/"), stage.log.unreadable)
        runs = [self.own, *inner] if self.own.curves or self.own.events else inner  # the folder's own log if it shows anything
        self.runs = sorted(runs, key=lambda stage: stage_rank(stage.name, names))  # in the order of training
        exams: list[ExamScore] = self._read(run.exams, read_exams) or []
        self.exams = sorted(exams, key=lambda score: stage_rank(score.label, names))
        self.comparisons: list[Comparison] = self._read(run.comparison, partial(read_records, Comparison)) or []
        self.samples, unreadable = read_samples(run.samples)
        self._count_unreadable("samples.jsonl", unreadable)
        self.answers: list[AnswerSheet] = [sheet for sheet in self._read(run.answers, read_sheets) or [] if sheet.is_of_run]
        versions = as_dict(self._read(path / "versions.json", read_json))
        groups = {key: as_dict(group) for key, group in versions.items() if isinstance(group, dict) and group}
        self.versions = {key: as_text(value) for key, value in versions.items() if not isinstance(value, (dict, list))}
        self.groups = {key: {name: as_text(value) for name, value in group.items()} for key, group in groups.items()}
        self.notes = [as_text(note) for note in as_list(self._read(run.notes, read_json)) if as_text(note)]

    def _read(self, path: Path, reader: Callable[[Path], T]) -> T | None:
        """Return what a reader makes of a file; None when there is no file, or (with a problem noted) when it cannot be read."""
        try:
            return reader(path) if path.exists() else None
        except UserError:
            self.problems.append(f"{path.name} could not be read; its part of this page is missing.")
            return None

    def _count_unreadable(self, name: str, lines: int) -> None:
        if lines:
            self.problems.append(f"{name}: {fmt.plural(lines, 'unreadable line')} skipped.")


def read_run(folder: str | Path | RunRecord) -> RunRecord:
    """Read a run folder; a run that was read already is returned as it is. Raises UserError when there is no config.yaml."""
    if isinstance(folder, RunRecord):
        return folder
    path = Path(folder)
    if not RunFolder(path).config.is_file() or is_checkpoint(path):
        raise UserError(why_no_run(path))
    return RunRecord(path)


def why_no_run(path: Path) -> str:
    """Return why a path is not a run folder, and what to give instead."""
    what = "the folder that a training run wrote (the one with config.yaml and metrics.jsonl in it)"
    if not path.is_dir():
        return f"{path} is {'a file and ' if path.exists() else ''}no folder. Give {what}: the one named by --run."
    if is_checkpoint(path):
        return f"{path} is a checkpoint and not a run folder. Give the folder of its run: {path.resolve().parent.parent}."
    if runs := sub_runs(path):
        names = first_of([str(run) for run in runs])
        return f"{path} is not a run folder itself but holds {fmt.plural(len(runs), 'run')}. Give one of them: {names}."
    return f"{path} is not a run folder: it has no config.yaml. Give {what}."


def stage_rank(label: str, names: Iterable[str] = ()) -> float:
    """Return where a stage or checkpoint belongs in time: by the given names, else by the usual order of training."""
    low = label.lower()
    for order in (list(names), STAGE_ORDER):
        hits = [i for i, name in enumerate(order) if name and name.lower() in low]
        if hits:
            return hits[-1]
    return -1 if any(word in low for word in ("untrained", "random", "base", "before")) else 100


def sub_runs(folder: Path) -> list[Path]:
    """Return the run folders inside a run folder, such as the stages of a pipeline."""
    return sorted(path for path in folder.iterdir() if is_run(path))


def is_run(path: Path) -> bool:
    """Return whether a run has begun to write into a folder."""
    return (RunFolder(path).config.is_file() or RunFolder(path).metrics.is_file()) and not is_checkpoint(path)


def stamp(path: Path) -> tuple[int, int]:
    """Return when a file was last written, in nanoseconds, and its size. While both are the same, it has not changed."""
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_mtime_ns, stat.st_size


def _read_config(path: Path, problems: list[str]) -> tuple[str, dict[str, Any]]:
    text = path.read_text(encoding="utf-8", errors="replace")
    text = re.sub(r"(?m)^( *(?:webhook|alert_command): )(?!null$).+$", r"\1(not shown)", text)  # may hold a secret
    try:
        return text, as_dict(load_yaml(text, path.name))
    except UserError as error:
        problems.append(f"{error} The file is shown as it stands.")
        return text, {}
