"""What a run folder says about its run at this moment: what it is, how far it is, whether a process still works on it.

``events.jsonl`` says when a process began and how it ended; one that was killed wrote no end. On the machine where it began, the
lock on the folder tells whether it lives. Elsewhere, and for a run without such events, its other files tell: the end of its
plan, a checkpoint at its last line, and the silence since.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname
from typing import Any

from osler.checkpoint.folders import MANIFEST, STATE, Entry, by_age
from osler.config.yaml12 import load_yaml
from osler.records.jsonl import (
    END,
    FAILED,
    FINISHED,
    LIFETIME,
    START,
    STOPPED,
    Event,
    read_events,
    still_wrong,
    unresolved_at_end,
)
from osler.records.results import FinishedStage
from osler.records.values import as_dict, as_number, as_text, read_records
from osler.report import format as fmt
from osler.report.curves import Follower, Moment
from osler.report.read import count_parameters, find_model, stage_rank, sub_runs
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder, is_locked, read_json

QUICKSTART_STAGES = ("pretrain", "sft", "grpo")
QUIET_SECONDS, QUIET_GAPS = 10.0, 3.0  # a silence longer than both, in seconds and in usual gaps, is worth a word
DEAD_SECONDS, DEAD_GAPS = 120.0, 20.0  # and one longer than these means that no process works on the run


@dataclass(frozen=True)
class State:
    """How a run is: running, quiet, finished, stopped, failed, dead or waiting; and in words."""

    kind: str
    words: str


class WatchedRun:
    """One run folder, followed."""

    def __init__(self, folder: Path, name: str = "") -> None:
        self.folder = RunFolder(folder)
        self.name = name
        self.log = Follower(self.folder.metrics)
        self.config: dict[str, Any] = {}
        self.machine: dict[str, Any] = {}
        self.parameters: int | None = None
        self.events: list[Event] = []
        self.checkpoints: list[Entry] = []  # the newest first
        self.saved_at = 0.0  # when the newest was written, in unix seconds
        self.best: dict[str, Any] = {}
        self.saved: dict[str, Any] = {}  # state of the newest checkpoint
        self._seen: dict[str, tuple[int, int]] = {}

    def refresh(self) -> None:
        """Read what changed since the last call."""
        if self._changed(self.folder.events):  # first, so that the start of a process is known before its lines
            self.events = read_events(self.folder.events)
            self.log.idle = idle_times(self.events)
        self.log.poll()
        if self._changed(self.folder.config):
            self.config = _read_yaml(self.folder.config)
        if self._changed(self.folder.root / "versions.json"):
            self.machine = as_dict(as_dict(_read(self.folder.root / "versions.json")).get("machine"))
        if self._changed(self.folder.checkpoints):
            self._read_checkpoints()
        if self.parameters is None:
            model = find_model(_read(self.checkpoints[0].path / "model.json")) if self.checkpoints else find_model(self.config)
            self.parameters = count_parameters(model) if model else None

    def _read_checkpoints(self) -> None:
        self.checkpoints = [entry for entry in by_age(self.folder.checkpoints) if (entry.path / MANIFEST).is_file()]
        self.saved_at = _stamp(self.checkpoints[0].path / MANIFEST)[0] / 1e9 if self.checkpoints else 0.0
        self.best = as_dict(_read(self.folder.checkpoints / "best.json"))
        self.saved = as_dict(_read(self.checkpoints[0].path / STATE)) if self.checkpoints else {}

    def _changed(self, path: Path) -> bool:
        stamp = _stamp(path)
        old, self._seen[path.name] = self._seen.get(path.name, (0, 0)), stamp
        return stamp != old

    @property
    def has_begun(self) -> bool:
        return self.folder.config.is_file() or self.log.last is not None

    @property
    def kind(self) -> str:
        return as_text(self.config.get("kind"))

    @property
    def newest_sign(self) -> float:
        """When the run last wrote anything, in unix seconds; 0 if it never did."""
        last = self.log.last
        times = [last.time if last else 0.0, self.saved_at, *(stamp[0] / 1e9 for stamp in self._seen.values())]
        return max((t for t in times if math.isfinite(t)), default=0.0)

    @property
    def total(self) -> tuple[float, str]:
        """How long the run is, and in what unit: tokens, or steps for GRPO; NaN when that is not known.

        A run with ``max_minutes`` fits its tokens to the time again and again; its newest checkpoint has the newest number.
        """
        if self.kind == "grpo":
            return as_number(self.config.get("steps")), "steps"
        planned = self.saved.get("total_tokens") if self.config.get("max_minutes") else None
        return as_number(planned if planned is not None else self.config.get("total_tokens")), "tokens"

    @property
    def done(self) -> float:
        """How much of `total` is done."""
        return self._done_at(self.log.last) if self.log.last else math.nan

    def _done_at(self, moment: Moment) -> float:
        return float(moment.step) if self.total[1] == "steps" else moment.tokens

    @property
    def kept(self) -> str:
        """What would survive of the run, in words."""
        return next((f"saved at step {entry.step:,}" for entry in self.checkpoints), "nothing saved")

    @property
    def is_complete(self) -> bool:
        """Whether the run has reached its end; with ``max_minutes`` only its last checkpoint knows."""
        if self.kind != "grpo" and self.config.get("max_minutes"):
            return as_number(self.saved.get("tokens")) >= as_number(self.saved.get("total_tokens"))
        return self.done >= self.total[0]

    def seconds_left(self, now: float) -> float:
        """Return the time to the end: what the run last logged, else what follows from its newest lines; NaN without either."""
        step, seconds = self.log.curves.get("perf/eta_seconds", [(-1, math.nan)])[-1]
        logged_at = next((moment.time for moment in self.log.recent if moment.step == step), math.nan)
        if math.isfinite(seconds - logged_at):
            return max(0.0, seconds - (now - logged_at))
        if len(self.log.recent) < 2:
            return math.nan
        first, last = self.log.recent[0], self.log.recent[-1]
        made, took = self._done_at(last) - self._done_at(first), last.time - first.time
        left = (self.total[0] - self.done) * took / made - (now - last.time) if made > 0 and took > 0 else math.nan
        minutes = as_number(self.config.get("max_minutes"))
        by_clock = 60 * minutes - self.log.active_seconds - (now - last.time)
        return max(0.0, min((x for x in (left, by_clock) if math.isfinite(x)), default=math.nan))

    def state(self, now: float) -> State:
        """Return whether the run runs, and what its silence means."""
        last = self.log.last
        silent = max(0.0, now - self.newest_sign)
        event = self._start_or_end()
        if event and event.kind == END:
            return self._ended(event, now)
        if last is None:
            if not self.has_begun:
                return State("waiting", "nothing here yet: waiting for a run to write its config.yaml here (q or Ctrl-C leaves)")
            return State("waiting", f"no metrics yet; begun {fmt.duration(silent)} ago")
        if self.is_complete and not event:
            return State("finished", f"finished {_ago(silent)}")
        gap = self.log.usual_gap
        locked = is_locked(self.folder.root)
        killed = self._was_killed(event, locked)
        if silent <= max(QUIET_SECONDS, QUIET_GAPS * gap) and not killed:
            return State("running", "running")
        for_so_long = f"no sign of it for {fmt.duration(silent)}"
        if locked:
            return State("running", f"running, {for_so_long}")
        if silent <= max(DEAD_SECONDS, DEAD_GAPS * gap) and not killed:
            return State("quiet", f"{for_so_long}; {self.kept}")
        if self.checkpoints and self.checkpoints[0].step >= last.step and not event:
            return State("stopped", f"stopped {_ago(silent)}, {self.kept}")
        guess = " (killed, or the machine went down)" if event else ""
        return State("dead", f"dead: {for_so_long}{guess}; last line at step {last.step:,}, {self.kept}")

    def _was_killed(self, start: Event | None, locked: bool | None) -> bool:
        """Whether a process that began on this machine has unlocked the folder without writing its end.

        It writes the end first, so events that have changed since they were read do not count.
        """
        has_left = locked is False and start is not None and start.details.get("host") == gethostname()
        return has_left and _stamp(self.folder.events) == self._seen.get(self.folder.events.name)

    def _start_or_end(self) -> Event | None:
        """Return the newest start or end; None without one, and when a process that writes neither has gone on since."""
        newest, last = next((event for event in reversed(self.events) if event.kind in LIFETIME), None), self.log.last
        is_old = newest is not None and newest.kind == END and last is not None and last.time > newest.time
        return None if is_old else newest

    def _ended(self, end: Event, now: float) -> State:
        """Return how the last process ended, in its own words."""
        ago = _ago(max(0.0, now - end.time))
        if end.name == FINISHED:
            unresolved = unresolved_at_end(self.events)
            but = f", but {still_wrong(len(unresolved))}: {', '.join(unresolved)}" if unresolved else ""
            return State("finished", f"finished {ago}{but}")
        if end.name == STOPPED:
            return State("stopped", f"stopped {ago} by Ctrl-C or a signal, {self.kept}")
        return State(FAILED, f"failed {ago} at step {end.step}, {self.kept}: {end.message}")


class WatchedFolder:
    """A run folder, and the runs inside it, which are the stages of a quickstart."""

    def __init__(self, folder: Path) -> None:
        self.root = WatchedRun(folder)
        self.stages: dict[str, WatchedRun] = {}
        self.finished: dict[str, float] = {}  # stages that are done, and their seconds

    def refresh(self) -> None:
        """Read what changed since the last call, in all stages."""
        with suppress(OSError):  # the folder may be gone by now
            for path in sub_runs(self.root.folder.root):
                if path.name not in self.stages:
                    self.stages[path.name] = WatchedRun(path, path.name)
        for stage in (self.root, *self.stages.values()):
            stage.refresh()
        with suppress(UserError):  # half written
            self.finished = {stage.name: stage.seconds for stage in read_records(FinishedStage, self.root.folder.stages)}

    @property
    def current(self) -> WatchedRun:
        """The stage that wrote last; the folder's own run where it has no stages."""
        own = [] if self.stages and self.root.log.last is None else [self.root]
        return max([*self.stages.values(), *own], key=lambda stage: stage.newest_sign)

    def names(self) -> list[str]:
        """Return the stages in the order of training, also those to come; none for a single run."""
        planned = QUICKSTART_STAGES if self.root.kind == "quickstart" else ()
        return sorted({*self.stages, *planned}, key=lambda name: stage_rank(name))


def idle_times(events: Sequence[Event]) -> list[tuple[float, float]]:
    """Return for each process of a run when the one before had ended, -inf where that is not known, and when it began."""
    idle, since = [], -math.inf
    for event in events:
        if event.kind == END:
            since = event.time
        elif event.kind == START:
            idle.append((since, event.time))
            since = -math.inf
    return [(since, until) for since, until in idle if math.isfinite(until) and not math.isnan(since)]


def _stamp(path: Path) -> tuple[int, int]:
    """Return time and size of a file, which has not changed while they are the same."""
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_mtime_ns, stat.st_size


def _read(path: Path) -> Any:
    """Return what a JSON file holds, None when it cannot be read."""
    try:
        return read_json(path)
    except UserError:
        return None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        return as_dict(load_yaml(path.read_text(encoding="utf-8", errors="replace"), path.name))
    except (UserError, OSError):
        return {}


def _ago(seconds: float) -> str:
    return f"{fmt.duration(seconds)} ago"
