"""Rollouts: what a sample records, how rewards and filters meet, refills, and the names of the metrics."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest

from osler.inference.engine import InferenceEngine
from osler.monitor.metrics import declared_name
from osler.rl.config import AlgorithmConfig, QualityConfig
from osler.rl.rollout import (
    RewardTerm,
    RlTask,
    RolloutWorker,
    apply_filters,
    check_sample,
    count_tokens,
    prompts_asked,
    refill_prompts,
    repeated_ngram_frac,
    rollout_metrics,
    rollout_seed,
    step_prompts,
    task_shares,
)
from osler.rl.step import training_rows
from osler.runtime.errors import UserError
from osler.tasks.item import ExamItem

OFF = QualityConfig(action="off")


@pytest.mark.parametrize(
    ("text", "reward", "verdict", "letter"),
    [
        ("because|cat (C)$", 1.0, "ok", 2),
        ("because|ant (A)$", 0.0, "ok", 0),
        ("because|no idea$", 0.0, "no_answer", None),
        ("because$", 0.0, "no_answer", None),
        ("$", 0.0, "empty", None),
        ("pain " * 40 + "|cat (C)$", 0.0, "degenerate", 2),
    ],
)
def test_a_completion_is_read_and_rewarded(group_of, text, reward, verdict, letter):
    (sample,) = group_of(text).samples
    assert (sample.reward, sample.verdict, sample.reading.choice, sample.stays) == (reward, verdict, letter, True)
    assert sample.rewards == {"correct": float(letter == 2)} and sample.reading.right == (letter == 2)


def test_rewards_add_up_by_weight_and_are_kept_raw(group_of):
    rewards = (RewardTerm("a", lambda i, c: 1.0, 0.5), RewardTerm("b", lambda i, c: 2.0, 0.25))
    (kept,) = group_of("hm$", rewards=rewards, algorithm=AlgorithmConfig(quality=OFF)).samples
    (zeroed,) = group_of("hm$", rewards=rewards).samples
    assert (kept.reward, zeroed.reward) == (1.0, 0.0)
    assert zeroed.rewards == kept.rewards == {"a": 1.0, "b": 2.0}


@pytest.mark.parametrize(
    ("algorithm", "texts", "rows"),
    [
        ({"quality": QualityConfig(action="drop")}, ["a|cat (C)$", "a|ant (A)$", "a|what$"], [(0.5, True), (-0.5, True)]),
        ({}, ["a|cat (C)$", "a|ant (A)$", "a|what$"], [(2 / 3, True), (-1 / 3, True), (-1 / 3, True)]),
        ({"quality": OFF, "overlong": "mask"}, ["a|cat (C)$", "a|ant (A)"], [(0.5, True), (-0.5, False)]),
    ],
    ids=["dropped samples are in no baseline", "bad ones stay in it", "cut ones stay in it without gradient"],
)
def test_what_becomes_of_bad_samples_in_the_update(group_of, algorithm, texts, rows):
    algorithm = AlgorithmConfig(**algorithm)
    found = training_rows([group_of(*texts, algorithm=algorithm)], algorithm)
    assert [(row.advantage, row.trained) for row in found] == [(pytest.approx(advantage), trained) for advantage, trained in rows]


def test_metrics_are_declared_and_count_by_hand(group_of):
    groups = [group_of("a|cat (C)$", "a|ant (A)$", "a|what$"), group_of(*["b|cat (C)$"] * 3)]
    metrics = rollout_metrics(groups)
    assert [name for name in metrics if declared_name(name) is None] == []
    assert metrics["reward"] == pytest.approx(4 / 6)
    assert metrics["frac_reward_zero_std"] == 0.5
    assert metrics["groups/effective"] == 1
    assert metrics["answer/format_ok"] == pytest.approx(5 / 6)
    assert [metrics[f"answer/letter_{letter}_frac"] for letter in "ABCD"] == pytest.approx([1 / 5, 0, 4 / 5, 0])
    assert metrics["filters/no_answer_frac"] == pytest.approx(1 / 6)
    assert metrics["completions/clipped_ratio"] == 0
    assert metrics["tasks/exam/correct_frac"] == pytest.approx(4 / 6)
    assert metrics["completions/mean_length"] == pytest.approx(count_tokens(groups) / 6)


@pytest.mark.parametrize(
    ("ids", "has_answer", "verdict"),
    [
        ([1, 2] * 10, True, "degenerate"),
        ([1, 2, 1, 2], True, "ok"),  # too short to call it running in circles
        (list(range(20)), False, "ok"),  # an answer may be optional
    ],
)
def test_verdicts(ids, has_answer, verdict):
    quality = QualityConfig(ngram=2, max_repeated_frac=0.5, min_tokens=6, require_answer=False)
    assert check_sample(ids, text_is_empty=False, has_answer=has_answer, quality=quality) == verdict


def test_repeated_ngram_frac_counts_by_hand():
    assert repeated_ngram_frac([1, 2, 3, 4], 2) == 0.0
    assert repeated_ngram_frac([1, 1, 1, 1, 1], 2) == pytest.approx(3 / 4)
    assert repeated_ngram_frac([1, 2, 1, 2, 1], 2) == pytest.approx(2 / 4)
    assert repeated_ngram_frac([1], 2) == 0.0


@pytest.mark.parametrize(
    ("options", "verdict", "finished", "filtered"),
    [
        ({}, "ok", True, (0.7, True, True)),
        ({}, "no_answer", True, (0.0, True, True)),
        ({"quality": QualityConfig(action="drop")}, "ok", True, (0.7, True, True)),
        ({"quality": QualityConfig(action="drop")}, "degenerate", True, (0.0, False, False)),
        ({"quality": OFF}, "empty", True, (0.7, True, True)),
        ({"overlong": "keep"}, "ok", False, (0.7, True, True)),
        ({"overlong": "mask"}, "ok", False, (0.7, True, False)),
        ({"overlong": "mask"}, "ok", True, (0.7, True, True)),
        ({"overlong": "penalise"}, "ok", False, (0.7 - 0.5, True, True)),
        ({"overlong": "penalise"}, "ok", True, (0.7, True, True)),
        ({"overlong": "penalise"}, "no_answer", False, (-0.5, True, True)),  # penalised from zero
    ],
)
def test_what_the_filters_do(options, verdict, finished, filtered):
    assert apply_filters(0.7, verdict, finished, AlgorithmConfig(**options)) == filtered


def worker(policy, tokenizer, task, **options):
    settings = {"prompts_per_step": 3, "samples_per_prompt": 4, "max_new_tokens": 12, "quality": OFF}
    algorithm = AlgorithmConfig(**{**settings, **options})
    return RolloutWorker(InferenceEngine(policy), tokenizer, [task], algorithm, seed=3)


def ids_of(groups):
    return [[sample.ids for sample in group.samples] for group in groups]


def test_a_step_is_a_function_of_seed_and_step(make_policy, tokenizer, short_task):
    first = worker(make_policy(), tokenizer, short_task)
    groups, tokens = first.step(4)
    assert tokens == count_tokens(groups)
    first.step(0)
    assert ids_of(first.step(4)[0]) == ids_of(groups)
    assert ids_of(first.step(5)[0]) != ids_of(groups)
    assert all(len(sample.ids) == len(sample.logprobs) for group in groups for sample in group.samples)
    assert all(sample.completion.finished == (sample.ids[-1] == tokenizer.eos_id) for group in groups for sample in group.samples)


def test_dynamic_sampling_replaces_groups_that_teach_nothing(make_policy, tokenizer, short_task):
    def rare(item, completion):
        return float(len(completion.thinking) % 5 == 0)

    task = replace(short_task, rewards=(RewardTerm("rare", rare),))
    settings = {"samples_per_prompt": 2, "prompts_per_step": 6}
    plain, plain_tokens = worker(make_policy(), tokenizer, task, **settings).step(0)
    refilled, tokens = worker(make_policy(), tokenizer, task, dynamic_sampling=True, max_refills=3, **settings).step(0)
    alive = [index for index, group in enumerate(plain) if group.effective]
    assert len(alive) < 6, "no group needs replacing, the test shows nothing"
    assert ids_of(refilled[index] for index in alive) == ids_of(plain[index] for index in alive)
    assert len(refilled) == 6
    assert sum(group.effective for group in refilled) > len(alive)
    assert tokens > plain_tokens


def test_refills_are_bounded_when_nothing_can_be_learned(make_policy, tokenizer, short_task):
    task = replace(short_task, rewards=(RewardTerm("constant", lambda item, completion: 1.0),))
    asking = worker(make_policy(), tokenizer, task, dynamic_sampling=True, max_refills=2, most_rested_epochs=1)
    groups, tokens = asking.step(0)
    assert len(groups) == 3 < len(asking.rests["short"])
    assert not any(group.effective for group in groups)
    assert count_tokens(groups) < tokens


# -- questions ---------------------------------------------------------------------------------------------------------


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


def test_balanced_letters_spread_the_right_answers_of_every_step():
    kept = ExamItem(id="kept", question="Which?", options=("ant", "bee", "All of the above"), answer_index=2)
    tasks = [task(20), replace(task(1, "kept"), items=(kept,), weight=0.25)]
    for step in range(8):
        plain, balanced = (step_prompts(tasks, 0, step, 10, balanced=way) for way in (False, True))
        assert [prompt.item.id for prompt in plain] == [prompt.item.id for prompt in balanced]
        for one, other in zip(plain, balanced, strict=True):
            assert sorted(one.item.options) == sorted(other.item.options)
            assert one.item.options[one.item.answer_index] == other.item.options[other.item.answer_index]
        letters = Counter(prompt.item.answer_index for prompt in balanced if prompt.item.id != "kept")
        assert set(letters.values()) == {2}
        assert [prompt.item for prompt in balanced if prompt.item.id == "kept"] == [kept] * 2


def test_shares_follow_the_weights_and_add_up():
    tasks = [task(name="a", weight=2.0), task(name="b", weight=1.0), task(name="c", weight=1.0)]
    assert task_shares(tasks, 8) == [4, 2, 2]
    assert sum(task_shares(tasks, 7)) == 7
    asked = Counter(prompt.task.name for step in range(7) for prompt in step_prompts(tasks, 0, step, 8))
    assert asked == prompts_asked(tasks, 7, 8) == {"a": 28, "b": 14, "c": 14}


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


def test_questions_that_teach_nothing_rest_ever_longer_and_others_are_asked_for_them(make_policy, tokenizer, short_task):
    """The samples of q0 always earn the same. Each step is an epoch of six questions, so q0 rests one, two, two, ... epochs."""

    def unequal(item, completion):
        return 0.0 if item.id == "q0" else term.function(item, completion)

    (term,) = short_task.rewards
    task = replace(short_task, rewards=(RewardTerm("unequal", unequal),))
    settings = {"prompts_per_step": 6, "samples_per_prompt": 2, "max_new_tokens": 8, "most_rested_epochs": 2}
    asking = worker(make_policy(), tokenizer, task, **settings)
    asked = []
    for step in range(8):
        if step == 4:  # a resumed run: nothing but what was saved
            asking, saved = worker(make_policy(), tokenizer, task, **settings), json.loads(json.dumps(asking.rests))
            asking.rests = saved
        asked.append([group.prompt.item.id for group in asking.step(step)[0]])
    assert [step for step, ids in enumerate(asked) if "q0" in ids] == [0, 2, 5]
    assert all(len(ids) == 6 for ids in asked)
    assert asking.rests["short"]["q0"] == [3, 7]


def test_refills_ask_no_question_that_rests_unless_all_do():
    tasks = [task(3, "a")]
    wanted = ["a"] * 12
    assert {prompt.item.id for prompt in refill_prompts(tasks, 0, 0, 1, wanted, {"a": {"a0", "a2"}})} == {"a1"}
    all_rest = refill_prompts(tasks, 0, 0, 1, wanted, {"a": {"a0", "a1", "a2"}})
    assert all_rest == refill_prompts(tasks, 0, 0, 1, wanted)
