"""The GRPO loop: exact resume, signals, what it says before and while it trains."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_folders import assert_same_tensors, logged, untimed

from osler.checkpoint import folders, store
from osler.checkpoint.folders import best_checkpoint
from osler.inference.engine import InferenceEngine
from osler.monitor import collect
from osler.monitor.config import SpikeConfig
from osler.monitor.metrics import declared_name
from osler.optim.build import build_optimizer
from osler.optim.config import AdamWConfig
from osler.optim.schedule import LinearConfig
from osler.parallel.engine import ParallelEngine
from osler.records.jsonl import LIFETIME, read_events
from osler.rl import trainer as trainer_module
from osler.rl.config import AlgorithmConfig, GrpoConfig, QualityConfig, StepCheckpoints
from osler.rl.rollout import RewardTerm, RolloutWorker
from osler.rl.step import PolicyLoss
from osler.rl.trainer import GrpoTrainer
from osler.runs.config import RecoveryConfig
from osler.runs.loop import Loop
from osler.runs.process import Learner, Run
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder
from osler.runtime.world import World

ALGORITHM = AlgorithmConfig(
    prompts_per_step=2,
    samples_per_prompt=4,
    max_new_tokens=10,
    updates_per_batch=2,
    beta=0.05,
    opsm_delta=0.1,
    reference_refresh_steps=2,
    dynamic_sampling=True,
    most_rested_epochs=2,
    quality=QualityConfig(action="off"),
)
CONFIG = GrpoConfig(
    init_from="unused",
    algorithm=ALGORITHM,
    optim=AdamWConfig(lr=3e-3),
    schedule=LinearConfig(),
    steps=5,
    eval_every_steps=2,
    checkpoint=StepCheckpoints(every_steps=3, keep_last=9),
    micro_batch_tokens=200,
)


@pytest.fixture
def make_trainer(make_policy, tokenizer, short_task):
    """A function that builds a trainer from nothing in a run folder, as a new process would."""

    def build(folder, *, config=CONFIG, task=short_task, evaluate=lambda: {"eval/validation_accuracy": 0.5}, **options):
        model, run = make_policy(), Run(RunFolder.create(folder), World(), **options)
        learner = Learner(model, build_optimizer(model, config.optim), ParallelEngine(PolicyLoss(model)), config.clip_norm)
        worker = RolloutWorker(InferenceEngine(model), tokenizer, [task], config.algorithm, config.seed)
        trainer = GrpoTrainer(config, run, learner, worker)
        trainer.evaluate = evaluate
        return trainer

    return build


def content(folder, step):
    """Tensors and state of a checkpoint."""
    loaded = store.load(folder / "checkpoints" / folders.folder_name(step))
    return loaded.tensors, loaded.state


def test_a_resumed_run_is_the_same_run(make_trainer, short_task, tmp_path):
    """As if killed in step 4: only what was saved up to step 3 is left, and a metrics file that is ahead.

    Two questions rest, and the number of updates differs between steps.
    """

    def rewarded(item, completion):
        return term.function(item, completion) if item.id > "q1" else 0.0

    (term,) = short_task.rewards
    task = replace(short_task, rewards=(RewardTerm("rewarded", rewarded),))
    whole = tmp_path / "whole"
    config = replace(CONFIG, algorithm=replace(ALGORITHM, updates_per_batch=4, target_kl=1e-3))
    assert Loop(make_trainer(whole, config=config, task=task)).fit()
    parts = Path(shutil.copytree(whole, tmp_path / "parts"))
    for step in (4, 5):
        shutil.rmtree(parts / "checkpoints" / folders.folder_name(step))
    resumed = Loop(make_trainer(parts, config=config, task=task))
    resumed.restore(store.load(folders.newest_good(parts / "checkpoints")[0]))
    assert resumed.trainer.step == 3 and resumed.fit()
    assert_same_tensors(parts, whole)
    assert content(whole, 3)[1]["rests"]["short"].keys() == {"q0", "q1"}
    (tensors, state), (_, whole_state) = content(parts, 5), content(whole, 5)
    assert state == whole_state and tensors.keys() == {"model", "optimizer", "reference"}
    assert [*map(untimed, logged(parts))] == [*map(untimed, logged(whole))]
    assert len({line["opsm/updates"] for line in logged(whole) if "opsm/updates" in line}) > 1


def test_every_metric_is_declared_and_the_policy_moves(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path)
    before = {name: value.clone() for name, value in trainer.learner.model.state_dict().items()}
    Loop(trainer).fit()
    lines = logged(tmp_path)
    names = {name for line in lines for name in line} - {"step", "tokens", "time"}
    assert [name for name in sorted(names) if declared_name(name) is None] == []
    steps = [line for line in lines if "reward" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in lines if "eval/validation_accuracy" in line] == [0, 2, 4, 5]
    assert steps[0]["sampling/sampling_logp_difference/max"] < 1e-5
    assert steps[0]["train/lr"] == pytest.approx(3e-3 * (1 - 0.5 / 5))
    assert sorted(line["tokens"] for line in steps) == [line["tokens"] for line in steps]
    assert any(not torch.equal(value, before[name]) for name, value in trainer.learner.model.state_dict().items())


def test_the_reference_is_refreshed_on_schedule(make_trainer, tmp_path):
    Loop(make_trainer(tmp_path, config=replace(CONFIG, steps=3, checkpoint=StepCheckpoints(every_steps=1, keep_last=9)))).fit()
    start = make_trainer(tmp_path / "other").learner.model.state_dict()
    for step, source in ((1, start), (2, content(tmp_path, 2)[0]["model"]), (3, content(tmp_path, 2)[0]["model"])):
        reference = content(tmp_path, step)[0]["reference"]
        assert all(torch.equal(value, source[name]) for name, value in reference.items()), step


def test_without_a_kl_term_there_is_no_reference(make_trainer, tmp_path):
    config = replace(CONFIG, steps=1, algorithm=replace(ALGORITHM, beta=0.0))
    trainer = make_trainer(tmp_path, config=config)
    assert trainer.reference is None
    assert Loop(trainer).fit()
    assert content(tmp_path, 1)[0].keys() == {"model", "optimizer"}


def test_the_weight_of_the_kl_term_follows_its_schedule(make_trainer, tmp_path, monkeypatch):
    seen = []
    metrics = {"opsm/updates": 1.0, "train/skipped_steps": 0.0, "train/grad_norm": 1.0, "loss": 0.0}

    def update(learner, rows, algorithm, **_):
        seen.append(algorithm.beta)
        return dict(metrics)

    monkeypatch.setattr(trainer_module, "update_policy", update)
    config = replace(CONFIG, algorithm=replace(ALGORITHM, beta_schedule=LinearConfig()))
    assert Loop(make_trainer(tmp_path, config=config)).fit()
    assert seen == pytest.approx([0.05 * (1 - (step + 0.5) / 5) for step in range(5)])


def test_a_run_ends_when_its_exam_gets_no_better_and_a_resumed_one_at_the_same_step(make_trainer, tmp_path):
    scores = {0: 0.2, 1: 0.5, 2: 0.5, 3: 0.4, 4: 0.9, 5: 0.9}
    kept = StepCheckpoints(every_steps=5, keep_every_steps=4, keep_last=9)
    config = replace(CONFIG, eval_every_steps=1, early_stopping_patience=2, checkpoint=kept)

    def build(folder):
        trainer = make_trainer(folder, config=config)
        trainer.evaluate = lambda: {"eval/validation_accuracy": scores[trainer.step]}
        return trainer

    trainer = build(tmp_path / "whole")
    assert Loop(trainer).fit() and trainer.done and trainer.step == 3
    assert best_checkpoint(tmp_path / "whole/checkpoints").step == 1
    assert [entry.step for entry in folders.by_age(tmp_path / "whole/checkpoints") if entry.milestone] == [3]
    parts = Path(shutil.copytree(tmp_path / "whole", tmp_path / "parts"))
    shutil.rmtree(parts / "checkpoints" / folders.folder_name(3))
    for left in (2, 3):  # killed before the last step; then started once more after the end
        resumed = Loop(build(parts))
        resumed.restore(store.load(folders.newest_good(parts / "checkpoints")[0]))
        assert resumed.trainer.step == left and resumed.fit() and resumed.trainer.step == 3
    assert_same_tensors(parts, tmp_path / "whole")


def test_the_best_and_the_milestones_are_kept(make_trainer, tmp_path):
    scores = iter([0.3, 0.6, 0.4, 0.5])
    config = replace(CONFIG, eval_every_steps=1, checkpoint=StepCheckpoints(every_steps=5, keep_every_steps=2, keep_last=1))
    trainer = make_trainer(tmp_path, config=config, evaluate=lambda: {"eval/validation_accuracy": next(scores, 0.0)})
    assert Loop(trainer).fit()
    best = best_checkpoint(tmp_path / "checkpoints")
    assert (best.step, best.metric, best.value) == (1, "eval/validation_accuracy", 0.6)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert kept == [folders.folder_name(step) for step in (1, 2, 4, 5)]


def test_alarms_for_completions_that_never_end_and_rewards_that_never_come(make_trainer, short_task, tmp_path, capsys):
    task = replace(short_task, rewards=(RewardTerm("none", lambda item, completion: 0.0),))
    algorithm = replace(ALGORITHM, dynamic_sampling=False, max_new_tokens=1)
    Loop(make_trainer(tmp_path, task=task, config=replace(CONFIG, algorithm=algorithm, zero_reward_patience=3))).fit()
    printed = capsys.readouterr().err
    assert "of the completions were cut at 1 tokens" in printed
    assert "no completion earned a reward for 3 steps" in printed
    events = read_events(tmp_path / "events.jsonl")
    assert [(event.name, event.step) for event in (events[0], events[-1])] == [("begun", 0), ("finished", CONFIG.steps)]
    events = [event for event in events if event.kind not in LIFETIME]
    assert [(event.name, event.step) for event in events] == [("cut-completions", 1), ("no-reward", 3)]


def test_a_batch_without_a_usable_sample_is_survived(make_trainer, tmp_path):
    algorithm = replace(ALGORITHM, dynamic_sampling=False, quality=QualityConfig(action="drop"))
    trainer = make_trainer(tmp_path, config=replace(CONFIG, steps=2, algorithm=algorithm))
    before = {name: value.clone() for name, value in trainer.learner.model.state_dict().items()}
    assert Loop(trainer).fit()
    assert all(torch.equal(value, before[name]) for name, value in trainer.learner.model.state_dict().items())


def test_a_resume_with_another_tokenizer_or_other_questions_is_refused(make_trainer, tmp_path):
    Loop(make_trainer(tmp_path, config=replace(CONFIG, steps=1), fingerprints={"tokenizer": "a", "data": "b"})).fit()
    other = Loop(make_trainer(tmp_path, fingerprints={"tokenizer": "a", "data": "c"}))
    with pytest.raises(UserError, match="data changed"):
        other.restore(store.load(store.resolve(tmp_path)))
    allowing = replace(CONFIG, allow_data_change=True)
    other = Loop(make_trainer(tmp_path, config=allowing, fingerprints={"tokenizer": "z", "data": "b"}))
    with pytest.raises(UserError, match="tokenizer changed"):
        other.restore(store.load(store.resolve(tmp_path)))


def test_one_skipped_update_of_two_is_noted_and_no_skipped_step(make_trainer, tmp_path, fault):
    fault("train-loss:nan:1")
    trainer = make_trainer(tmp_path, config=replace(CONFIG, recovery=RecoveryConfig(max_skipped_steps=1)))
    assert Loop(trainer).fit() and trainer.incidents.rollbacks == 0
    assert [line["train/skipped_steps"] for line in logged(tmp_path) if "reward" in line] == [1, 0, 0, 0, 0]
    (event,) = (event for event in read_events(tmp_path / "events.jsonl") if event.kind == "incident")
    assert (event.step, event.name, event.details["grad_norm"]) == (1, "skipped-step", None)
    assert [step for step, *_ in trainer.incidents.before] == [2, 3, 4, 5]


def test_of_steps_in_a_row_with_a_skipped_update_the_first_alone_is_told(make_trainer, tmp_path, capsys):
    """One of two updates is skipped in steps 1 and 2, both in step 3, none in step 4; a resumed run goes on in silence."""
    trainer = make_trainer(tmp_path)
    observe, numbers = trainer.incidents.observe, dict(skipped=False, drift=0.0)
    observe(1, math.nan, math.nan, **numbers)
    saved = trainer.incidents.checkpointed(1)
    trainer = make_trainer(tmp_path)
    trainer.incidents.restore(json.loads(json.dumps(saved)))
    observe = trainer.incidents.observe
    observe(2, math.nan, math.nan, **numbers)
    observe(3, math.nan, math.nan, skipped=True)
    observe(4, 0.0, 1.0, **numbers)
    observe(5, math.nan, math.nan, **numbers)
    assert capsys.readouterr().err.count("The gradient was not finite") == 1 + 1
    noted = [event.step for event in read_events(tmp_path / "events.jsonl") if event.name == "skipped-step"]
    assert noted == [1, 2, 3, 5]


def rewarded_by_step(task, scale_of_step, completions=8):
    """The task with its rewards scaled anew in each step of so many completions; without refills."""
    term, calls = task.rewards[0], []

    def scaled(item, completion):
        calls.append(item)
        return scale_of_step((len(calls) - 1) // completions) * term.function(item, completion)

    return replace(task, rewards=(RewardTerm(term.name, scaled),))


WATCHFUL = RecoveryConfig(spike=SpikeConfig(window_steps=6))
ONCE = replace(ALGORITHM, dynamic_sampling=False, updates_per_batch=1, opsm_delta=None)


@pytest.mark.parametrize("aggregate", ["token_mean", "constant", "sequence_mean"])
def test_rewards_and_lengths_alone_are_no_spike(make_trainer, short_task, tmp_path, aggregate):
    """Short answers earn the more, and much more from step 5 on: the policy has not moved, whatever the loss says."""
    algorithm = replace(ONCE, aggregate=aggregate, samples_per_prompt=32)
    task = rewarded_by_step(short_task, lambda step: 1e-3 if step < 4 else 100.0, completions=64)
    trainer = make_trainer(tmp_path, config=replace(CONFIG, algorithm=algorithm, recovery=WATCHFUL, steps=6), task=task)
    assert Loop(trainer).fit()
    steps = [line for line in logged(tmp_path) if "reward" in line]
    assert max(abs(line["loss/drift"]) for line in steps) < 0.01
    if aggregate == "token_mean":
        assert steps[4]["loss"] > 0.2 + steps[3]["loss"], "no false alarm to be seen"
    assert [event for event in read_events(tmp_path / "events.jsonl") if event.kind == "incident"] == []


def test_a_step_without_anything_to_learn_counts_nowhere(make_trainer, short_task, tmp_path):
    """All rewards are equal in steps 2 and 4; the KL term alone moves the policy there."""
    config = replace(CONFIG, algorithm=ONCE, steps=5, optim=AdamWConfig(lr=1e-2))
    trainer = make_trainer(tmp_path, config=config, task=rewarded_by_step(short_task, lambda step: step % 2 == 0))
    assert Loop(trainer).fit()
    steps = [line for line in logged(tmp_path) if "reward" in line]
    assert [line["groups/effective"] > 0 for line in steps] == [True, False, True, False, True]
    for name in ("loss", "loss/drift", "grad/clipped_frac"):
        assert [name in line for line in steps] == [True, False, True, False, True], name
    assert all(line["train/grad_norm"] > 0 for line in steps)
    assert [step for step, *_ in trainer.incidents.before] == [1, 3, 5]
    assert len(trainer.incidents.spikes.usual) == 3


def test_steps_without_anything_to_learn_do_not_end_a_row_of_skipped_ones(make_trainer, short_task, tmp_path, fault):
    """Gradients that are not finite in steps 1 and 3, nothing to learn in step 2: two in a row, told by their numbers."""
    fault("train-loss:nan:1,train-loss:nan:3")
    recovery = RecoveryConfig(max_skipped_steps=2)
    config = replace(CONFIG, algorithm=replace(ONCE, beta=0.0), micro_batch_tokens=10_000, recovery=recovery)
    trainer = make_trainer(tmp_path, config=config, task=rewarded_by_step(short_task, lambda step: step % 2 == 0))
    with pytest.raises(UserError, match=r"not finite for 2 steps in a row \(steps 1 to 3\)"):
        Loop(trainer).fit()


def test_a_short_run_that_only_skipped_ends_with_an_error_each_time_it_is_started(make_trainer, tmp_path, fault):
    fault("train-loss:nan:1-")
    config = replace(CONFIG, steps=2)
    told = r"not finite for 2 steps in a row \(steps 1 to 2\); those steps changed nothing"
    with pytest.raises(UserError, match=told):
        Loop(make_trainer(tmp_path, config=config)).fit()
    again = Loop(make_trainer(tmp_path, config=config))
    again.restore(store.load(folders.newest_good(tmp_path / "checkpoints")[0]))
    with pytest.raises(UserError, match=told):
        again.fit()


def test_the_share_of_the_gpus_peak_follows_from_the_speed_of_the_updates(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "peak_flops_of", lambda name: 1e12)
    trainer = make_trainer(tmp_path, config=replace(CONFIG, steps=1))
    assert Loop(trainer).fit()
    (line,) = (line for line in map(json.loads, (tmp_path / "metrics.jsonl").open()) if "reward" in line)
    per_token = line["perf/mfu"] * 1e12 / line["perf/train_tokens_per_second"]
    config = trainer.learner.model.config
    assert config.flops_per_token(1) < per_token < config.flops_per_token(config.max_seq_len)


def test_a_step_without_a_difference_in_reward_tells_of_a_gradient_that_is_not_finite_alone(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path)
    numbers = {"loss": 0.0, "opsm/updates": 2.0, "train/grad_norm": 0.0, "train/skipped_steps": 2.0, "frac_reward_zero_std": 1.0}
    for norm, skipped in ((0.0, 0), (math.nan, 1)):
        trainer._observe({**numbers, "train/grad_norm": norm})
        assert not trainer.incidents.spikes.usual and trainer.incidents.skipped_in_a_row == skipped
