"""Rollouts: which questions a step asks, and their answers as groups of scored samples.

The questions and the random numbers are a pure function of (seed, step) and of the questions that rest. Every task goes through
its own items epoch by epoch, in a new order each epoch; the weights fix its share of a step. The options of an item are permuted
each time it is asked, because with a fixed order the easiest gain is to learn letters by heart. Dynamic sampling replaces whole
groups by refills; the refills have orders of their own, so the main order never shifts.

A question rests when its latest samples all earned the same (``algorithm.most_rested_epochs``). Another question is asked in its
place, so the order itself does not change. To resume, a run needs to know which questions rest, and nothing else.

The sample-quality filter is separate from the reward: it looks at the form of a completion (is it empty, does it run in circles,
does it hold an answer that can be read) and never at whether the answer is right.

Every rank asks its share of the questions and sends its samples to the others. So all ranks know all groups and compute the same
metrics, advantages and refills, whatever their number. Only the sampling masks, which are large, stay on the rank that drew them.
"""

from __future__ import annotations

import functools
import hashlib
import random
import statistics
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from torch import Tensor

from osler.inference.engine import InferenceEngine
from osler.rl.config import AlgorithmConfig, QualityConfig
from osler.rl.servers import RolloutServers
from osler.runtime.errors import UserError
from osler.runtime.world import World
from osler.tasks.answers import Reading, read_answer
from osler.tasks.item import LETTERS, ExamItem, permute, render_question, reorder
from osler.tokenizer.bpe import Tokenizer
from osler.tokenizer.chat import Completion, encode_prompt, parse_completion

Resting = Mapping[str, Set[str]]  # the ids of the items that rest, by task
NONE_REST: Resting = {}


class RewardTerm(NamedTuple):
    """One pure reward function of (item, completion) and how much it counts in the total."""

    name: str
    function: Callable[[ExamItem, Completion], float]
    weight: float = 1.0


@dataclass(frozen=True)
class RlTask:
    """Items to ask, with their rewards and their share of every step; ``reasoning`` picks the prompt's last marker."""

    name: str
    items: tuple[ExamItem, ...]
    rewards: tuple[RewardTerm, ...]
    weight: float = 1.0
    reasoning: bool = True


class Prompt(NamedTuple):
    """A question as it is asked this time: the item with its options in this time's order."""

    task: RlTask
    item: ExamItem


def step_prompts(
    tasks: Sequence[RlTask], seed: int, step: int, count: int, *, balanced: bool = False, resting: Resting = NONE_REST
) -> list[Prompt]:
    """Return the ``count`` questions of a step; if ``balanced``, their right answers have the letters in turn."""
    prompts = [
        _prompt(task, seed, step * share + place, "main", resting)
        for task, share in zip(tasks, task_shares(tasks, count), strict=True)
        for place in range(share)
    ]
    if not balanced:
        return prompts
    return [prompt._replace(item=_with_answer_at(prompt.item, step + number)) for number, prompt in enumerate(prompts)]


def _with_answer_at(item: ExamItem, place: int) -> ExamItem:
    """Swap the right option with the one at ``place`` (modulo their number), unless the options keep their order."""
    if item.keeps_order or not item.options:
        return item
    order = list(range(len(item.options)))
    place %= len(order)
    order[place], order[item.answer_index] = order[item.answer_index], order[place]
    return reorder(item, order)


def prompts_asked(tasks: Sequence[RlTask], steps: int, count: int) -> dict[str, int]:
    """Return how many questions of each task the first ``steps`` steps of ``count`` questions ask, refills not counted."""
    return {task.name: steps * share for task, share in zip(tasks, task_shares(tasks, count), strict=True)}


def refill_prompts(
    tasks: Sequence[RlTask], seed: int, step: int, refill: int, wanted: Sequence[str], resting: Resting = NONE_REST
) -> list[Prompt]:
    """Return one more question for each task name in ``wanted``, for the ``refill``-th refill of a step."""
    by_name = {task.name: task for task in tasks}
    start = random.Random(f"{seed}:{step}:{refill}").randrange(1 << 40)
    return [_prompt(by_name[name], seed, start + place, "refill", resting) for place, name in enumerate(wanted)]


