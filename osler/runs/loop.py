"""The life of a training run between its first step and its last, the same for every trainer.

In each iteration the trainer makes a step, the ranks vote whether to stop, and a line of metrics is written if one is due. A run
in trouble then rolls back (``incidents.py``). A checkpoint is written before each evaluation, so an evaluation that fails costs
nothing.

Every rank runs this loop; rank 0 alone writes. A checkpoint is the same whatever the number of ranks, and a resumed run makes the
same steps with the same numbers as one that was never interrupted.
"""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from osler.checkpoint import store
from osler.checkpoint.folders import best_checkpoint, folder_name, is_better, mark_best
from osler.checkpoint.saver import Saver
from osler.monitor.collect import Collector
from osler.monitor.history import RunSettings
from osler.monitor.logger import RunLogger
from osler.records.jsonl import EARLY_STOP, read_metrics
from osler.runs.config import RunConfig
from osler.runs.folder import check_fingerprints
from osler.runs.incidents import Incidents
from osler.runs.micro_batch import words_of
from osler.runs.process import Learner, Run
from osler.runtime import format as fmt
from osler.runtime.device import is_out_of_memory
from osler.runtime.errors import UserError
from osler.runtime.faults import fault
from osler.runtime.log import Progress
from osler.runtime.stop import AskedToStop, StopFlag

logger = logging.getLogger(__name__)


class Due(NamedTuple):
    """Whether a checkpoint, a checkpoint that is kept for good, or an evaluation is due after a step."""

    save: bool
    milestone: bool
    evaluation: bool


class Trainer(ABC):
    """Base class of the trainers that ``Loop`` drives."""

    config: RunConfig
    unit = "steps"  # of ``position`` and ``total``
    best_metric = ""  # decides which checkpoint is the best; lower is better when its name ends with "loss"

    def __init__(self, config: RunConfig, run: Run, learner: Learner, *, total: int, lines_every: int = 1) -> None:
        """``lines_every`` is the number of steps between two lines of metrics."""
        self.config, self.run, self.learner, self.total = config, run, learner, total
        self.world = learner.engine.world
        self.collector = Collector(
            config.monitor,
            learner.model,
            learner.device,
            lines_every=lines_every,
            world=self.world,
            whole_weights=lambda: learner.engine.whole_weights(learner.model),
            has_gradients=learner.engine.leaves_gradients,
        )
        self.incidents = Incidents(config, run, self.details)
        self.step = 0  # finished steps

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Tokens trained on."""

    def position_at(self, step: int) -> int:
        """Return the data position after ``step``, not counting data skipped by rollbacks, in the unit of ``data_offset``."""
        return step

    @property
    def position(self) -> int:
        return self.position_at(self.step)

    @property
    def done(self) -> bool:
        """Whether training is finished."""
        return self.position >= self.total

    def crossed(self, every: int) -> bool:
        """Whether the latest step passed a multiple of ``every`` positions or was the last one; 0 means never."""
        if every == 0 or self.step == 0:
            return False
        return self.done or self.position // every > self.position_at(self.step - 1) // every

    def fingerprints(self) -> dict[str, str]:
        """Return what identifies tokenizer and data in a checkpoint."""
        return dict(self.run.fingerprints)

    def settings(self) -> RunSettings:
        """Return the settings that the alert rules need."""
        return RunSettings(lr=self.config.optim.lr, clip_norm=self.config.clip_norm)

    def begin(self) -> None:  # noqa: B027 - not every trainer has a data loader
        """Open the data loader at the current step; called before the first step and after each rollback."""

    def close(self) -> None:  # noqa: B027
        """Release what ``begin`` opened."""

    def exclude_time(self, seconds: float) -> None:  # noqa: B027
        """Do not count these seconds in tokens per second."""

    @abstractmethod
    def advance(self) -> dict[str, float] | None:
        """Make one step. Return the metrics if a line of metrics is due, else None.

        Raises AskedToStop, on every rank and before the step, when the run is asked to stop while it waits for data or for
        completions of servers.
        """

    @abstractmethod
    def shown(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Return the values of a metrics line that the progress bar shows."""

    @abstractmethod
    def due(self) -> Due:
        """Return what is due after the latest step; before the first step only ``evaluation`` counts."""

    @abstractmethod
    def details(self, step: int) -> dict[str, Any]:
        """Return the details, as JSON, that are recorded with an incident at ``step``; see ``Incidents``."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Return metrics of the current model. Raises AskedToStop when the run is asked to stop during the evaluation."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return the trainer's own state for a checkpoint, as JSON."""

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the trainer's own tensors for a checkpoint, besides model and optimizer."""
        return {}

    def restore(self, loaded: store.Loaded) -> None:
        """Restore what ``state`` and ``tensors`` returned."""
        self.step = loaded.state["step"]


