"""Rollouts: what a sample records, how rewards and filters meet, refills, and the names of the metrics."""

from __future__ import annotations

from dataclasses import replace

import pytest

from osler.inference.engine import InferenceEngine
from osler.monitor.metrics import declared_name
from osler.rl.config import AlgorithmConfig, QualityConfig
from osler.rl.rollout import (
    Group,
    Prompt,
    RewardTerm,
    RlTask,
    RolloutWorker,
    apply_filters,
    check_sample,
    count_tokens,
    repeated_ngram_frac,
    rollout_metrics,
    score,
)
from osler.rl.step import training_rows
from osler.tasks.item import ExamItem
from osler.tasks.rewards import REWARDS
from osler.tokenizer.bpe import ANSWER

ITEM = ExamItem(id="q", question="Which drug?", options=("ant", "bee", "cat", "dog"), answer_index=2)
NUMBER = ExamItem(id="n", question="How many?", options=(), answer_index=-1, answer="72")
OFF = QualityConfig(action="off")


def sample_of(tokenizer, text, *, item=ITEM, ended=True, algorithm=None, rewards=("correct",)):
    """Score a completion written by hand: thinking and answer split by ``|``."""
    thinking, bar, answer = text.partition("|")
    ids = tokenizer.encode(thinking)
    if bar:
        ids += [tokenizer.special_id(ANSWER), *tokenizer.encode(answer)]
    ids += [tokenizer.eos_id] if ended else []
    task = RlTask("exam", (item,), tuple(RewardTerm(name, REWARDS[name]) for name in rewards))
    return score(tokenizer, Prompt(task, item), ids, [-1.0] * len(ids), algorithm or AlgorithmConfig())


@pytest.mark.parametrize(
    ("text", "item", "reward", "verdict", "letter"),
    [
        ("because|cat (C)", ITEM, 1.0, "ok", 2),
        ("because|ant (A)", ITEM, 0.0, "ok", 0),
        ("because|no idea", ITEM, 0.0, "no_answer", None),
        ("because", ITEM, 0.0, "no_answer", None),
        ("", ITEM, 0.0, "empty", None),
        ("six times twelve|72", NUMBER, 1.0, "ok", None),
        ("six times twelve|many", NUMBER, 0.0, "no_answer", None),
    ],
)
def test_a_completion_is_read_and_rewarded(tokenizer, text, item, reward, verdict, letter):
    sample = sample_of(tokenizer, text, item=item)
    assert (sample.reward, sample.verdict, sample.reading.choice) == (reward, verdict, letter)
    assert sample.reading.right == bool(reward)


def test_rewards_add_up_by_weight_and_are_kept_raw(tokenizer):
    task = RlTask("exam", (ITEM,), (RewardTerm("a", lambda i, c: 1.0, 0.5), RewardTerm("b", lambda i, c: 2.0, 0.25)))
    ids = [*tokenizer.encode("hm"), tokenizer.eos_id]
    kept = score(tokenizer, Prompt(task, ITEM), ids, [], AlgorithmConfig(quality=OFF))
    assert kept.reward == 1.0
    zeroed = score(tokenizer, Prompt(task, ITEM), ids, [], AlgorithmConfig())
    assert zeroed.reward == 0.0
    assert zeroed.rewards == kept.rewards == {"a": 1.0, "b": 2.0}


def test_degenerate_samples_lose_their_reward(tokenizer):
    sample = sample_of(tokenizer, "pain " * 40 + "|cat (C)")
    assert sample.rewards == {"correct": 1.0}
    assert (sample.verdict, sample.reward, sample.stays) == ("degenerate", 0.0, True)


def group_of(tokenizer, texts, **options):
    task = RlTask("exam", (ITEM,), (RewardTerm("correct", REWARDS["correct"]),))
    return Group(Prompt(task, ITEM), [1, 2], [sample_of(tokenizer, text, **options) for text in texts])


def test_dropped_samples_are_in_no_baseline_and_no_row(tokenizer):
    algorithm = AlgorithmConfig(quality=QualityConfig(action="drop"), samples_per_prompt=3)
    group = group_of(tokenizer, ["a|cat (C)", "a|ant (A)", "a|what"], algorithm=algorithm)
    rows = training_rows([group], algorithm)
    assert [row.advantage for row in rows] == [0.5, -0.5]
    zeroing = AlgorithmConfig(samples_per_prompt=3)
    rows = training_rows([group_of(tokenizer, ["a|cat (C)", "a|ant (A)", "a|what"])], zeroing)
    assert [row.advantage for row in rows] == pytest.approx([2 / 3, -1 / 3, -1 / 3])