def task_shares(tasks: Sequence[RlTask], count: int) -> list[int]:
    """Split ``count`` prompts over the tasks by their weights (largest remainder); UserError when a task would get none."""
    total = sum(task.weight for task in tasks)
    exact = [count * task.weight / total for task in tasks]
    shares = [int(value) for value in exact]
    by_remainder = sorted(range(len(tasks)), key=lambda index: shares[index] - exact[index])
    for index in by_remainder[: count - sum(shares)]:
        shares[index] += 1
    for task, share in zip(tasks, shares, strict=True):
        if not task.items:
            raise UserError(f"Task {task.name} has no items to train on; check its split and its limit.")
        if share == 0:
            raise UserError(
                f"Task {task.name} with weight {task.weight:g} of {total:g} gets none of the {count} prompts of a "
                "step; raise algorithm.prompts_per_step or the task's weight, or leave the task out."
            )
    return shares


def rollout_seed(seed: int, step: int, refill: int = 0) -> int:
    """Return the sampler's seed for a rollout: 63 bits that depend on all three numbers."""
    return int.from_bytes(hashlib.sha256(f"rollout:{seed}:{step}:{refill}".encode()).digest()[:8], "big") >> 1


def _prompt(task: RlTask, seed: int, position: int, order: str, resting: Resting) -> Prompt:
    epoch, place = divmod(position, len(task.items))
    item = task.items[_order(seed, task.name, order, epoch, len(task.items))[place]]
    if item.id in resting.get(task.name, ()):
        awake = [other for other in task.items if other.id not in resting[task.name]]
        item = random.Random(f"{seed}:{task.name}:{order}:{position}").choice(awake or [item])
    # A position is unique within its order; even and odd numbers keep the permutations of the two orders apart.
    return Prompt(task, permute(item, seed, 2 * position + (order == "refill")))


@functools.lru_cache(maxsize=8)
def _order(seed: int, name: str, order: str, epoch: int, size: int) -> list[int]:
    indices = list(range(size))
    random.Random(f"{seed}:{name}:{order}:{epoch}").shuffle(indices)
    return indices


Verdict = Literal["ok", "empty", "degenerate", "no_answer"]
BAD_VERDICTS: tuple[Verdict, ...] = ("empty", "degenerate", "no_answer")


@dataclass(frozen=True)
class Sample:
    """One completion; ``ids`` include the end-of-text token if the model produced it, and each id has its log-probability.

    ``rewards`` are the raw values by name; ``reward`` is their weighted sum after the filters. ``stays`` tells whether the sample
    stays in its group, ``trained`` whether its tokens get a gradient.

    ``sampling_mask`` has a bit for each word that a token could be drawn from, uint8 ``[len(ids), ceil(V / 8)]``; None: all.
    Only the rank ``sampled_by_rank`` has the mask, so only that rank can learn from the sample; None: every rank can.
    """

    ids: list[int]
    logprobs: list[float]
    completion: Completion
    reading: Reading
    rewards: dict[str, float]
    verdict: Verdict
    reward: float
    stays: bool
    trained: bool
    sampling_mask: Tensor | None = None
    sampled_by_rank: int | None = None


@dataclass(frozen=True)
class Group:
    """One question and its samples."""

    prompt: Prompt
    prompt_ids: list[int]
    samples: list[Sample]

    @property
    def effective(self) -> bool:
        """Whether the staying samples earned different rewards, so that there is something to learn."""
        return len({sample.reward for sample in self.samples if sample.stays}) > 1


