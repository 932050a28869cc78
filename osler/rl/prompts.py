"""Which questions a step asks: a pure function of (seed, step), so resuming needs no memory of the order.

Every task goes through its own items epoch by epoch, in a new order each epoch; the weights fix its share of a step. The
options of an item are permuted each time it is asked, because with a fixed order the cheapest gain is to learn letters by
heart. Refills of dynamic sampling go through orders of their own, so they never shift the main order.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from osler.runtime.errors import UserError
from osler.tasks.item import ExamItem, permute
from osler.tokenizer.chat import Completion


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


def step_prompts(tasks: Sequence[RlTask], seed: int, step: int, count: int) -> list[Prompt]:
    """Return the ``count`` questions of a step."""
    return [
        _prompt(task, seed, step * share + place, "main")
        for task, share in zip(tasks, task_shares(tasks, count), strict=True)
        for place in range(share)
    ]


def prompts_asked(tasks: Sequence[RlTask], steps: int, count: int) -> dict[str, int]:
    """Return how many questions of each task the first ``steps`` steps of ``count`` questions ask, refills not counted."""
    return {task.name: steps * share for task, share in zip(tasks, task_shares(tasks, count), strict=True)}


def refill_prompts(tasks: Sequence[RlTask], seed: int, step: int, refill: int, wanted: Sequence[str]) -> list[Prompt]:
    """Return one more question for each task name in ``wanted``, for the ``refill``-th refill of a step."""
    by_name = {task.name: task for task in tasks}
    start = random.Random(f"{seed}:{step}:{refill}").randrange(1 << 40)
    return [_prompt(by_name[name], seed, start + place, "refill") for place, name in enumerate(wanted)]


def task_shares(tasks: Sequence[RlTask], count: int) -> list[int]:
    """Split ``count`` prompts over the tasks in proportion to their weights (largest remainder).

    Raises UserError when a task would never be asked or has no items.
    """
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


def _prompt(task: RlTask, seed: int, position: int, order: str) -> Prompt:
    epoch, place = divmod(position, len(task.items))
    item = task.items[_order(seed, task.name, order, epoch, len(task.items))[place]]
    # A position is unique within its order; even and odd numbers keep the permutations of the two orders apart.
    return Prompt(task, permute(item, seed, 2 * position + (order == "refill")))


@functools.lru_cache(maxsize=8)
def _order(seed: int, name: str, order: str, epoch: int, size: int) -> list[int]:
    indices = list(range(size))
    random.Random(f"{seed}:{name}:{order}:{epoch}").shuffle(indices)
    return indices
