"""What a run folder says about its run at this moment: what it is, how far it is, whether anybody still works on it.

Its diary says when a process began and how it ended; one that was killed wrote no end. On the machine where it began the lock
on the folder tells whether it lives. Elsewhere, and for a run without such notes, its files are read: the end of its plan, a
checkpoint at its last line, and the silence since.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname
from typing import Any

from osler.checkpoint.manifest import FOLDER_NAME, MANIFEST, STATE
from osler.errors import UserError
from osler.monitor.lifetime import END, FAILED, FINISHED, LIFETIME, START, STOPPED, still_wrong, unresolved_at_end
from osler.records.events import Event, read_events
from osler.records.values import as_dict, as_dicts, as_number, as_text
from osler.report import format as fmt
from osler.report.model import count_parameters, find_model
from osler.report.read import stage_rank, sub_runs
from osler.runtime.files import RunFolder, is_locked, read_json
from osler.watch.follow import Follower
from osler.yaml12 import load_yaml

QUICKSTART_STAGES = ("pretrain", "sft", "grpo")
QUIET_SECONDS, QUIET_GAPS = 10.0, 3.0  # silence of this length is worth a word
DEAD_SECONDS, DEAD_GAPS = 120.0, 20.0  # and of this length means that nobody works on the run


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder that is whole by the look of it."""

    step: int
    time: float
    path: Path


@dataclass(frozen=True)
class State:
    """How a run is: one of running, quiet, finished, stopped, failed, dead, waiting; and in words."""

    kind: str
    words: str


class Stage:
    """One run folder, followed."""

    def __init__(self, folder: Path, name: str = "") -> None:
        self.run = RunFolder(folder)
        self.name = name
        self.log = Follower(self.run.metrics)
        self.config: dict[str, Any] = {}
        self.machine: dict[str, Any] = {}
        self.parameters: int | None = None
        self.events: list[Event] = []
        self.checkpoints: list[Checkpoint] = []  # the one saved last comes first
        self.best: dict[str, Any] = {}
        self.saved: dict[str, Any] = {}  # state of the newest checkpoint
        self._seen: dict[str, tuple[int, int]] = {}

    def refresh(self) -> None:
        """Read what changed since the last call."""
        if self._changed(self.run.events):  # first: no line is read whose process has not been seen to begin
            self.events = read_events(self.run.events)
            self.log.idle = idle_times(self.events)
        self.log.poll()
        if self._changed(self.run.config):
            self.config = _read_yaml(self.run.config)
        if self._changed(self.run.root / "versions.json"):
            self.machine = as_dict(as_dict(_read(self.run.root / "versions.json")).get("machine"))
        if self._changed(self.run.checkpoints):
            self._read_checkpoints()
        if self.parameters is None:
            model = find_model(_read(self.checkpoints[0].path / "model.json")) if self.checkpoints else find_model(self.config)
            self.parameters = count_parameters(model) if model else None

    def _read_checkpoints(self) -> None:
        found = []
        for path in self.run.checkpoints.glob("step-*"):
            name = FOLDER_NAME.fullmatch(path.name)
            if name and (path / MANIFEST).is_file():
                found.append(Checkpoint(int(name[1]), _stamp(path / MANIFEST)[0] / 1e9, path))
        self.checkpoints = sorted(found, key=lambda c: (c.time, c.step), reverse=True)
        self.best = as_dict(_read(self.run.checkpoints / "best.json"))
        self.saved = as_dict(_read(self.checkpoints[0].path / STATE)) if self.checkpoints else {}

    def _changed(self, path: Path) -> bool:
        stamp = _stamp(path)
        old, self._seen[path.name] = self._seen.get(path.name, (0, 0)), stamp
        return stamp != old

    @property
    def has_begun(self) -> bool:
        return self.run.config.is_file() or self.log.last is not None

    @property
    def kind(self) -> str:
        return as_text(self.config.get("kind"))

    @property
    def newest_sign(self) -> float:
        """When the run last left a trace, in unix seconds; 0 without one."""
        last = self.log.last
        times = [last.time if last else 0.0, *(c.time for c in self.checkpoints[:1]), *(s[0] / 1e9 for s in self._seen.values())]
        return max((t for t in times if math.isfinite(t)), default=0.0)

    @property
    def total(self) -> tuple[float, str]:
        """How long the run is and in what: tokens, or steps for GRPO; NaN when that is not known.

        A run by the clock fits its tokens to the time again and again; its newest checkpoint says to how many.
        """
        if self.kind == "grpo":
            return as_number(self.config.get("steps")), "steps"
        planned = self.saved.get("total_tokens") if self.config.get("max_minutes") else None
        return as_number(planned if planned is not None else self.config.get("total_tokens")), "tokens"

    @property
    def done(self) -> float:
        """How much of `total` is done."""
        last = self.log.last
        return math.nan if last is None else float(last.step) if self.total[1] == "steps" else last.tokens

    @property
    def is_complete(self) -> bool:
        """Whether the run has reached its end; of a run by the clock only its last checkpoint knows."""
        if self.kind != "grpo" and self.config.get("max_minutes"):
            return as_number(self.saved.get("tokens")) >= as_number(self.saved.get("total_tokens"))
        return self.done >= self.total[0]

    def seconds_left(self, now: float) -> float:
        """Time to the end: what the run last said itself, or else at the speed of the newest lines; NaN when it is not known."""
        step, seconds = self.log.curves.get("perf/eta_seconds", [(-1, math.nan)])[-1]
        told = next((moment.time for moment in self.log.recent if moment.step == step), math.nan)
        if math.isfinite(seconds - told):
            return max(0.0, seconds - (now - told))
        first, last = (self.log.recent[0], self.log.recent[-1]) if len(self.log.recent) > 1 else (None, None)
        if first is None or last is None:
            return math.nan
        steps = self.total[1] == "steps"
        made = float(last.step - first.step) if steps else last.tokens - first.tokens
        took = last.time - first.time
        left = (self.total[0] - self.done) * took / made - (now - last.time) if made > 0 and took > 0 else math.nan
        minutes = as_number(self.config.get("max_minutes"))
        by_clock = 60 * minutes - self.log.active_seconds - (now - last.time)
        return max(0.0, min((x for x in (left, by_clock) if math.isfinite(x)), default=math.nan))

    def state(self, now: float) -> State:
        """Whether the run runs, and what its silence means."""
        last = self.log.last
        silent = max(0.0, now - self.newest_sign)
        noted = self._noted()
        if noted and noted.kind == END:
            return self._ended(noted, now)
        if last is None:
            if not self.has_begun:
                return State("waiting", "nothing here yet: waiting for a run to write its config.yaml here (q or Ctrl-C leaves)")
            return State("waiting", f"no metrics yet; begun {fmt.duration(silent)} ago")
        saved = next((c.step for c in self.checkpoints), None)
        if self.is_complete and not noted:
            return State("finished", f"finished {_ago(silent)}")
        gap = self.log.usual_gap
        held = is_locked(self.run.root)
        killed = self._was_killed(noted, held)
        if silent <= max(QUIET_SECONDS, QUIET_GAPS * gap) and not killed:
            return State("running", "running")
        for_so_long = f"no sign of it for {fmt.duration(silent)}"
        if held:
            return State("running", f"running, {for_so_long}")
        kept = "nothing saved" if saved is None else f"saved at step {saved:,}"
        if silent <= max(DEAD_SECONDS, DEAD_GAPS * gap) and not killed:
            return State("quiet", f"{for_so_long}; {kept}")
        if saved is not None and saved >= last.step and not noted:
            return State("stopped", f"stopped {_ago(silent)}, {kept}")
        guess = " (killed, or the machine went down)" if noted else ""
        return State("dead", f"dead: {for_so_long}{guess}; last line at step {last.step:,}, {kept}")

    def _was_killed(self, noted: Event | None, held: bool | None) -> bool:
        """Whether a process that noted its start on this machine has left the folder without noting its end.

        It notes the end before it leaves, so a diary that has changed since it was read does not count.
        """
        has_left = held is False and noted is not None and noted.details.get("host") == gethostname()
        return has_left and _stamp(self.run.events) == self._seen.get(self.run.events.name)

    def _noted(self) -> Event | None:
        """Return the newest start or end; None without one, and when a process that notes neither has gone on since."""
        noted, last = next((event for event in reversed(self.events) if event.kind in LIFETIME), None), self.log.last
        is_old = noted is not None and noted.kind == END and last is not None and last.time > noted.time
        return None if is_old else noted

    def _ended(self, end: Event, now: float) -> State:
        """How the last process ended, by its own words."""
        ago = _ago(max(0.0, now - end.time))
        newest = next((f"saved at step {c.step:,}" for c in self.checkpoints), "nothing saved")
        if end.name == FINISHED:
            held = unresolved_at_end(self.events)
            but = f", but {still_wrong(len(held))}: {', '.join(held)}" if held else ""
            return State("finished", f"finished {ago}{but}")
        if end.name == STOPPED:
            return State("stopped", f"stopped {ago} by Ctrl-C, SIGTERM or SIGHUP, {newest}")
        return State(FAILED, f"failed {ago} at step {end.step}, {newest}: {end.message}")