def test_cut_samples_keep_their_place_in_the_baseline_without_gradient(tokenizer):
    algorithm = AlgorithmConfig(overlong="mask", quality=OFF)
    samples = [sample_of(tokenizer, "a|cat (C)", algorithm=algorithm)]
    samples.append(sample_of(tokenizer, "a|ant (A)", ended=False, algorithm=algorithm))
    rows = training_rows([Group(Prompt(RlTask("exam", (ITEM,), ()), ITEM), [1], samples)], algorithm)
    assert [(row.advantage, row.trained) for row in rows] == [(0.5, True), (-0.5, False)]


def test_metrics_are_declared_and_count_by_hand(tokenizer):
    groups = [group_of(tokenizer, ["a|cat (C)", "a|ant (A)", "a|what"]), group_of(tokenizer, ["b|cat (C)"] * 3)]
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


QUALITY = QualityConfig(ngram=2, max_repeated_frac=0.5, min_tokens=6)


@pytest.mark.parametrize(
    ("ids", "text_is_empty", "has_answer", "verdict"),
    [
        ([], True, False, "empty"),
        ([5, 6], True, True, "empty"),
        ([1, 2] * 10, False, True, "degenerate"),
        ([1, 2, 1, 2], False, True, "ok"),  # too short to call it running in circles
        (list(range(20)), False, False, "no_answer"),
        (list(range(20)), False, True, "ok"),
    ],
)
def test_verdicts(ids, text_is_empty, has_answer, verdict):
    assert check_sample(ids, text_is_empty=text_is_empty, has_answer=has_answer, quality=QUALITY) == verdict


def test_an_answer_may_be_optional():
    quality = QualityConfig(require_answer=False)
    assert check_sample([1, 2, 3], text_is_empty=False, has_answer=False, quality=quality) == "ok"


def test_repeated_ngram_frac_counts_by_hand():
    assert repeated_ngram_frac([1, 2, 3, 4], 2) == 0.0
    assert repeated_ngram_frac([1, 1, 1, 1, 1], 2) == pytest.approx(3 / 4)
    assert repeated_ngram_frac([1, 2, 1, 2, 1], 2) == pytest.approx(2 / 4)
    assert repeated_ngram_frac([1], 2) == 0.0


@pytest.mark.parametrize(
    ("action", "verdict", "filtered"),
    [
        ("zero", "ok", (0.7, True, True)),
        ("zero", "no_answer", (0.0, True, True)),
        ("drop", "ok", (0.7, True, True)),
        ("drop", "degenerate", (0.0, False, False)),
        ("off", "empty", (0.7, True, True)),
    ],
)
def test_quality_actions(action, verdict, filtered):
    assert apply_filters(0.7, verdict, True, AlgorithmConfig(quality=QualityConfig(action=action))) == filtered


@pytest.mark.parametrize(
    ("overlong", "finished", "filtered"),
    [
        ("keep", False, (1.0, True, True)),
        ("mask", False, (1.0, True, False)),
        ("mask", True, (1.0, True, True)),
        ("penalise", False, (0.5, True, True)),
        ("penalise", True, (1.0, True, True)),
    ],
)
def test_overlong_actions(overlong, finished, filtered):
    assert apply_filters(1.0, "ok", finished, AlgorithmConfig(overlong=overlong, overlong_penalty=0.5)) == filtered


def test_a_bad_sample_that_was_cut_is_penalised_from_zero():
    assert apply_filters(1.0, "no_answer", False, AlgorithmConfig(overlong="penalise", overlong_penalty=0.5))[0] == -0.5


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


def test_the_kept_set_holds_every_drawn_token(make_policy, tokenizer, short_task):
    groups, _ = worker(make_policy(), tokenizer, short_task, top_k=5).step(0)
    for group in groups:
        for sample in group.samples:
            bits = sample.sampling_mask.tolist()
            assert len(bits) == len(sample.ids)
            for row, token in zip(bits, sample.ids, strict=True):
                assert row[token // 8] >> token % 8 & 1
                assert sum(byte.bit_count() for byte in row) == 5


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
    groups, tokens = worker(make_policy(), tokenizer, task, dynamic_sampling=True, max_refills=2).step(0)
    assert len(groups) == 3
    assert not any(group.effective for group in groups)
    assert count_tokens(groups) < tokens
