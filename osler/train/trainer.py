"""The supervised training loop, shared by pretraining and fine-tuning.

Resume is exact: a checkpoint holds model, optimizer, step and the half-filled log window; the order of data is a function of the
step and of what was passed over (``train/incidents.py``); nothing else is random. (A run limited by ``max_minutes`` also saves
its clock, but how many steps fit the rest depends on the machine.) A checkpoint comes before every evaluation, so an evaluation
that fails costs nothing: what is still being written is finished.

Every rank runs this loop; rank 0 alone writes. A signal to one of them and the clock are agreed on after each step, so that all
make the same steps. A checkpoint is the same whatever the number of ranks.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from osler.checkpoint import store
from osler.checkpoint.saver import Saver
from osler.data.consumed import ConsumedData
from osler.data.loader import Batch
from osler.model.transformer import Transformer
from osler.monitor.collect import Collector, has_learned, of_steps
from osler.monitor.history import RunSettings
from osler.monitor.lifetime import recorded
from osler.monitor.logger import RunLogger, open_logger
from osler.optim.build import keeping_settings, set_decay_and_momentum
from osler.optim.schedule import lr_scale
from osler.runtime.faults import fault
from osler.runtime.files import RunFolder
from osler.runtime.log import Progress
from osler.runtime.stop import AskedToStop, StopFlag
from osler.train.config import TrainConfig
from osler.train.folder import check_fingerprints, was_evaluated
from osler.train.incidents import Incidents
from osler.train.step import StepResult, TrainStep

logger = logging.getLogger(__name__)

PLANNED_SHARE = 0.97  # of the minutes asked for: the rest is for the last checkpoint and evaluation


class Trainer:
    """Trains ``model`` on batches until ``total_tokens`` (or the clock), writing metrics and checkpoints to ``run``.

    ``batches(step, skipped_tokens)`` iterates over global batches from a step on, so many tokens further on in the data than its
    steps say, and ``consumed`` knows what is in them; ``evaluate`` returns metrics of the model as it is;
    ``files`` and ``fingerprints`` go into every checkpoint, which is refused on resume when the fingerprints differ.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        train_step: TrainStep,
        batches: Callable[[int, int], Iterator[Batch]],
        consumed: ConsumedData,
        evaluate: Callable[[], dict[str, float]],
        probe: Callable[[], dict[str, float]],
        run: RunFolder,
        files: Mapping[str, bytes],
        fingerprints: Mapping[str, str],
        started: float,
    ) -> None:
        self.config = config
        self.model = model
        self.optimizer = optimizer
        self.train_step = train_step
        self.engine = train_step.engine
        self.world = self.engine.world
        self.batches = batches
        self.consumed = consumed
        self.evaluate = evaluate
        self.probe = probe
        self.run = run
        logs = (run.metrics, run.events)
        self.saver = Saver(
            run.checkpoints,
            keep_last=config.keep_last,
            in_background=config.async_save,
            logs=logs,
            on_damage=lambda *found: self.incidents.found_damaged(*found),
        )
        self.files = files
        self.fingerprints = fingerprints
        self.started = started  # time.monotonic() at which this process began to work on the run
        self.earlier_seconds = 0.0  # spent by the processes before this one
        self.step = 0
        self.timeline = config.timeline
        self.total_tokens = config.total_tokens
        self.best_loss = math.inf
        self.has_left = False  # an evaluation, because the run was asked to stop
        self.train_loss: float | None = None  # of the last line
        self.incidents = Incidents(config, run, self._details, self.world)
        self.window: list[list[float]] = []  # loss, gradient norm and skip flag of each step since the last log line
        self.on_device: list[StepResult] = []  # the same, not yet fetched
        self.collector = Collector(
            config.monitor,
            model,
            train_step.device,
            lines_every=config.log_every_steps,
            world=self.world,
            whole_weights=lambda: self.engine.whole_weights(model),
            has_gradients=self.engine.leaves_gradients,
        )
        train_step.mark, train_step.watch = self.collector.mark, self.collector.update

    @property
    def tokens(self) -> int:
        return self.timeline.tokens_before(self.step)

    @property
    def seconds(self) -> float:
        return self.earlier_seconds + time.monotonic() - self.started

    @property
    def done(self) -> bool:
        return self.tokens >= self.total_tokens

    def fit(self) -> bool:
        """Train to the end; False when asked to stop before (everything is saved then)."""
        config = self.config
        with (
            StopFlag() as stop,  # first: whoever sees the metrics file may rely on a signal being a request
            open_logger(config.monitor, self.run, self._run_settings(), step=self.step, is_first=self.world.is_first) as sink,
            recorded(sink.events, lambda: self.step, lambda: self.done and not self.has_left, sink.unresolved),
            Progress(self.total_tokens, "tokens", label=config.kind, initial=self.tokens) as progress,
            self.saver,
        ):
            self.incidents.events = sink.events
            if self.step and not self.world.broadcast_from_first(lambda: was_evaluated(self.run, self.step)):
                self._evaluate(sink, progress)  # a kill came after this checkpoint and before its evaluation
            batches = self.batches(self.step, self.incidents.data_offset)
            first, mark = self.step, (self.tokens, time.monotonic())
            while not self.done and not self.has_left:
                stage = self.timeline.at_step(self.step)
                middle, scale = self._schedule(self.step)
                set_decay_and_momentum(self.optimizer, config.optim, scale, middle, self.total_tokens)
                self.on_device.append(self.train_step(self.collector.fetch(batches, self.step + 1), scale))
                self.step += 1
                fault("train-step")
                if self.step in (first + 1, stage.first_step + 1):  # it compiles: neither speed nor time left follow from it
                    mark = (self.tokens, time.monotonic())
                    self.collector.restart_clock()
                    progress.update(self.tokens)
                self._watch_clock()
                stopping = self._agree(stop)
                if self.step % config.log_every_steps == 0 or self.done:
                    mark = self._log(sink, progress, mark, scale)
                    if self.incidents.cause:
                        self._roll_back(sink, stop)
                        batches = self.batches(self.step, self.incidents.data_offset)
                        mark = (self.tokens, time.monotonic())
                        continue
                evaluation_due = self._due(config.eval_every_tokens) or self._due(config.exam.every_tokens)
                if evaluation_due or stopping or self._due(config.save_every_tokens) or self._due(config.keep_every_tokens):
                    self.save(stop)
                    stopping = self._agree(stop)  # once more, because saving takes its time
                if stopping and not self.done:
                    self.world.broadcast_from_first(lambda: self.saver.wait(needed=True))
                    return False
                if evaluation_due:
                    before = time.monotonic()
                    self._evaluate(sink, progress)
                    mark = (mark[0], mark[1] + time.monotonic() - before)
        return not self.has_left

    def save(self, stop: StopFlag) -> None:
        """Have a checkpoint written, in the background unless it is the last one of this process; see ``Saver.save``.

        Sharded tensors come together on rank 0, one at a time.
        """
        self._fetch()
        self.world.broadcast_from_first(self.saver.wait)  # the hosts have more patience than a collective
        last = self.done or stop.requested
        to_host = self.saver.to_host if self.config.async_save else None
        tensors, optimizer_state = self.engine.parts(self.model, self.optimizer, to_host)
        state = {
            "kind": self.config.kind,
            "step": self.step,
            "tokens": self.tokens,
            "total_tokens": self.total_tokens,
            "seconds": self.seconds,
            "train_loss": self.train_loss,
            "incidents": self.incidents.checkpointed(self.step),
            "window": [[value if math.isfinite(value) else None for value in row] for row in self.window],
            "fingerprints": dict(self.fingerprints),
            "optimizer": optimizer_state,
        }
        save = partial(
            self.saver.save,
            self.step,
            tensors=tensors,
            state=state,
            files=self.files,
            milestone=self._due(self.config.keep_every_tokens),
            good_step=self.incidents.good_step,
            last=last,
        )
        self.world.broadcast_from_first(save)

    def restore(self, loaded: store.Loaded) -> None:
        """Continue from a checkpoint of this run, bit for bit, or with its own settings from one of the run it branches from."""
        allowed = self.config.allow_data_change
        check_fingerprints(loaded, self.fingerprints, self.incidents.events, allow_data_change=allowed)
        with keeping_settings(self.optimizer):
            self._take_over(loaded)

    def _take_over(self, loaded: store.Loaded) -> None:
        """Become what was saved; what is learned from was checked when this process began."""
        state = loaded.state
        self.engine.restore(self.model, self.optimizer, loaded.tensors, state["optimizer"])
        self.step, self.earlier_seconds = state["step"], state["seconds"]
        self.total_tokens = state["total_tokens"] if self.config.max_minutes else self.config.total_tokens
        # Read from the folder, because a checkpoint is written before the evaluation that may make it the best.
        best = store.best_checkpoint(self.run.checkpoints)
        self.best_loss = best.value if best is not None and best.value is not None and best.step <= self.step else math.inf
        self.train_loss = state.get("train_loss")
        self.incidents.restore(state.get("incidents"))
        self.window = [[math.nan if value is None else value for value in row] for row in state["window"]]

    def _due(self, every_tokens: int) -> bool:
        """Whether the step just made crossed a multiple of ``every_tokens`` (0: never), or was the last."""
        if every_tokens == 0:
            return False
        return self.done or self.tokens // every_tokens > self.timeline.tokens_before(self.step - 1) // every_tokens

    def _fetch(self) -> None:
        """Bring what the steps left on the device to the host: the only wait for the device between evaluations."""
        if not self.on_device:
            return
        rows = self.world.all_reduce_mean(torch.stack([torch.stack(result) for result in self.on_device])).tolist()
        self.on_device.clear()
        for step, (loss, grad_norm, skipped) in enumerate(rows, start=self.step - len(rows) + 1):
            if has_learned(loss, grad_norm):
                self.incidents.observe(step, loss, grad_norm, skipped=bool(skipped))
        self.window += rows

    def _schedule(self, step: int) -> tuple[int, float]:
        """The tokens seen in the middle of a step (0, 1 ...), and what they scale the learning rate by."""
        middle = self.timeline.tokens_before(step) + self.timeline.at_step(step).batch_tokens // 2
        return middle, lr_scale(self.config.schedule, middle, self.total_tokens)

    def _details(self, step: int) -> dict[str, Any]:
        """What an incident at the end of a step is recorded with."""
        rows = self.timeline.rows_at(step - 1, self.incidents.data_offset)
        learning_rate = self.config.optim.lr * self._schedule(step - 1)[1]
        return {"tokens": self.timeline.tokens_before(step), "lr": learning_rate, "rows": [rows.start, rows.stop - 1]}

    def _roll_back(self, sink: RunLogger, stop: StopFlag) -> None:
        """Go back to the last good checkpoint and on with other data; saved at once, so that a kill changes nothing."""
        earlier_seconds = self.earlier_seconds
        self.world.broadcast_from_first(self.saver.wait)  # the checkpoint to go back to may be the one that is being written
        self.incidents.roll_back(self.step, self._take_over, lambda: self.tokens)
        self.earlier_seconds = earlier_seconds  # the clock does not go back
        self.save(stop)
        self.world.broadcast_from_first(self.saver.wait)
        fault("rollback")
        sink.rewind(self.step)

    def _log(self, sink: RunLogger, progress: Progress, mark: tuple[int, float], scale: float) -> tuple[int, float]:
        """Write what the steps since the last line gave; the speed is that since the tokens and the time of ``mark``."""
        self._fetch()
        now = time.monotonic()
        metrics = of_steps(self.window, self.config.clip_norm, self.consumed.bytes_per_token)
        metrics |= {"train/lr": self.config.optim.lr * scale, **self.collector.line()}
        metrics |= self.consumed.metrics(
            self.step,
            len(self.window),
            by_source=self.collector.is_due(self.step),
            skipped_tokens=self.incidents.data_offset,
        )
        loss = metrics.get("train/loss")  # None when no step had a token to learn
        if loss is not None:
            self.train_loss = loss if math.isfinite(loss) else None
        stage = self.timeline.at_step(self.step - 1)
        if self.config.curriculum:
            metrics |= {
                "train/stage": stage.number,
                "train/seq_len": stage.seq_len,
                "train/batch_tokens": stage.batch_tokens,
            }
        shown = {"loss": "none" if loss is None else f"{loss:.3f}"}
        if self.tokens > mark[0]:
            speed = (self.tokens - mark[0]) / (now - mark[1])
            shown["tokens/s"] = f"{speed:,.0f}"
            if self.config.max_minutes:
                self._replan(speed)
                progress.total = self.total_tokens
            metrics |= self.collector.speed(speed, tokens_left=self.total_tokens - self.tokens, seq_len=stage.seq_len)
        self.window = []
        sink.write(self.step, self.tokens, metrics)
        progress.update(self.tokens, **shown)
        return self.tokens, now

    def _replan(self, speed: float) -> None:
        """Fit the tokens of the run to the clock: as many whole steps as the rest of the time allows at this speed."""
        assert self.config.max_minutes is not None
        left = max(0.0, self.config.max_minutes * 60 * PLANNED_SHARE - self.seconds)
        steps = self.timeline.steps_within(self.tokens + int(left * speed))
        fitting = min(self.config.total_tokens, self.timeline.tokens_before(steps))
        (self.total_tokens,) = self.world.all_reduce_min(fitting)

    def _watch_clock(self) -> None:
        """End the run when its minutes are over, should the steps since the last plan have been slower than planned."""
        minutes = self.config.max_minutes
        if minutes is not None and self.seconds > minutes * 60 * PLANNED_SHARE:
            self.total_tokens = self.tokens

    def _agree(self, stop: StopFlag) -> bool:
        """Whether the ranks stop, because one was asked to. A signal after this vote counts in the next."""
        self.total_tokens, on = self.world.all_reduce_min(self.total_tokens, not stop.requested)
        stop.requested = stop.requested or not on
        return not on

    def _run_settings(self) -> RunSettings:
        """What the alerts must know of this run."""
        return RunSettings(
            lr=self.config.optim.lr,
            clip_norm=self.config.clip_norm,
            warmup_tokens=self.config.schedule.warmup_tokens,
            vocab_size=self.model.config.vocab_size,
            loader_workers=self.config.loader_workers,
        )

    def _evaluate(self, sink: RunLogger, progress: Progress) -> None:
        """Measure what is due after this step; a lowest held-out loss marks the step's checkpoint as the best."""
        fault("evaluate")
        before = time.monotonic()
        self.saver.hurry()
        try:
            metrics = self.evaluate() if self._due(self.config.eval_every_tokens) else {}
            if self._due(self.config.exam.every_tokens):
                metrics |= self.probe()
        except AskedToStop:
            self.has_left, metrics = True, {}
        # Only what is on the disk can be the best, and count as evaluated.
        self.world.broadcast_from_first(lambda: self.saver.wait(needed=self.has_left))
        if not metrics:
            return
        loss = metrics.get("eval/loss", math.inf)
        if self.train_loss is not None and math.isfinite(loss):
            metrics["eval/train_gap"] = loss - self.train_loss
        saved = self.run.checkpoints / store.folder_name(self.step)
        if loss < self.best_loss and self.world.is_first and saved.is_dir():
            self.best_loss = loss
            store.mark_best(saved, "eval/loss", loss)
        # Last, because the line is what tells a resumed run that this evaluation is complete.
        sink.write(self.step, self.tokens, {**metrics, "eval/seconds": time.monotonic() - before})
        shown = {name.replace("eval/loss", "held-out loss").removeprefix("eval/"): value for name, value in metrics.items()}
        logger.info(f"step {self.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in shown.items()))
        progress.update(self.tokens)