class Watched:
    """A run folder with all its stages: itself, or the runs inside it."""

    def __init__(self, folder: Path) -> None:
        self.root = Stage(folder)
        self.stages: dict[str, Stage] = {}
        self.finished: dict[str, float] = {}  # stages of a story that are done, and their seconds

    def refresh(self) -> None:
        """Read what changed since the last call, in all stages."""
        with suppress(OSError):  # the folder may be gone by now
            for path in sub_runs(self.root.run.root):
                if path.name not in self.stages:
                    self.stages[path.name] = Stage(path, path.name)
        for stage in (self.root, *self.stages.values()):
            stage.refresh()
        rows = as_dicts(_read(self.root.run.stages))
        self.finished = {as_text(row.get("name")): as_number(row.get("seconds")) for row in rows}

    @property
    def current(self) -> Stage:
        """The stage with the newest sign of life; the folder's own run where it has no others."""
        own = [] if self.stages and self.root.log.last is None else [self.root]
        return max([*self.stages.values(), *own], key=lambda stage: stage.newest_sign)

    def names(self) -> list[str]:
        """The stages in the order of training, those to come included; empty for a single run."""
        planned = QUICKSTART_STAGES if self.root.kind == "quickstart" else ()
        return sorted({*self.stages, *planned}, key=lambda name: stage_rank(name))


def idle_times(events: Sequence[Event]) -> list[tuple[float, float]]:
    """For each process of a run when the one before had ended, minus infinity where that is not known, and when it began."""
    idle, since = [], -math.inf
    for event in events:
        if event.kind == END:
            since = event.time
        elif event.kind == START:
            idle.append((since, event.time))
            since = -math.inf
    return [(since, until) for since, until in idle if math.isfinite(until) and not math.isnan(since)]


def _stamp(path: Path) -> tuple[int, int]:
    """Time and size of a file: what has the same has not changed."""
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_mtime_ns, stat.st_size


def _read(path: Path) -> Any:
    """What a JSON file holds, None when it cannot be read."""
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
