"""The GRPO loop: ask, answer, reward, learn; then save, then evaluate.

It takes objects that are already built (``run.py`` builds them). Resume is exact: what is asked and drawn is a function of
(seed, step and how many were passed over), and a checkpoint holds the model, the optimizer, the reference and the counters, so a
run that was killed and resumed goes through the same steps to the same numbers.

Every rank runs this loop and knows the samples of all (``rollout.py``); rank 0 alone writes. A signal to one of them is
agreed on after each step. A checkpoint is the same whatever the number of ranks.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import torch

from osler.checkpoint import store
from osler.checkpoint.saver import Saver
from osler.data.consumed import source_metrics
from osler.inference.engine import InferenceEngine
from osler.model.transformer import Transformer
from osler.monitor.collect import Collector
from osler.monitor.history import RunSettings
from osler.monitor.lifetime import recorded
from osler.monitor.logger import RunLogger, open_logger
from osler.optim.build import keeping_settings, set_decay_and_momentum, set_lr
from osler.optim.schedule import lr_scale
from osler.parallel.engine import ParallelEngine
from osler.rl.config import GrpoConfig
from osler.rl.prompts import RlTask, visits, walked
from osler.rl.rollout import Group, RolloutWorker, count_tokens, rollout_metrics
from osler.rl.step import training_rows, update_policy
from osler.runtime.faults import fault
from osler.runtime.files import RunFolder
from osler.runtime.log import Progress
from osler.runtime.stop import AskedToStop, StopFlag
from osler.tokenizer.bpe import Tokenizer
from osler.train.folder import check_fingerprints, was_evaluated
from osler.train.incidents import Incidents

logger = logging.getLogger(__name__)

# Numbers that a step has when some group's rewards differ, so that means and rules over steps are over those that learned.
OF_LEARNING = ("loss", "loss/drift", "grad/clipped_frac")


class GrpoTrainer:
    """One GRPO run; metrics, samples and checkpoints go to ``run``.

    ``engine`` is one around a ``step.PolicyLoss`` of the model, ``sampler`` draws completions from the model.
    ``evaluate`` returns metrics of the model as it is; it is called before the first step, every ``eval_every_steps``
    steps and at the end, and ``best_metric`` among them decides which checkpoint is the best. ``files`` (model
    config, tokenizer) and ``fingerprints`` go into every checkpoint; a resume with other fingerprints is refused.
    """

    def __init__(
        self,
        config: GrpoConfig,
        *,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        engine: ParallelEngine,
        sampler: InferenceEngine,
        tokenizer: Tokenizer,
        tasks: Sequence[RlTask],
        run: RunFolder,
        evaluate: Callable[[], Mapping[str, float]] | None = None,
        best_metric: str = "",
        files: Mapping[str, bytes] | None = None,
        fingerprints: Mapping[str, str] | None = None,
    ) -> None:
        self.config = config
        self.model = model
        self.optimizer = optimizer
        self.engine = engine
        self.world = engine.world
        self.sampler = sampler
        self.run = run
        logs = (run.metrics, run.events)
        self.saver = Saver(
            run.checkpoints,
            keep_last=config.keep_last,
            in_background=config.async_save,
            logs=logs,
            on_damage=lambda *found: self.incidents.found_damaged(*found),
        )
        self.worker = RolloutWorker(sampler, tokenizer, tasks, config.algorithm, config.seed, self.world)
        self.evaluate = evaluate
        self.best_metric = best_metric
        self.files = dict(files or {})
        self.fingerprints = dict(fingerprints or {})
        engine.bind(optimizer, config.clip_norm)
        self.reference = frozen_copy(engine.plain_model(model)) if config.algorithm.beta > 0.0 else None
        self.collector = Collector(
            config.monitor,
            model,
            model.embed_tokens.weight.device,
            world=self.world,
            whole_weights=lambda: engine.whole_weights(model),
            has_gradients=engine.leaves_gradients,
        )
        self.step = 0  # finished steps
        self.tokens = 0  # completion tokens sampled
        self.task_tokens = Counter[str]()  # completion tokens of each task's groups
        self.best_value: float | None = None
        self.has_left = False  # an evaluation, because the run was asked to stop
        self.incidents = Incidents(config, run, self._details, self.world)

    # -- the loop ------------------------------------------------------------------------------------------------------

    def fit(self) -> bool:
        """Train to the last step; False when asked to stop before (everything is saved then)."""
        config = self.config
        with (
            StopFlag() as stop,  # first: whoever sees the metrics file may rely on a signal being a request
            open_logger(config.monitor, self.run, self._run_settings(), step=self.step, is_first=self.world.is_first) as sink,
            recorded(sink.events, lambda: self.step, lambda: self.step >= config.steps and not self.has_left, sink.unresolved),
            Progress(config.steps, "steps", label="grpo", initial=self.step) as progress,
            self.saver,
        ):
            self.incidents.events = sink.events
            # Before the first step, or where a kill came after the checkpoint and before its evaluation.
            if self._evaluation_due() and not self.world.broadcast_from_first(lambda: was_evaluated(self.run, self.step)):
                self._evaluate(sink)
            while self.step < config.steps and not self.has_left:
                metrics = self._one_step()
                fault("train-step")
                sink.write(self.step, self.tokens, metrics)
                progress.update(self.step, reward=f"{metrics['reward']:.3f}")
                self._observe(metrics)
                if self.incidents.cause:
                    self._roll_back(sink, stop)
                    continue
                done = self.step == config.steps
                stopping = self._agree(stop)
                # The checkpoint comes first: an evaluation that fails must not cost the steps before it.
                save_due = self.step % config.save_every_steps == 0 or self._is_milestone()
                if self._evaluation_due() or stopping or save_due:
                    self.save(stop)
                    stopping = self._agree(stop)  # once more, because saving takes its time
                if stopping and not done:
                    self.world.broadcast_from_first(lambda: self.saver.wait(needed=True))
                    return False
                if self._evaluation_due():
                    self._evaluate(sink)
        return not self.has_left

    def _evaluation_due(self) -> bool:
        return self.step % self.config.eval_every_steps == 0 or self.step >= self.config.steps

    def _is_milestone(self) -> bool:
        every = self.config.keep_every_steps
        return every > 0 and (self.step % every == 0 or self.step >= self.config.steps)

    def _agree(self, stop: StopFlag) -> bool:
        """Whether the ranks stop, because one was asked to. A signal after this vote counts in the next."""
        (on,) = self.world.all_reduce_min(not stop.requested)
        stop.requested = stop.requested or not on
        return not on

    @contextmanager
    def _whole_model(self) -> Iterator[None]:
        """Lend the sampler the model as it is, neither sharded nor wrapped; no copy of it stays beside what training needs."""
        self.sampler.model = self.engine.plain_model(self.model)
        try:
            yield
        finally:
            self.sampler.model = self.model

    def _one_step(self) -> dict[str, float]:
        """Ask the questions of the current step, learn from the answers, and count the step as done."""
        config, algorithm, started = self.config, self.config.algorithm, time.perf_counter()
        with self._whole_model():
            groups, sampled_tokens = self.worker.step(self.step + self.incidents.data_offset)
        rollout_seconds = time.perf_counter() - started
        metrics = rollout_metrics(groups)

        budget = config.budget_tokens_per_step
        middle = self.step * budget + budget // 2  # as in train/: the first step has a rate above 0, and so has the last
        scale = lr_scale(config.schedule, middle, config.budget_tokens)
        set_lr(self.optimizer, scale)
        set_decay_and_momentum(self.optimizer, config.optim, scale, middle, config.budget_tokens)
        rows = training_rows(groups, algorithm)
        self.collector.begin(self.step + 1)
        update: dict[str, float] = {}
        if rows:  # none when the quality filter dropped every sample
            update = update_policy(
                self.model,
                self.optimizer,
                rows,
                algorithm,
                reference=self.reference,
                micro_batch_tokens=config.micro_batch_tokens,
                engine=self.engine,
                collector=self.collector,
            )
        self.step += 1
        self.tokens += sampled_tokens
        refresh = algorithm.reference_refresh_steps
        if self.reference is not None and refresh and self.step % refresh == 0:
            self.reference.load_state_dict(self.engine.whole_weights(self.model))

        seconds = time.perf_counter() - started
        if metrics["frac_reward_zero_std"] == 1.0:  # at most the KL term had a gradient, whose numbers are not those of learning
            update = {name: value for name, value in update.items() if name not in OF_LEARNING}
        lengths = [row.tokens for row in rows if row.has_gradient(algorithm.beta)]
        return {
            **metrics,
            **update,
            **self.collector.line(),
            **self._consumed(groups),
            **(self._speed(lengths, seconds - rollout_seconds) if lengths else {}),
            "perf/eta_seconds": (config.steps - self.step) * seconds,
            "train/lr": self.optimizer.param_groups[0]["lr"],
            "perf/step_seconds": seconds,
            "perf/rollout_frac": rollout_seconds / seconds,
            "perf/rollout_tokens_per_second": sampled_tokens / rollout_seconds,
        }

    def _speed(self, lengths: Sequence[int], seconds: float) -> dict[str, float]:
        """The speed of the updates on rows of these lengths, and the share of the GPUs' peak that it is."""
        speed = sum(lengths) * self.config.algorithm.updates_per_batch / seconds
        # A token costs attention over its row, so the mean is over tokens.
        seq_len = round(sum(length**2 for length in lengths) / sum(lengths))
        return {"perf/train_tokens_per_second": speed, **self.collector.mfu(speed, seq_len)}

    def _consumed(self, groups: Sequence[Group]) -> dict[str, float]:
        """How often the questions have been gone through after the step just made, whose groups these are."""
        tasks = self.worker.tasks
        for group in groups:
            self.task_tokens[group.visit.task.name] += count_tokens([group])
        asked = walked(tasks, self.step + self.incidents.data_offset, self.config.algorithm.prompts_per_step)
        of_epoch = {task.name: len(task.items) for task in tasks}
        metrics = {"data/epoch": sum(asked.values()) / sum(of_epoch.values())}
        if self.collector.is_due(self.step):
            weights = {task.name: task.weight for task in tasks}
            metrics |= source_metrics(tokens=self.task_tokens, consumed=asked, of_epoch=of_epoch, target=weights)
        return metrics

    # -- watching ------------------------------------------------------------------------------------------------------

    def _run_settings(self) -> RunSettings:
        """What the alerts must know of this run: among them is that no completion ends, or none is ever rewarded."""
        return RunSettings(
            lr=self.config.optim.lr,
            clip_norm=self.config.clip_norm,
            warmup_tokens=self.config.schedule.warmup_tokens,
            max_new_tokens=self.config.algorithm.max_new_tokens,
            zero_reward_patience=self.config.zero_reward_patience,
        )

    def _observe(self, metrics: Mapping[str, float]) -> None:
        """Hand the numbers of the step just made to whoever watches for incidents.

        A step without a usable sample has none, and one whose groups are all rewarded equally says nothing of the others.
        """
        norm = metrics.get("train/grad_norm")
        if norm is not None and (metrics["frac_reward_zero_std"] < 1.0 or not math.isfinite(norm)):
            skipped = metrics["train/skipped_steps"] >= self.config.algorithm.updates_per_batch
            loss, drift = metrics.get("loss", math.nan), metrics.get("loss/drift")
            self.incidents.observe(self.step, loss, norm, skipped=skipped, drift=drift)

    def _details(self, step: int) -> dict[str, Any]:
        """What an incident at the end of a step, the one just made, is recorded with."""
        position, count = step - 1 + self.incidents.data_offset, self.config.algorithm.prompts_per_step
        asked = [visit.item.id for visit in visits(self.worker.tasks, self.config.seed, position, count)]
        return {"tokens": self.tokens, "lr": self.optimizer.param_groups[0]["lr"], "questions": asked}

    def _roll_back(self, sink: RunLogger, stop: StopFlag) -> None:
        """Go back to the last good checkpoint and on with other questions; saved at once, so that a kill changes nothing."""
        self.world.broadcast_from_first(self.saver.wait)  # the checkpoint to go back to may be the one that is being written
        self.incidents.roll_back(self.step, self._take_over, lambda: self.step)
        self.save(stop)
        self.world.broadcast_from_first(self.saver.wait)
        fault("rollback")
        sink.rewind(self.step)

    def _evaluate(self, sink: RunLogger) -> None:
        """Evaluate, and mark this step's checkpoint when it is the best so far."""
        if self.evaluate is None:
            return
        fault("evaluate")
        before = time.perf_counter()
        self.saver.hurry()
        try:
            with self._whole_model():
                metrics = dict(self.evaluate())
        except AskedToStop:
            self.has_left = True
        # Only what is on the disk can be the best, and count as evaluated.
        self.world.broadcast_from_first(lambda: self.saver.wait(needed=self.has_left))
        if self.has_left:
            return
        value, saved = metrics.get(self.best_metric), self.run.checkpoints / store.folder_name(self.step)
        if value is not None and self.world.is_first and saved.is_dir() and (self.best_value is None or value > self.best_value):
            self.best_value = value
            store.mark_best(saved, self.best_metric, value)
        # Last, because the line is what tells a resumed run that this evaluation is complete.
        sink.write(self.step, self.tokens, {**metrics, "eval/seconds": time.perf_counter() - before})
        shown = ", ".join(f"{name.removeprefix('eval/')} {value:.4f}" for name, value in metrics.items())
        logger.info(f"step {self.step}: {shown}")

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def save(self, stop: StopFlag) -> None:
        """Have everything saved that a resume needs, in the background unless it is the last time; see ``Saver.save``.

        Sharded tensors come together on rank 0, one at a time.
        """
        self.world.broadcast_from_first(self.saver.wait)  # the hosts have more patience than a collective
        last = stop.requested or self.step >= self.config.steps
        to_host = self.saver.to_host if self.config.async_save else None
        tensors, optimizer_state = self.engine.parts(self.model, self.optimizer, to_host)
        if self.reference is not None:  # kept even when never refreshed: a run folder must resume without ``init_from``
            tensors["reference"] = dict(self.reference.state_dict())
        state = {
            "kind": "grpo",
            "step": self.step,
            "tokens": self.tokens,
            "task_tokens": dict(self.task_tokens),
            "incidents": self.incidents.checkpointed(self.step),
            "optimizer": optimizer_state,
            "fingerprints": self.fingerprints,
        }
        save = partial(
            self.saver.save,
            self.step,
            tensors=tensors,
            state=state,
            files=self.files,
            milestone=self._is_milestone(),
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
        self.engine.restore(self.model, self.optimizer, loaded.tensors, loaded.state["optimizer"])
        if self.reference is not None:
            self.reference.load_state_dict(loaded.tensors["reference"])
        self.step = loaded.state["step"]
        self.tokens = loaded.state["tokens"]
        self.task_tokens = Counter(loaded.state.get("task_tokens", {}))
        self.incidents.restore(loaded.state.get("incidents"))
        best = store.best_checkpoint(self.run.checkpoints)
        self.best_value = best.value if best is not None and best.step <= self.step else None


def frozen_copy(model: Transformer) -> Transformer:
    """Return a copy of the model that nothing trains: the reference of the KL term."""
    return deepcopy(model).eval().requires_grad_(False)