class Loop:
    """Runs a trainer to its last step; saves, evaluates, rolls back and stops when needed."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.run, self.incidents = trainer, trainer.run, trainer.incidents
        self.world = trainer.run.world
        folder, checkpoint = trainer.run.folder, trainer.config.checkpoint
        self.saver = Saver(
            folder.checkpoints,
            keep_last=checkpoint.keep_last,
            in_background=checkpoint.in_background,
            logs=(folder.metrics, folder.events),
            on_damage=self.incidents.found_damaged,
        )
        self.best: float | None = None  # value of the best metric so far
        self.evaluation_interrupted = False  # whether the run was asked to stop during an evaluation
        self.stopped_early = False
        self.nothing_shown_yet = True
        self.stop: StopFlag  # this and the next two exist inside ``fit`` only
        self.run_logger: RunLogger
        self.progress: Progress

    def fit(self) -> bool:
        """Train to the end. Return False if the run was asked to stop, after saving everything."""
        trainer, config, folder = self.trainer, self.trainer.config, self.run.folder
        with (
            StopFlag() as self.stop,  # first, so that a signal is safe once there is a metrics file
            RunLogger(
                config.monitor, folder, trainer.settings(), step=trainer.step, is_first=self.world.is_first
            ) as self.run_logger,
            self.run_logger.lifetime(
                lambda: trainer.step,
                lambda: trainer.done and not self.evaluation_interrupted,
                processes=self.world.size,
                preparing_seconds=round(time.monotonic() - self.run.began, 3),
            ),
            Progress(trainer.total, trainer.unit, label=config.kind, initial=trainer.position) as self.progress,
            self.saver,
            closing(trainer),
        ):
            self.run.events = self.run_logger.events
            # It is due before the first step, or after a kill between a checkpoint and its evaluation.
            if trainer.due().evaluation:
                lines = partial(read_metrics, folder.metrics, having="eval/seconds")
                if trainer.step not in self.world.broadcast_from_first(lambda: {line.step for line in lines()}):
                    self._evaluate()
            self._stop_early_if_due()
            trainer.begin()
            while not (trainer.done or self.evaluation_interrupted):
                if not self._iterate():
                    return False
            self.incidents.finish(trainer.step)
        return not self.evaluation_interrupted

    def _iterate(self) -> bool:
        """Make one step, then save and evaluate if due. Return False if the run stops here."""
        trainer = self.trainer
        try:
            line = trainer.advance()
        except AskedToStop:  # the run was waiting
            self.save()
            self.world.broadcast_from_first(lambda: self.saver.wait(needed=True))
            return False
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"Memory ran out beside the passes of a step, where a smaller micro-batch does not help ({words_of(error)}). "
                "What is there is weights, gradients and the optimizer's moments, and in `osler grpo` the completions that are "
                "sampled at once (rollout_rows). A smaller model takes less, several GPUs share it with parallel.type=fsdp."
            ) from error
        fault("train-step")
        stopping = self._agree_to_stop()
        if line is not None:
            self.run_logger.write(trainer.step, trainer.tokens, line)
            self._show(trainer.shown(line))
            if self.incidents.cause:
                self._roll_back()
                return True
        elif self.nothing_shown_yet:  # the first step may have compiled for minutes
            self._show({})
        due = trainer.due()
        if due.save or due.milestone or due.evaluation or stopping:
            self.save()
            stopping = self._agree_to_stop()  # a signal may have come while the checkpoint was saved
        if stopping and not trainer.done:
            self.world.broadcast_from_first(lambda: self.saver.wait(needed=True))
            return False
        if due.evaluation:
            self._evaluate()
            self._stop_early_if_due()
        return True

    def _agree_to_stop(self) -> bool:
        """Return whether the ranks stop, because one of them was asked to. A later signal counts in the next vote."""
        (all_go_on,) = self.world.all_reduce_min(not self.stop.requested)
        self.stop.requested = self.stop.requested or not all_go_on
        return not all_go_on

    def _show(self, shown: Mapping[str, str]) -> None:
        self.nothing_shown_yet = False
        self.progress.total = self.trainer.total
        self.progress.update(self.trainer.position, **shown)

    # -- save, restore, roll back ----------------------------------------------------------------------------------------

    def save(self) -> None:
        """Save a checkpoint, in the background unless it is the last one of this process; see ``Saver.save``.

        Sharded tensors are gathered on rank 0, one at a time.
        """
        trainer, learner = self.trainer, self.trainer.learner
        self.world.broadcast_from_first(self.saver.wait)  # wait here: this timeout is longer than that of a device collective
        to_host = self.saver.to_host if self.saver.in_background else None
        tensors, optimizer_state = learner.engine.parts(learner.model, learner.optimizer, to_host)
        state = {
            "kind": trainer.config.kind,
            "step": trainer.step,
            "tokens": trainer.tokens,
            "stopped_early": self.stopped_early,
            "trained_seq_len": learner.model.trained_seq_len,
            **trainer.state(),  # before ``incidents``, because it passes the latest losses to them
            "incidents": self.incidents.checkpointed(trainer.step),
            "fingerprints": trainer.fingerprints(),
            "optimizer": optimizer_state,
        }
        save = partial(
            self.saver.save,
            trainer.step,
            tensors={**tensors, **trainer.tensors()},
            state=state,
            files={**self.run.files, **self.run.more_files()},
            milestone=trainer.due().milestone,
            good_step=self.incidents.good_step,
            last=trainer.done or self.stop.requested,
        )
        self.world.broadcast_from_first(save)

    def restore(self, loaded: store.Loaded, *, is_branch: bool = False) -> None:
        """Resume from a checkpoint of this run, or of another run if ``is_branch``; that run's early stop does not count here."""
        changes = self.run.events if self.trainer.config.allow_data_change else None
        check_fingerprints(loaded, self.run.fingerprints, changes=changes)
        self._load(loaded)
        self.run.started -= loaded.state.get("seconds", 0.0)
        if loaded.state.get("stopped_early") and not is_branch:
            self.stopped_early, self.trainer.total = True, self.trainer.position

    def _load(self, loaded: store.Loaded) -> None:
        """Load weights, optimizer, the trainer's position and the incidents from a checkpoint of the same data."""
        learner = self.trainer.learner
        learner.engine.restore(learner.model, learner.optimizer, loaded.tensors, loaded.state["optimizer"])
        learner.model.trained_seq_len = loaded.state.get("trained_seq_len", learner.model.trained_seq_len)
        self.trainer.restore(loaded)
        self.incidents.restore(loaded.state["incidents"])
        # Read from the folder, because a checkpoint is written before the evaluation that may make it the best.
        best = best_checkpoint(self.run.folder.checkpoints)
        self.best = best.value if best is not None and best.step <= loaded.step else None

    def _roll_back(self) -> None:
        """Return to the last good checkpoint and continue with later data. Save at once, so that a kill cannot undo this."""
        self.world.broadcast_from_first(self.saver.wait)  # the checkpoint to go back to may be the one that is being written
        self.incidents.roll_back(self.trainer.step, self._load, lambda: self.trainer.position)
        self.save()
        self.world.broadcast_from_first(self.saver.wait)
        fault("rollback")
        self.run_logger.rewind(self.trainer.step)
        self.trainer.begin()

    # -- evaluate --------------------------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Evaluate, and mark the checkpoint of this step when it is the best so far."""
        fault("evaluate")
        trainer = self.trainer
        began = time.monotonic()
        self.saver.hurry()
        metrics: dict[str, float] = {}
        try:
            metrics = trainer.evaluate()
        except AskedToStop:
            self.evaluation_interrupted = True
        # A checkpoint must be on the disk before it can be the best one or count as evaluated.
        self.world.broadcast_from_first(lambda: self.saver.wait(needed=self.evaluation_interrupted))
        if metrics:
            self._mark_if_best(metrics)
            # Last, because a resumed run takes this line as the sign that the evaluation is complete.
            own = {**trainer.collector.peak(), "eval/seconds": time.monotonic() - began}
            self.run_logger.write(trainer.step, trainer.tokens, {**metrics, **own})
            logger.info(f"step {trainer.step}: {in_a_line(metrics)}")
            self._show({})
        trainer.exclude_time(time.monotonic() - began)

    def _stop_early_if_due(self) -> None:
        """Make this step the last when the latest ``early_stopping_patience`` evaluations were no better than an earlier one.

        The checkpoint of the step is saved again as a last one, which says that the run ends there.
        """
        trainer, patience = self.trainer, self.trainer.config.early_stopping_patience
        if patience is None or trainer.done:
            return
        since_best = self.world.broadcast_from_first(self._evaluations_since_best)
        if since_best < patience:
            return
        count = fmt.plural(since_best, "evaluation")
        message = f"Stopped early: {count} in a row had no better {trainer.best_metric} than the best."
        logger.info(message)
        self.run.events.write(trainer.step, EARLY_STOP, EARLY_STOP, message, tell=False)
        self.stopped_early, trainer.total = True, trainer.position
        self.save()
        self._show({})

    def _evaluations_since_best(self) -> int:
        """Return how many evaluations there were after the best one."""
        name, since_best, best = self.trainer.best_metric, 0, math.nan
        for line in read_metrics(self.run.folder.metrics, having=name):
            value = line.values[name]
            since_best += 1
            if math.isnan(best) or is_better(name, value, best):
                best, since_best = value, 0
        return since_best

    def _mark_if_best(self, metrics: Mapping[str, float]) -> None:
        name = self.trainer.best_metric
        value = metrics.get(name, math.nan)
        checkpoint = self.run.folder.checkpoints / folder_name(self.trainer.step)
        if not math.isfinite(value) or not self.world.is_first or not checkpoint.is_dir():
            return
        if self.best is None or is_better(name, value, self.best):
            self.best = value
            mark_best(checkpoint, name, value)


def in_a_line(metrics: Mapping[str, float]) -> str:
    """Return an evaluation in words, with the bits per byte of each validation set, or its loss where they are not known."""
    of_set = "/bits_per_byte" if "eval/bits_per_byte" in metrics else "/loss"
    words = []
    for name, value in metrics.items():
        if name.count("/") == 1 or name.endswith(of_set):
            shown = "held-out loss" if name == "eval/loss" else name.removeprefix("eval/").replace("/", " ")
            words.append(f"{shown} {value:.4f}")
    return ", ".join(words)