@dataclass
class RolloutWorker:
    """Asks the policy a step's questions and scores its answers."""

    engine: InferenceEngine
    tokenizer: Tokenizer
    tasks: Sequence[RlTask]
    algorithm: AlgorithmConfig
    seed: int
    world: World = field(default_factory=World)
    # by task and item id: how often in a row all samples earned the same, and the last epoch of the rest; goes into JSON
    rests: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    servers: RolloutServers | None = None  # draw in place of the engine

    def step(self, step: int) -> tuple[list[Group], int]:
        """Return the groups of a step and how many completion tokens were sampled for them, those of refills included."""
        algorithm = self.algorithm
        groups = self.ask(step)
        sampled_tokens = count_tokens(groups)
        asked = list(groups)
        resting = self.resting(step)
        for refill in range(1, algorithm.max_refills + 1 if algorithm.dynamic_sampling else 1):
            dead = [index for index, group in enumerate(groups) if not group.effective]
            if not dead:
                break
            wanted = [groups[index].prompt.task.name for index in dead]
            more = refill_prompts(self.tasks, self.seed, step, refill, wanted, resting)
            fresh = self.sample(more, rollout_seed(self.seed, step, refill))
            asked += fresh
            sampled_tokens += count_tokens(fresh)
            for index, group in zip(dead, fresh, strict=True):
                if group.effective:  # a group that no refill could replace stays, to keep the size of the batch
                    groups[index] = group
        if algorithm.most_rested_epochs:
            self._let_rest(asked, self.epochs(step))
        return groups, sampled_tokens

    def epochs(self, step: int) -> dict[str, int]:
        """Return the epoch of each task at the beginning of a step."""
        asked = prompts_asked(self.tasks, step, self.algorithm.prompts_per_step)
        return {task.name: asked[task.name] // len(task.items) for task in self.tasks}

    def resting(self, step: int) -> dict[str, set[str]]:
        """Return the ids of the items that are left out of a step, by task."""
        return {
            name: {item for item, (_, last_epoch) in self.rests.get(name, {}).items() if last_epoch >= epoch}
            for name, epoch in self.epochs(step).items()
        }

    def _let_rest(self, asked: Sequence[Group], epochs: Mapping[str, int]) -> None:
        """Let each question rest whose samples all earned the same, and forget the earlier rests of other questions asked."""
        for group in asked:
            name, item = group.prompt.task.name, group.prompt.item.id
            own = self.rests.setdefault(name, {})
            in_a_row = own.pop(item, [0])[0] + 1
            if not group.effective:
                own[item] = [in_a_row, epochs[name] + min(in_a_row, self.algorithm.most_rested_epochs)]

    def ask(self, step: int) -> list[Group]:
        """Return the groups of a step's own questions, before any refill."""
        algorithm = self.algorithm
        count, balanced = algorithm.prompts_per_step, algorithm.balanced_letters
        asked = step_prompts(self.tasks, self.seed, step, count, balanced=balanced, resting=self.resting(step))
        return self.sample(asked, rollout_seed(self.seed, step))

    def sample(self, asked: Sequence[Prompt], seed: int) -> list[Group]:
        """Draw and score ``samples_per_prompt`` completions for every question, all ranks together."""
        world, algorithm, tokenizer, size = self.world, self.algorithm, self.tokenizer, self.algorithm.samples_per_prompt
        first, end = (len(asked) * rank // world.size for rank in (world.rank, world.rank + 1))
        prompts = [encode_prompt(tokenizer, render_question(prompt.item), reasoning=prompt.task.reasoning) for prompt in asked]
        drawn = (self.servers or self.engine).generate(
            prompts[first:end],
            replace(algorithm.sampling, stop_ids=(tokenizer.eos_id,), seed=seed),
            samples_per_prompt=size,
            first_row=first * size,
        )
        own = [
            score(tokenizer, asked[first + row // size], completion.ids, completion.logprobs, algorithm)
            for row, completion in enumerate(drawn)
        ]
        if masked := any(completion.packed_masks is not None for completion in drawn):
            own = [replace(sample, sampled_by_rank=world.rank) for sample in own]
        parts = world.all_gather(own)
        if masked:
            pairs = zip(own, drawn, strict=True)
            parts[world.rank] = [replace(sample, sampling_mask=completion.packed_masks) for sample, completion in pairs]
        samples = [sample for part in parts for sample in part]
        return [
            Group(prompt, prompt_ids, samples[number * size : (number + 1) * size])
            for number, (prompt, prompt_ids) in enumerate(zip(asked, prompts, strict=True))
        ]


def score(tokenizer: Tokenizer, prompt: Prompt, ids: list[int], logprobs: list[float], algorithm: AlgorithmConfig) -> Sample:
    """Read one completion, reward it, and apply the sample filters."""
    completion = parse_completion(tokenizer, ids, reasoning=prompt.task.reasoning)
    rewards = {term.name: float(term.function(prompt.item, completion)) for term in prompt.task.rewards}
    total = sum(term.weight * rewards[term.name] for term in prompt.task.rewards)
    reading = read_answer(prompt.item, completion)
    verdict = check_sample(
        ids[:-1] if completion.finished else ids,
        text_is_empty=not completion.thinking and not completion.answer,
        has_answer=reading.readable,
        quality=algorithm.quality,
    )
    filtered = apply_filters(total, verdict, completion.finished, algorithm)
    return Sample(ids, logprobs, completion, reading, rewards, verdict, *filtered)


def check_sample(completion_ids: Sequence[int], *, text_is_empty: bool, has_answer: bool, quality: QualityConfig) -> Verdict:
    """Return the first reason why a completion is a bad sample, or "ok".

    ``completion_ids`` come without the end-of-text token; ``has_answer`` says that an answer could be parsed, right or wrong.
    """
    if not completion_ids or text_is_empty:
        return "empty"
    long_enough = len(completion_ids) >= quality.min_tokens
    if long_enough and repeated_ngram_frac(completion_ids, quality.ngram) > quality.max_repeated_frac:
        return "degenerate"
    if quality.require_answer and not has_answer:
        return "no_answer"
    return "ok"


def repeated_ngram_frac(ids: Sequence[int], ngram: int) -> float:
    """Return the fraction of the n-grams of ``ids`` that occurred earlier in them, in [0, 1); 0 when there are none."""
    count = len(ids) - ngram + 1
    if count <= 0:
        return 0.0
    return 1.0 - len({tuple(ids[i : i + ngram]) for i in range(count)}) / count


def apply_filters(reward: float, verdict: Verdict, finished: bool, algorithm: AlgorithmConfig) -> tuple[float, bool, bool]:
    """Apply the quality action, then the overlong rule; return the reward, and whether the sample stays and is trained on.

    A dropped sample leaves its group: it is in no statistic, no loss and no denominator. A cut sample under
    ``overlong: mask`` stays in the baseline and the denominators and gets no gradient.
    """
    action = algorithm.quality.action
    bad = verdict != "ok" and action != "off"
    reward = 0.0 if bad else reward
    if not finished and algorithm.overlong == "penalise":
        reward -= algorithm.overlong_penalty
    stays = not (bad and action == "drop")
    return reward, stays, stays and (finished or algorithm.overlong != "mask")


def count_tokens(groups: Sequence[Group]) -> int:
    """Return the number of completion tokens in the groups."""
    return sum(len(sample.ids) for group in groups for sample in group.samples)


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Return the metrics of a batch of groups, under the names of ``monitor/metrics.py``."""
    samples = [sample for group in groups for sample in group.samples]
    count, lengths = len(samples), [len(sample.ids) for sample in samples]
    effective = sum(group.effective for group in groups)
    metrics = {
        "reward": statistics.fmean(sample.reward for sample in samples),
        "reward_std": statistics.fmean(_spread([sample.reward for sample in group.samples]) for group in groups),
        "frac_reward_zero_std": 1.0 - effective / len(groups),
        "groups/effective": float(effective),
        "completions/mean_length": statistics.fmean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": sum(not sample.completion.finished for sample in samples) / count,
        "answer/format_ok": sum(sample.reading.readable for sample in samples) / count,
        "answer/correct_frac": sum(sample.reading.right for sample in samples) / count,
    }
    for verdict in BAD_VERDICTS:
        metrics[f"filters/{verdict}_frac"] = sum(sample.verdict == verdict for sample in samples) / count
    for name in sorted({name for sample in samples for name in sample.rewards}):
        values = [sample.rewards[name] for sample in samples if name in sample.rewards]
        metrics |= {f"rewards/{name}/mean": statistics.fmean(values), f"rewards/{name}/std": _spread(values)}
    # How often each letter is answered: the alarm for "always C".
    read = [sample.reading.choice for sample in samples if sample.reading.choice is not None]
    for index in range(max(len(group.prompt.item.options) for group in groups)):
        metrics[f"answer/letter_{LETTERS[index]}_frac"] = read.count(index) / max(1, len(read))
    for task in sorted({group.prompt.task.name for group in groups}):
        own = [sample for group in groups if group.prompt.task.name == task for sample in group.samples]
        metrics[f"tasks/{task}/reward"] = statistics.fmean(sample.reward for sample in own)
        metrics[f"tasks/{task}/correct_frac"] = sum(sample.reading.right for sample in own) / len(own)
    return metrics


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
