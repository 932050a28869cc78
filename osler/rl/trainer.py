"""The GRPO trainer: it asks, samples answers, rewards them and learns; ``runs/loop.py`` runs it.

Resume is exact: questions and samples are a function of (seed, step, number of skipped steps) and of the questions that rest. A
checkpoint holds these, the model, the optimizer, the reference and the counters. Every rank knows the samples of all ranks
(``rollout.py``).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from osler.checkpoint import store
from osler.data.loader import source_metrics
from osler.eval.exams import greedy, score_by_generation, shared_exam
from osler.model.transformer import Transformer
from osler.monitor.history import RunSettings
from osler.optim.build import set_hyperparameters
from osler.optim.schedule import lr_scale, warmup_of
from osler.rl.config import GrpoConfig
from osler.rl.rollout import Group, RolloutWorker, count_tokens, prompts_asked, rollout_metrics
from osler.rl.step import training_rows, update_policy
from osler.runs.loop import Due, Trainer
from osler.runs.micro_batch import MicroBatchLimit
from osler.runs.process import Learner, Run
from osler.tasks.item import ExamItem

# Metrics that exist only for steps in which rewards differed within a group, so that means and alert rules count no other steps.
OF_LEARNING = ("loss", "loss/drift", "grad/clipped_frac")


class GrpoTrainer(Trainer):
    """Asks the questions of ``worker`` and learns from the answers.

    The engine of ``learner`` wraps a ``step.PolicyLoss`` of the model that ``worker`` draws from. Evaluations sit the ``exam``.
    """

    config: GrpoConfig
    tokens = 0  # completion tokens sampled

    def __init__(
        self, config: GrpoConfig, run: Run, learner: Learner, worker: RolloutWorker, exam: Sequence[ExamItem] = ()
    ) -> None:
        super().__init__(config, run, learner, total=config.steps)
        self.worker, self.exam = worker, exam
        self.micro_batch_limit = MicroBatchLimit(learner, config.micro_batch_tokens, run, lambda: self.step + 1)
        self.exam_name = getattr(config.eval_task, "split", "") or getattr(config.eval_task, "exam", "")
        self.best_metric = f"eval/{self.exam_name}_accuracy" if self.exam_name else ""
        self.reference: Transformer | None = None  # for the KL term; nothing trains it
        if config.algorithm.beta > 0.0:
            self.reference = deepcopy(learner.engine.plain_model(learner.model)).eval().requires_grad_(False)
        self.task_tokens = Counter[str]()  # completion tokens of each task's groups
        self.asked: list[str] = []  # the ids of the latest step's questions

    def settings(self) -> RunSettings:
        config = self.config
        return replace(
            super().settings(),
            warmup_tokens=warmup_of(config.schedule, config.budget_tokens),
            max_new_tokens=config.algorithm.max_new_tokens,
            zero_reward_patience=config.zero_reward_patience,
        )

    def advance(self) -> dict[str, float]:
        """Ask the questions of the current step, learn from the answers, and count the step as done."""
        config = self.config
        algorithm = self.config.algorithm
        started = time.perf_counter()
        with self._whole_model():
            groups, sampled_tokens = self.worker.step(self.step + self.incidents.data_offset)
        rollout_seconds = time.perf_counter() - started
        self.asked = [group.prompt.item.id for group in groups]
        metrics = rollout_metrics(groups)

        budget = config.budget_tokens_per_step
        optimizer = self.learner.optimizer
        middle = self.step * budget + budget // 2  # in tokens; as in train/, so that first and last step have a rate above 0
        scale = lr_scale(config.schedule, middle, config.budget_tokens)
        set_hyperparameters(optimizer, config.optim, scale, middle, config.budget_tokens, 0.0)
        algorithm = replace(algorithm, beta=algorithm.beta * lr_scale(algorithm.beta_schedule, middle, config.budget_tokens))
        rows = training_rows(groups, algorithm)
        self.collector.begin(self.step + 1)
        update: dict[str, float] = {}
        if rows:  # there are none when the quality filter dropped every sample
            update = update_policy(
                self.learner,
                rows,
                algorithm,
                reference=self.reference if algorithm.beta > 0.0 else None,
                micro_batch_limit=self.micro_batch_limit,
                collector=self.collector,
            )
        self.step += 1
        self.tokens += sampled_tokens
        refresh = algorithm.reference_refresh_steps
        if self.reference is not None and refresh and self.step % refresh == 0:
            self.reference.load_state_dict(self.learner.engine.whole_weights(self.learner.model))

        seconds = time.perf_counter() - started
        if metrics["frac_reward_zero_std"] == 1.0:  # only the KL term had a gradient, if any, so rewards taught nothing
            update = {name: value for name, value in update.items() if name not in OF_LEARNING}
        lengths = [row.tokens for row in rows if row.has_gradient(algorithm.beta)]
        metrics |= {
            **update,
            **self.collector.line(),
            **self._consumed(groups),
            **(self._speed(lengths, update["opsm/updates"], seconds - rollout_seconds) if lengths else {}),
            "perf/eta_seconds": (config.steps - self.step) * seconds,
            "train/lr": optimizer.param_groups[0]["lr"],
            "perf/step_seconds": seconds,
            "perf/rollout_frac": rollout_seconds / seconds,
            "perf/rollout_tokens_per_second": sampled_tokens / rollout_seconds,
        }
        self._observe(metrics)
        return metrics

    def shown(self, metrics: Mapping[str, float]) -> dict[str, str]:
        return {"reward": f"{metrics['reward']:.3f}"}

    def due(self) -> Due:
        config = self.config
        return Due(
            save=self.crossed(config.checkpoint.every_steps),
            milestone=self.crossed(config.checkpoint.keep_every_steps),
            evaluation=bool(self.best_metric) and (self.step == 0 or self.crossed(config.eval_every_steps)),
        )

    @contextmanager
    def _whole_model(self) -> Iterator[None]:
        """Give the sampler the current model, neither sharded nor wrapped, for the context; no copy is kept after it."""
        sampler = self.worker.engine
        sampler.model = self.learner.engine.plain_model(self.learner.model)
        try:
            yield
        finally:
            sampler.model = self.learner.model

    def _speed(self, lengths: Sequence[int], updates: float, seconds: float) -> dict[str, float]:
        """Return the speed of the updates on rows of these lengths, and its share of the GPUs' peak."""
        speed = sum(lengths) * updates / seconds
        # A token costs attention over its row, so the mean is over tokens.
        seq_len = round(sum(length**2 for length in lengths) / sum(lengths))
        return {"perf/train_tokens_per_second": speed, **self.collector.mfu(speed, seq_len)}

    def _consumed(self, groups: Sequence[Group]) -> dict[str, float]:
        """Return metrics of the epochs over the questions after the latest step; ``groups`` are the groups of that step."""
        tasks = self.worker.tasks
        for group in groups:
            self.task_tokens[group.prompt.task.name] += count_tokens([group])
        asked = prompts_asked(tasks, self.step + self.incidents.data_offset, self.config.algorithm.prompts_per_step)
        of_epoch = {task.name: len(task.items) for task in tasks}
        weights = {task.name: task.weight for task in tasks}
        resting = sum(map(len, self.worker.resting(self.step + self.incidents.data_offset).values()))
        by_task = source_metrics(tokens=self.task_tokens, consumed=asked, of_epoch=of_epoch, target=weights)
        return {"data/epoch": sum(asked.values()) / sum(of_epoch.values()), "groups/resting": float(resting), **by_task}

    def _observe(self, metrics: Mapping[str, float]) -> None:
        """Look for incidents, but not in a step without a usable sample, nor in one whose rewards are all equal."""
        norm = metrics.get("train/grad_norm")
        if norm is not None and (metrics["frac_reward_zero_std"] < 1.0 or not math.isfinite(norm)):
            skipped = metrics["train/skipped_steps"] >= metrics["opsm/updates"]
            loss, drift = metrics.get("loss", math.nan), metrics.get("loss/drift")
            self.incidents.observe(self.step, loss, norm, skipped=skipped, drift=drift)

    def details(self, step: int) -> dict[str, Any]:
        """Return the details of an incident at ``step``, which is the latest step."""
        return {"tokens": self.tokens, "lr": self.learner.optimizer.param_groups[0]["lr"], "questions": self.asked}

    def evaluate(self) -> dict[str, float]:
        config, worker = self.config, self.worker
        with self._whole_model():
            score = partial(
                score_by_generation,
                worker.engine,
                worker.tokenizer,
                sampling=greedy(config.algorithm.max_new_tokens),
                reasoning=config.tasks[0].reasoning,
            )
            right, unread = shared_exam(
                score, self.exam, self.world, permutations=config.eval_permutations, seed=config.seed
            )
        return {self.best_metric: right, f"eval/{self.exam_name}_unparsed_frac": unread}

    def state(self) -> dict[str, Any]:
        return {"task_tokens": dict(self.task_tokens), "rests": deepcopy(self.worker.rests)}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        # The reference is saved even if it is never refreshed, because a run folder must resume without ``init_from``.
        return {} if self.reference is None else {"reference": dict(self.reference.state_dict())}

    def restore(self, loaded: store.Loaded) -> None:
        super().restore(loaded)
        if self.reference is not None:
            self.reference.load_state_dict(loaded.tensors["reference"])
        self.tokens = loaded.state["tokens"]
        self.task_tokens = Counter(loaded.state["task_tokens"])
        self.worker.rests = loaded.state.get("rests", {})  # older checkpoints have none
