"""The state of a run, read from its folder: what it is, how far it is, whether a process still works on it.

``events.jsonl`` says when a process began and how it ended; a killed process wrote no end. On the machine where the process
began, a folder without a lock shows that the process is dead; on another machine only a long silence does.
"""

import math
from contextlib import suppress
from pathlib import Path
from socket import gethostname
from typing import Any, NamedTuple

from osler.checkpoint.folders import MANIFEST, Best, Entry, best_checkpoint, by_age
from osler.records.jsonl import EARLY_STOP, END, newest_lifetime_event
from osler.records.results import FinishedStage
from osler.records.values import as_dict, as_number, as_text, read_records
from osler.report.read import StageLog, stage_rank, stamp, sub_runs
from osler.runtime import format as fmt
from osler.runtime.errors import UserError
from osler.runtime.files import is_locked, read_json

QUIET_SECONDS = 60.0  # a longer silence is worth a word
DEAD_SECONDS = 1200.0  # where no lock can tell, a longer silence means that no process works on the run


class State(NamedTuple):
    """Whether a run is running, finished, stopped, failed, dead or waiting, and a sentence about it."""

    kind: str
    words: str


class WatchedRun(StageLog):
    """A run folder that is read again and again while the run writes."""

    def __init__(self, folder: Path, name: str = "") -> None:
        super().__init__(folder, name)
        self.machine: dict[str, Any] = {}
        self.checkpoints: list[Entry] = []  # the newest first
        self.saved_at = 0.0  # when the newest checkpoint was written, in unix seconds
        self.best: Best | None = None

    def refresh(self) -> None:
        """Read what changed since the last call."""
        with suppress(UserError, OSError):  # gone, or half written
            super().refresh()
            if self._has_changed(versions := self.folder.root / "versions.json"):
                self.machine = as_dict(as_dict(read_json(versions)).get("machine"))
            if self._has_changed(folder := self.folder.checkpoints):
                self.checkpoints = [entry for entry in by_age(folder) if (entry.path / MANIFEST).is_file()]
                self.saved_at = stamp(self.checkpoints[0].path / MANIFEST)[0] / 1e9 if self.checkpoints else 0.0
                self.best = best_checkpoint(folder)

    @property
    def has_lines(self) -> bool:
        return len(self.log.tokens) > 0

    @property
    def kind(self) -> str:
        return as_text(self.config.get("kind"))

    @property
    def newest_sign(self) -> float:
        """When the run last wrote anything, in unix seconds; 0 if it never did."""
        changed = [nanoseconds / 1e9 for nanoseconds, _ in self._stamps.values()]
        return max(0.0, self.saved_at, *changed, *self.log.times[-1:].tolist())

    @property
    def progress(self) -> tuple[float, float, str]:
        """The amount done, the total (NaN when it is not known), and their unit: tokens, or steps for GRPO."""
        if self.kind == "grpo":
            return self.last_step, self.last_step if self.stopped_early else as_number(self.config.get("steps")), "steps"
        left = self.newest("perf/eta_seconds") * self.newest("perf/tokens_per_second")  # max_minutes may have changed the total
        return self.tokens, self.tokens + (0.0 if self.stopped_early else left), "tokens"

    @property
    def stopped_early(self) -> bool:
        return any(event.kind == EARLY_STOP for event in self.events)

    def newest(self, metric: str) -> float:
        """Return the newest value of a metric, NaN when there is none."""
        return float(self.curves[metric].values[-1]) if metric in self.curves else math.nan

    def state(self, now: float) -> State:
        """Return what state the run is in, judged by its events, its lock and its silence."""
        silent_seconds = max(0.0, now - self.newest_sign)
        kept = f"saved at step {self.checkpoints[0].step:,}" if self.checkpoints else "nothing saved"
        event = newest_lifetime_event(self.events)
        if event and event.kind == END:  # the last process ended, in its own words
            ago = f"{'early ' if self.stopped_early else ''}{fmt.duration(max(0.0, now - event.time))} ago"
            return State(event.name, f"{event.name} {ago} at step {event.step:,}, {kept}: {event.message}")
        if not self.has_lines:
            begun = f"no metrics yet; begun {fmt.duration(silent_seconds)} ago"
            nothing = "nothing here yet: waiting for a run to write its config.yaml here (Ctrl-C leaves)"
            return State("waiting", begun if self.folder.config.is_file() else nothing)
        locked = is_locked(self.folder.root)
        # A process that began here writes its end and then unlocks the folder. Without an end in current events it was killed.
        killed = locked is False and event is not None and event.details.get("host") == gethostname()
        killed = killed and stamp(self.folder.events) == self._stamps.get(self.folder.events)
        for_so_long = f"no sign of it for {fmt.duration(silent_seconds)}"
        if killed or (not locked and silent_seconds > DEAD_SECONDS):
            guess = "killed, or the machine went down"
            return State("dead", f"dead: {for_so_long} ({guess}); last line at step {self.last_step:,}, {kept}")
        return State("running", f"running, {for_so_long}" if silent_seconds > QUIET_SECONDS else "running")


class WatchedFolder:
    """A run folder, and the runs inside it, which are the stages of a pipeline."""

    def __init__(self, folder: Path) -> None:
        self.root = WatchedRun(folder)
        self.stages: dict[str, WatchedRun] = {}
        self.finished: dict[str, float] = {}  # stages that are done, and their seconds

    def refresh(self) -> None:
        """Read what changed since the last call, in all stages."""
        with suppress(UserError, OSError):  # gone, or half written
            for path in sub_runs(self.root.folder.root):
                self.stages.setdefault(path.name, WatchedRun(path, path.name))
            self.finished = {stage.name: stage.seconds for stage in read_records(FinishedStage, self.root.folder.stages)}
        for stage in (self.root, *self.stages.values()):
            stage.refresh()

    @property
    def current(self) -> WatchedRun:
        """The stage that wrote last; the folder's own run where it has no stages."""
        own = [] if self.stages and not self.root.has_lines else [self.root]
        return max([*self.stages.values(), *own], key=lambda stage: stage.newest_sign)

    def names(self) -> list[str]:
        """Return the stages in the order of training, also the stages to come; none for a single run."""
        planned = [name for name, section in self.root.config.items() if as_dict(section).get("kind", "exam") != "exam"]
        return sorted({*self.stages, *planned}, key=lambda name: stage_rank(name, planned))
