"""Incidents of a run and the response to them: skipped steps, loss spikes, rollbacks.

A gradient that is not finite costs its step and nothing else. When that happens many times in a row, or the loss spikes and
``recovery.spike.action`` is rollback, the run goes back to the last checkpoint from before the trouble and skips the data since
then. The place in the data is then that of the step plus ``data_offset``. A run that has gone back too often, or that has no such
checkpoint yet, ends with a diagnosis. All ranks see the same numbers, so they decide alike.

Resume is exact: a checkpoint keeps this state, and one is written at once after a rollback. The loop rolls back for a ``cause``
only when a line of metrics is due, so an interruption does not move a rollback. (A signal saves an extra checkpoint, so the
run may return to a later one.) Every incident is a line in ``events.jsonl``.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from osler.checkpoint import store
from osler.checkpoint.folders import STATE, Damaged, by_age, describe_damaged, verify
from osler.monitor.spikes import SpikeWindow
from osler.runs.config import RunConfig
from osler.runs.folder import write_damage
from osler.runs.process import Run
from osler.runtime.errors import UserError
from osler.runtime.files import read_json

logger = logging.getLogger(__name__)

STEPS_BEFORE = 5  # a diagnosis shows the numbers of this many good steps before an incident
# Attributes of ``Incidents`` that a checkpoint keeps, besides ``spikes`` and ``before``.
KEPT = ("good_step", "skipped_in_a_row", "first_skipped", "not_finite_in_a_row", "cause", "rollbacks", "data_offset")


class Incidents:
    """Watches the numbers of every step, reports and records what is wrong with them, and rolls the run back.

    ``details`` returns the details of a step (1, 2 ...) as JSON: ``tokens``, ``lr``, and the ids of its questions or the numbers
    of its rows, not counting the ``data_offset``, which is given, too. Every rank has an instance; only rank 0 writes and logs.
    """

    def __init__(self, config: RunConfig, run: Run, details: Callable[[int], Mapping[str, Any]]) -> None:
        self.limits = config.recovery
        self.full_lr = config.optim.lr
        self.run = run
        self.details = details
        self.spikes = SpikeWindow(self.limits.spike)
        self.before: deque[list[Any]] = deque(maxlen=STEPS_BEFORE)  # step, loss and gradient norm of the last good steps
        self.skipped_in_a_row = 0
        self.first_skipped = 0  # the first of the skipped steps in a row; steps without a token to learn may lie between them
        self.not_finite_in_a_row = 0  # steps in a row that skipped at least one update
        self.cause: str | None = None  # why the run has to go back
        self.rollbacks = 0
        self.data_offset = 0  # data skipped by rollbacks: tokens in train/, steps in rl/
        self.good_step: int | None = None  # the step of the last checkpoint from before any trouble

    def observe(self, step: int, loss: float, grad_norm: float, *, skipped: bool, drift: float | None = None) -> None:
        """Check the numbers of a finished step; steps come in order. ``skipped``: all updates of the step were skipped.

        Spikes are sought in ``drift``, a part of the loss, or in the whole loss when it is None.
        """
        if math.isfinite(grad_norm):
            self.not_finite_in_a_row = 0
        else:  # in rl/ this may be only one of several updates of the step
            message = "The gradient was not finite: the update was skipped and changed nothing."
            self._record(step, "skipped-step", message, loss, grad_norm, loudly=self.not_finite_in_a_row == 0)
            self.not_finite_in_a_row += 1
        if skipped:
            self.first_skipped = self.first_skipped if self.skipped_in_a_row else step
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row >= self.limits.max_skipped_steps:
                self.cause = self._skips(step)
            return
        self.skipped_in_a_row = 0
        value, what = (loss, "loss") if drift is None else (drift, "loss beyond the samples' own (loss/drift)")
        spike = self.spikes.observe(value)
        if spike is None:
            if math.isfinite(loss) and math.isfinite(grad_norm):
                self.before.append([step, loss, grad_norm])
            return
        message = (
            f"The {what} spiked: {value:.4g} is {spike.deviations:.1f} robust standard deviations above {spike.median:.4g}, the "
            "median of the ones before it."
        )
        self._record(step, "loss-spike", message, loss, grad_norm, loudly=spike.in_a_row == 1, deviations=spike.deviations)
        if self.limits.spike.action == "rollback" and spike.in_a_row == 1:
            self.cause = f"Step {step}: {message}"

    def _skips(self, step: int) -> str:
        return (
            f"The gradient was not finite for {self.skipped_in_a_row} steps in a row (steps {self.first_skipped} to {step}); "
            "those steps changed nothing."
        )

    def finish(self, step: int) -> None:
        """Raise UserError on every rank when the run ends with ``step`` and all of its steps were skipped."""
        if self.skipped_in_a_row and not self.before:
            self.cause = self._skips(step)
            raise UserError(self._diagnosis(step, None))

    def _record(self, step: int, name: str, message: str, loss: float, grad_norm: float, *, loudly: bool, **more: Any) -> None:
        if not self.run.world.is_first:
            return
        if loudly:
            logger.warning(f"step {step}: {message}")
        details = {**self.details(step), "loss": loss, "grad_norm": grad_norm, **more}
        self.run.events.write(step, "incident", name, message, tell=loudly, **details)

    def roll_back(self, step: int, restore: Callable[[store.Loaded], None], position: Callable[[], int]) -> None:
        """Go back to the last good checkpoint with ``restore`` and skip the data since then; the caller saves at once.

        ``position`` returns the place in the data, in the unit of ``data_offset``. Raises UserError on every rank if this fails.
        """
        path = self.run.world.broadcast_from_first(self._last_good)
        if path is None or self.rollbacks >= self.limits.max_rollbacks:
            raise UserError(self._diagnosis(step, path))
        cause, rollbacks = self.cause, self.rollbacks + 1
        reached = position() + self.data_offset  # how far the data were read, skipped ones included
        loaded = store.load(path)
        restore(loaded)  # restores this object too
        self.run.world.barrier()  # the caller replaces the checkpoint, which others may still be reading
        self.cause, self.rollbacks, self.data_offset = None, rollbacks, reached - position()
        if self.run.world.is_first:
            message = (
                f"Going back from step {step} to {path.name} and on with the data after step {step} (rollback {rollbacks} of at "
                f"most {self.limits.max_rollbacks}). {cause}"
            )
            logger.warning(message)
            details: dict[str, Any] = {"from_step": step, "number": rollbacks, "data_offset": self.data_offset}
            self.run.events.write(loaded.step, "rollback", "rollback", message, **details)

    def _last_good(self) -> Path | None:
        path, damaged = last_good(self.run.folder.checkpoints, self.good_step)
        self.found_damaged(damaged)
        return path

    def found_damaged(self, damaged: Damaged) -> None:
        """Log and record that checkpoints of the run have changed since they were saved; only rank 0 finds that out."""
        if damaged:
            logger.warning(f"{describe_damaged(damaged)}.")
            write_damage(self.run.events, damaged)

    def _diagnosis(self, step: int, good: Path | None) -> str:
        """Return a diagnosis for a person: what happened, then a list of facts. ``good`` is the last good checkpoint."""
        most, lr = self.limits.max_rollbacks, self.full_lr
        if self.rollbacks:
            tried = f"The run has gone back {self.rollbacks} times already, of at most recovery.max_rollbacks={most}."
        elif most:
            tried = "There is no good checkpoint from before that to go back to."
        else:
            tried = "With recovery.max_rollbacks=0 a run does not go back."
        saved = "" if good else f" Any checkpoint in {self.run.folder.checkpoints} is damaged or from the middle of the trouble."
        details = dict(self.details(step))
        lists = {name: values for name, values in details.items() if isinstance(values, list) and values}  # empty after a resume
        batch = ", ".join(f"{name} {values[0]} ... {values[-1]}" for name, values in lists.items())
        if details.get("data_offset"):
            batch += f", {details['data_offset']:,} tokens further on in the data"
        before = [f"step {number}: loss {loss:.4g}, gradient norm {norm:.4g}" for number, loss, norm in self.before]
        facts = [
            *(before or ["no good step came before it"]),
            f"step {step}: the learning rate was {details['lr']:.3g}, and it learned from {batch}",
            f"the other steps are in {self.run.folder.events}",
            f"check the data; or start a new run with a lower optim.lr (a started run keeps its {lr:g}): the same command with "
            f"`--run NEW_FOLDER {f'init_from={good} ' if good else ''}optim.lr={lr / 3:.2g}`",
        ]
        return "\n  ".join([f"{self.cause} {tried}{saved}", *facts])

    def checkpointed(self, step: int) -> dict[str, Any]:
        """Return the state for the checkpoint of ``step``. Unless the run is in trouble, a rollback will return to it."""
        if not (self.skipped_in_a_row or self.spikes.spikes or self.cause):
            self.good_step = step
        return {name: getattr(self, name) for name in KEPT} | {"spikes": self.spikes.state(), "before": list(self.before)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what ``checkpointed`` returned."""
        for name in KEPT:
            setattr(self, name, state[name])
        self.spikes.restore(state["spikes"])
        self.before = deque(state["before"], STEPS_BEFORE)


def last_good(root: Path, good_step: int | None) -> tuple[Path | None, Damaged]:
    """Return the checkpoint of ``good_step``, or if that is lost the last good one before it (None: none), and the damaged ones.

    A checkpoint is good here if it is undamaged and from before any trouble.
    """
    damaged: Damaged = []
    for entry in sorted(by_age(root), key=lambda entry: entry.step, reverse=True):
        if good_step is None or entry.step > good_step:
            continue
        if problems := verify(entry.path):
            damaged.append((entry.path, problems))
        elif read_json(entry.path / STATE).get("incidents", {}).get("good_step") == entry.step:
            return entry.path, damaged
    return None, damaged
