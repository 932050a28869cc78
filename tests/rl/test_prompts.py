"""Which questions a step asks: epochs without repeats, shares by weight, options permuted, nothing remembered."""

from __future__ import annotations

from collections import Counter

import pytest

from osler.rl.rollout import RlTask, prompts_asked, refill_prompts, rollout_seed, step_prompts, task_shares
from osler.runtime.errors import UserError
from osler.tasks.item import ExamItem


def items(count, prefix="q"):
    return tuple(
        ExamItem(id=f"{prefix}{n}", question=f"Question {n}?", options=("w", "x", "y", "z"), answer_index=n % 4)
        for n in range(count)
    )


def task(count=10, name="exam", weight=1.0):
    return RlTask(name, items(count, name), (), weight)


def test_an_epoch_asks_every_item_once_and_the_next_in_another_order():
    asked = [prompt.item.id for step in range(4) for prompt in step_prompts([task(10)], 7, step, 5)]
    assert sorted(asked[:10]) == sorted(asked[10:]) == sorted(item.id for item in items(10, "exam"))
    assert asked[:10] != asked[10:]


def test_what_was_walked_through_is_what_the_steps_asked():
    tasks = [task(10, "exam", 2.0), task(3, "drill")]
    asked = Counter(prompt.task.name for step in range(7) for prompt in step_prompts(tasks, 1, step, 5))
    assert prompts_asked(tasks, 7, 5) == asked


def test_a_step_depends_on_seed_and_step_alone():
    tasks = [task(10)]
    later_first = step_prompts(tasks, 7, 3, 4)
    for step in range(3):
        step_prompts(tasks, 7, step, 4)
    assert step_prompts(tasks, 7, 3, 4) == later_first
    assert step_prompts(tasks, 8, 3, 4) != later_first


def test_options_are_permuted_on_every_visit_and_the_answer_moves_along():
    tasks = [task(1)]
    original = tasks[0].items[0]
    seen = Counter()
    for step in range(400):
        (prompt,) = step_prompts(tasks, 0, step, 1)
        assert sorted(prompt.item.options) == sorted(original.options)
        assert prompt.item.options[prompt.item.answer_index] == original.options[original.answer_index]
        seen[prompt.item.answer_index] += 1
    assert set(seen) == {0, 1, 2, 3}
    assert all(60 < count < 140 for count in seen.values())


def test_shares_follow_the_weights_and_add_up():
    tasks = [task(name="a", weight=2.0), task(name="b", weight=1.0), task(name="c", weight=1.0)]
    assert task_shares(tasks, 8) == [4, 2, 2]
    assert sum(task_shares(tasks, 7)) == 7
    assert Counter(prompt.task.name for prompt in step_prompts(tasks, 0, 5, 8)) == {"a": 4, "b": 2, "c": 2}


def test_a_task_that_would_never_be_asked_is_refused():
    with pytest.raises(UserError, match=r"rare.*prompts_per_step"):
        task_shares([task(name="often", weight=100.0), task(name="rare", weight=1.0)], 4)
    with pytest.raises(UserError, match="no items"):
        task_shares([task(0)], 4)


def test_refills_ask_the_named_tasks_and_leave_the_main_walk_alone():
    tasks = [task(name="a"), task(name="b")]
    main = step_prompts(tasks, 0, 1, 4)
    first = refill_prompts(tasks, 0, 0, 1, ["b", "a", "b"])
    assert [prompt.task.name for prompt in first] == ["b", "a", "b"]
    assert refill_prompts(tasks, 0, 0, 1, ["b", "a", "b"]) == first
    assert refill_prompts(tasks, 0, 0, 2, ["b", "a", "b"]) != first
    assert step_prompts(tasks, 0, 1, 4) == main


def test_rollout_seeds_differ():
    seeds = {rollout_seed(seed, step, refill) for seed in range(3) for step in range(10) for refill in range(3)}
    assert len(seeds) == 90
    assert all(0 <= seed < 2**63 for seed in seeds)
