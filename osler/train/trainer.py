"""The supervised trainer, for pretraining and fine-tuning, and its optimizer step; ``runs/loop.py`` runs it.

A step whose loss or gradient is not finite is skipped inside the optimizer (``found_inf``), so parameters and moments stay
untouched and the host need not check. Nothing in a step waits for the device.

Resume is exact: a checkpoint holds model, optimizer, step and the half-filled log window. The order of data is a function of the
step and of the skipped data (``runs/incidents.py``), and nothing else is random. (A run limited by ``max_minutes`` also
saves its clock, but how many steps fit into the rest depends on the machine.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from osler.checkpoint import store
from osler.data.curriculum import rows_per_micro_batch
from osler.data.loader import Batch, Loader
from osler.data.shard_set import fingerprint_of, is_partial
from osler.data.stream import untended, wait_for_batches
from osler.model.config import SparseAttentionConfig
from osler.model.sparse_attention import MEASURED
from osler.model.transformer import nan_gradient_unless_finite
from osler.monitor.collect import has_learned, step_stats
from osler.monitor.history import RunSettings
from osler.monitor.model_stats import ProbeRows
from osler.optim.build import set_hyperparameters
from osler.optim.schedule import RepeatsWeightDecay, lr_scale, warmup_of
from osler.runs.loop import Due, Trainer
from osler.runs.micro_batch import MicroBatchLimit
from osler.runs.process import Learner, Run
from osler.runs.resume import warn_of_endless_warmup
from osler.train.config import PLANNED_SHARE, TrainConfig
from osler.train.teacher import Teacher

# metric, its word in the progress bar, its format
SHOWN = (("train/loss", "loss", ".3f"), ("index/recall", "recall", ".3f"), ("perf/tokens_per_second", "tokens/s", ",.0f"))


class StepResult(NamedTuple):
    """The results of a step, on the device: mean loss in nats per learned token, gradient norm before clipping, 1 if skipped.

    The loss is the cross-entropy, even if a teacher or an index adds to what is minimised. It is a rank's part: its mean over
    the ranks is the loss of the global batch. When no rank has a token to learn, it is NaN everywhere, and the gradient is zero.
    ``parts`` has the values of the metrics in ``TrainStep.parts``, per learned token.
    """

    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor
    parts: Tensor

    @property
    def row(self) -> Tensor:
        """All of them in one vector."""
        return torch.cat([torch.stack(self[:3]), self.parts])


class TrainStep:
    """Callable that makes one optimizer step from this rank's rows of one global batch."""

    def __init__(
        self,
        learner: Learner,
        *,
        micro_batch_limit: MicroBatchLimit | None = None,
        document_mask: bool = False,
        teacher: Teacher | None = None,
        mark: Callable[[str], None] = lambda part: None,
        around_update: Callable[[Callable[[], ProbeRows]], AbstractContextManager[None]] = lambda rows: nullcontext(),
    ) -> None:
        """With a ``teacher`` the engine's loss is a ``DistilledLoss``.

        ``mark`` is called at the end of each part of a step: forward, backward, optimizer.

        ``around_update`` returns a context for the update, while the gradients exist. It is given a function that returns the
        rows of the batch.
        """
        self.parameters = learner.clipped_parameters
        self.optimizer, self.engine, self.device = learner.optimizer, learner.engine, learner.device
        self.micro_batch_limit = micro_batch_limit or MicroBatchLimit(learner, None)
        self.document_mask, self.teacher = document_mask, teacher
        # A benchmark trains a peer's model too, whose config has no such section.
        is_sparse = isinstance(getattr(learner.model.config, "attention", None), SparseAttentionConfig)
        self.parts = (*(("distill/kl",) if teacher else ()), *(MEASURED if is_sparse else ()))  # metrics inside the loss
        self.mark, self.around_update = mark, around_update

    def __call__(self, batch: Batch) -> StepResult:
        """Update the parameters from ``batch``, which is on the CPU, with the current settings of the optimizer."""
        # Learned tokens are counted on the CPU over the whole batch, so micro-batches weigh by their learned tokens.
        world = self.engine.world
        found_tokens = world.all_reduce_mean(torch.full((), float(batch.num_loss_tokens), device=self.device))
        learned_tokens = found_tokens.clamp_min(1 / world.size)
        num_rows, seq_len = batch.ids.shape
        rows_of = partial(rows_per_micro_batch, num_rows, seq_len)

        def halved(tokens: int | None) -> int | None:
            return None if (rows := rows_of(tokens)) == 1 else rows_of(rows // 2 * seq_len) * seq_len

        passes = partial(self._passes, batch, learned_tokens, rows_of)
        totals = self.micro_batch_limit.make(passes, halved, shape=(num_rows, seq_len))
        with self.around_update(lambda: ProbeRows(batch.ids, batch.labels, batch.document_ids if self.document_mask else None)):
            norm_and_skipped = self.engine.update(self.optimizer, *self.parameters)
        self.mark("optimizer")
        return StepResult(torch.where(found_tokens > 0, totals[0], math.nan), *norm_and_skipped, totals[1:-1])

    def _passes(
        self, batch: Batch, learned_tokens: Tensor, rows_of: Callable[[int | None], int], tokens: int | None, apart: bool
    ) -> Tensor:
        """Make the forward and backward passes of a step, each of at most ``tokens`` tokens; see ``MicroBatchLimit.make``.

        Return, per learned token, the cross-entropy, the other parts, and last what is minimised.
        """
        totals = torch.zeros((), device=self.device)
        micro = rows_of(tokens)
        for start in range(0, len(batch.ids), micro):
            rows = slice(start, start + micro)
            ids, labels = (part[rows].to(self.device, non_blocking=True) for part in (batch.ids, batch.labels))
            documents = batch.document_ids[rows].to(self.device, non_blocking=True) if self.document_mask else None
            sends = start + micro >= len(batch.ids) and not apart
            with nullcontext() if sends else self.engine.accumulating():
                from_teacher = () if self.teacher is None else self.teacher(ids, documents)
                losses = self.engine.loss(ids, labels, documents, *from_teacher).view(-1) / learned_tokens
                losses = nan_gradient_unless_finite(losses)
                self.mark("forward")
                self.engine.backward(losses[-1])
            totals = totals + losses.detach()
            self.mark("backward")
        return totals


class SupervisedTrainer(Trainer):
    """Trains on the batches of ``loader`` until ``total_tokens`` or until the clock ends the run.

    ``held_out`` and ``exam`` return metrics of the current model: the held-out loss, and the scores of a small exam. ``tend``
    looks after the preparation of data that are streamed; see ``wait_together``.
    """

    config: TrainConfig
    unit = "tokens"
    best_metric = "eval/loss"

    def __init__(
        self,
        config: TrainConfig,
        run: Run,
        learner: Learner,
        loader: Loader,
        *,
        held_out: Callable[[], dict[str, float]] = dict,
        exam: Callable[[], dict[str, float]] = dict,
        tend: Callable[[float], None] = untended,
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__(config, run, learner, total=config.total_tokens, lines_every=config.log_every_steps)
        self.loader, self.timeline, self.tend = loader, config.timeline, tend
        self.held_out, self.exam = held_out, exam
        self.train_step = TrainStep(
            learner,
            micro_batch_limit=MicroBatchLimit(learner, config.micro_batch_tokens, run, lambda: self.step + 1),
            document_mask=config.document_mask,
            teacher=teacher,
            mark=self.collector.mark,
            around_update=self.collector.update,
        )
        self.collector.forward_only = None if teacher is None else teacher.model.config
        self.train_loss: float | None = None  # the loss of the last line
        self.decays_repeats = isinstance(config.optim.weight_decay_schedule, RepeatsWeightDecay)
        self.window: list[list[float]] = []  # loss, gradient norm, skip flag and parts of each step since the last line
        self.on_device: list[StepResult] = []  # results of steps that are not fetched yet
        self.first_step = 0  # the first step of this process
        self.iterator: Generator[Batch, None, None] | None = None  # open from ``begin`` to ``close``
        self.has_replanned = False
        self.since = (0, 0.0)  # tokens and time from which the next line measures the speed

    def fingerprints(self) -> dict[str, str]:
        found = dict(self.run.fingerprints)
        if self.train_step.teacher is not None:
            found["teacher"] = self.train_step.teacher.fingerprint
        if is_partial(found.get("data", "")):  # the data were incomplete when this process began
            found["data"] = fingerprint_of(list(self.loader.sources.values()))
        return found

    def position_at(self, step: int) -> int:
        return self.timeline.tokens_before(step)

    @property
    def tokens(self) -> int:
        return self.position

    def settings(self) -> RunSettings:
        return replace(
            super().settings(),
            warmup_tokens=warmup_of(self.config.schedule, self.total),
            vocab_size=self.learner.model.config.vocab_size,
            is_frozen=self.config.trains == "indexers",
            loader_workers=self.config.loader_workers,
        )

    # -- steps -----------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        self.close()
        steps, skipped = range(self.step, self.timeline.steps_for(self.total)), self.incidents.data_offset
        self.iterator = wait_for_batches(self.loader, steps, self.world, self.tend, skipped_tokens=skipped)
        self.first_step = self.first_step or self.step + 1
        self.since = self.tokens, time.monotonic()

    def close(self) -> None:
        if self.iterator is not None:
            self.iterator.close()

    def advance(self) -> dict[str, float] | None:
        middle, scale = self._schedule(self.step)
        assert self.iterator is not None
        batch = self.collector.fetch(self.iterator, self.step + 1)
        repeated = self.loader.repeated_share(self.step, self.incidents.data_offset) if self.decays_repeats else 0.0
        set_hyperparameters(self.learner.optimizer, self.config.optim, scale, middle, self.total, repeated)
        self.on_device.append(self.train_step(batch))
        self.step += 1
        # A step that compiles says nothing about the speed or the time left.
        stage, model = self.timeline.at_step(self.step - 1), self.learner.model
        if self.step in (self.first_step, stage.first_step + 1):
            if self.config.trains == "all":  # frozen weights learn nothing of longer rows
                model.trained_seq_len = max(model.trained_seq_len, stage.seq_len)
            self.since = self.tokens, time.monotonic()
            self.collector.restart_clock()
        self._watch_clock()
        return self._line(scale) if self.step % self.config.log_every_steps == 0 or self.done else None

    def due(self) -> Due:
        config = self.config
        return Due(
            save=self.crossed(config.checkpoint.every_tokens),
            milestone=self.crossed(config.checkpoint.keep_every_tokens),
            evaluation=self.crossed(config.evaluation_tokens) or self.crossed(config.exam.every_tokens),
        )

    def _schedule(self, step: int) -> tuple[int, float]:
        """Return the tokens seen in the middle of a step (0, 1 ...), and the factor of the learning rate there."""
        middle = self.timeline.tokens_before(step) + self.timeline.at_step(step).batch_tokens // 2
        return middle, lr_scale(self.config.schedule, middle, self.total)

    def details(self, step: int) -> dict[str, Any]:
        """Return the details of an incident at ``step``; its rows are counted in its stage, without skipped data."""
        rows = self.timeline.rows_at(step - 1)
        learning_rate = self.config.optim.lr * self._schedule(step - 1)[1]
        place = {"rows": [rows.start, rows.stop - 1], "data_offset": self.incidents.data_offset}
        return {"tokens": self.timeline.tokens_before(step), "lr": learning_rate, **place}

    # -- the clock -------------------------------------------------------------------------------------------------------

    def _watch_clock(self) -> None:
        """End the run when its minutes are over, because steps may be slower than the last plan expected."""
        if self.config.max_minutes is None:
            return
        if self.run.seconds > self.config.max_minutes * 60 * PLANNED_SHARE:
            self.total = self.tokens
        (self.total,) = self.world.all_reduce_min(self.total)

    def _replan(self, tokens_per_second: float) -> None:
        """Fit the run to the clock: it takes as many whole steps as the rest of the time allows at this speed."""
        assert self.config.max_minutes is not None
        left = max(0.0, self.config.max_minutes * 60 * PLANNED_SHARE - self.run.seconds)
        steps = self.timeline.steps_within(self.tokens + int(left * tokens_per_second))
        fitting = min(self.config.total_tokens, self.timeline.tokens_before(steps))
        (self.total,) = self.world.all_reduce_min(fitting)
        if not self.has_replanned:
            self.has_replanned = True
            is_timed = self.total < self.config.total_tokens
            warn_of_endless_warmup(
                self.config.schedule, self.total, "what max_minutes has time for:" if is_timed else "total_tokens"
            )

    def exclude_time(self, seconds: float) -> None:
        tokens, began = self.since
        self.since = tokens, began + seconds

    # -- metrics ---------------------------------------------------------------------------------------------------------

    def _fetch(self) -> None:
        """Bring the results of the steps to the host. Between evaluations nothing else waits for the device."""
        if not self.on_device:
            return
        rows = self.world.all_reduce_mean(torch.stack([result.row for result in self.on_device])).tolist()
        self.on_device.clear()
        for step, (loss, grad_norm, skipped, *_) in enumerate(rows, start=self.step - len(rows) + 1):
            if has_learned(loss, grad_norm):
                self.incidents.observe(step, loss, grad_norm, skipped=bool(skipped))
        self.window += rows

    def _line(self, scale: float) -> dict[str, float]:
        """Return the metrics of the steps since the last line."""
        self._fetch()
        tokens, began = self.since
        self.since = self.tokens, time.monotonic()
        metrics = step_stats(self.window, self.config.clip_norm, self.loader.bytes_per_token(self.step))
        metrics |= {"train/lr": self.config.optim.lr * scale, **self.collector.line()}
        metrics |= self.loader.metrics(self.step, len(self.window), skipped_tokens=self.incidents.data_offset)
        for place, name in enumerate(self.train_step.parts, start=3):
            values = [row[place] for row in self.window if has_learned(row[0], row[1]) and math.isfinite(row[place])]
            metrics |= {name: sum(values) / len(values)} if values else {}
        self.window = []
        loss = metrics.get("train/loss")  # None when no step had a token to learn
        if loss is not None:
            self.train_loss = loss if math.isfinite(loss) else None
        stage = self.timeline.at_step(self.step - 1)
        if self.config.curriculum:
            numbers = {"stage": stage.number, "seq_len": stage.seq_len, "batch_tokens": stage.batch_tokens}
            metrics |= {f"train/{name}": number for name, number in numbers.items()}
        if self.tokens > tokens:
            speed = (self.tokens - tokens) / (self.since[1] - began)
            if self.config.max_minutes:
                self._replan(speed)
            metrics |= self.collector.speed(speed, tokens_left=self.total - self.tokens, seq_len=stage.seq_len)
        return metrics

    def shown(self, metrics: Mapping[str, float]) -> dict[str, str]:
        shown = {"loss": "none"}
        for name, word, form in SHOWN:
            shown |= {word: format(metrics[name], form)} if name in metrics else {}
        return shown

    def evaluate(self) -> dict[str, float]:
        metrics = self.held_out() if self.crossed(self.config.evaluation_tokens) else {}
        if self.crossed(self.config.exam.every_tokens):
            metrics |= self.exam()
        loss = metrics.get("eval/loss", math.inf)
        if self.train_loss is not None and math.isfinite(loss):
            metrics["eval/train_gap"] = loss - self.train_loss
        return metrics

    def state(self) -> dict[str, Any]:
        self._fetch()
        return {
            "total_tokens": self.total,
            "seconds": self.run.seconds,
            "train_loss": self.train_loss,
            "window": [[value if math.isfinite(value) else None for value in row] for row in self.window],
        }

    def restore(self, loaded: store.Loaded) -> None:
        super().restore(loaded)
        state = loaded.state
        self.total = state["total_tokens"] if self.config.max_minutes else self.config.total_tokens
        self.train_loss = state["train_loss"]
        self.window = [[math.nan if value is None else value for value in row] for row in state["window"]]
