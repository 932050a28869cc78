"""The command: from a fine-tuned checkpoint to a finished run folder, its preflight, and what is refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
from run_folders import assert_same_tensors, logged, untimed

from osler.checkpoint import store
from osler.cli.main import main
from osler.config.schema import decode
from osler.inference.load import load_model
from osler.report.read import read_run
from osler.report.words import model_of
from osler.rl.config import AlgorithmConfig, GrpoConfig
from osler.rl.rollout import RlTask
from osler.rl.run import SELDOM, fingerprint_of, preflight
from osler.runtime.errors import UserError
from osler.runtime.files import fingerprint
from osler.tasks.item import ExamItem
from osler.tokenizer.bpe import ANSWER

CONFIG = GrpoConfig(init_from="runs/start", algorithm=AlgorithmConfig(max_new_tokens=8))
SHORT = ("steps=3", "checkpoint.every_steps=1", "eval_every_steps=3", "eval_task.limit=4", "algorithm.prompts_per_step=2")


@pytest.fixture
def grpo(tiny, runs):
    """A function that starts a run of three steps from the fine-tuned one, and returns the exit code."""

    def start(folder, *more, origin=runs.sft):
        return main(["grpo", tiny.grpo, f"init_from={origin}", *SHORT, *more, "--run", str(folder)])

    return start


def test_a_whole_run(grpo, tmp_path, capsys):
    assert grpo(tmp_path, "parallel.type=fsdp") == 0
    said = capsys.readouterr().err
    assert said.count("parallel.type=fsdp changes nothing here") == 1, "one process shares with nobody"
    loaded = load_model(tmp_path)
    assert loaded.state["step"] == 3
    assert [line["step"] for line in logged(tmp_path)] == [0, 1, 2, 3, 3] and "eval/validation_accuracy" in logged(tmp_path)[0]
    assert model_of(read_run(tmp_path)) == loaded.model.config
    assert grpo(tmp_path) == 0 and len(logged(tmp_path)) == 5  # finished: nothing is done twice


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["tasks=[{task: {type: clinic, split: validation, limit: 30}}]"], "also in eval_task"),
        (["algorithm.max_new_tokens=249"], "max_seq_len 256"),
        (["algorithm.max_new_tokens=1"], "The model never ends"),
    ],
)
def test_a_refused_start_leaves_nothing(grpo, tmp_path, capsys, overrides, told):
    assert grpo(tmp_path / "run", *overrides) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_dry_run_says_where_a_run_starts_and_where_it_goes_on(grpo, runs, tmp_path, capsys):
    assert grpo(tmp_path / "run", "--dry-run") == 0
    text = capsys.readouterr().out
    assert "24 of at most 8 tokens" in text and f"# starts from       {store.resolve(runs.sft)}, its model" in text
    assert "# model             51,200 parameters (num_layers 2, hidden_size 32, max_seq_len 256)" in text
    assert not (tmp_path / "run").exists()
    assert grpo(tmp_path / "run", "steps=1") == 0
    capsys.readouterr()
    assert main(["grpo", "--resume", "--run", str(tmp_path / "run"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert f"# goes on from      step 1: {store.resolve(tmp_path / 'run')}\n" in text and "starts from" not in text


def test_a_reward_that_is_not_there_is_refused_by_a_dry_run(grpo, tmp_path, capsys):
    own = tmp_path / "own.py"
    own.write_text("def brief(item, completion): return 1.0\n")
    for name, code in (("brief", 0), ("absent", 2)):
        assert grpo(tmp_path / "run", f'tasks=[{{rewards: {{"{own}:{name}": 1.0}}}}]', "--dry-run") == code
    assert f"The reward {own}:absent raised AttributeError" in capsys.readouterr().err


def test_fields_that_few_items_have_leave_the_fingerprint_of_others_as_it_is():
    item = ExamItem("q", "Which?", ("ant", "bee"), 0)
    old = {name: value for name, value in asdict(item).items() if name not in SELDOM}
    assert fingerprint_of([RlTask("exam", (item,), ())]) == fingerprint([["exam", [old]]])
    assert fingerprint_of([RlTask("exam", (replace(item, shots=(item,)),), ())]) != fingerprint([["exam", [old]]])


# -- before the first step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "cause"),
    [
        (["ant ant", "aspirin"], "The model never ends: either it was not taught to, or algorithm.max_new_tokens=8 is too small"),
        (["ant|bee", "pain"], "The model never ends"),
        (["ant$", "aspirin$", "pain"], f"does not write the template, in which {ANSWER} stands between"),
        (["ant|aspirin$", "ant|pain$"], "its answers name no option"),
    ],
)
def test_a_start_that_teaches_nothing_is_refused_with_its_cause(group_of, texts, cause):
    with pytest.raises(UserError) as refused:
        preflight([group_of(*texts)], CONFIG)
    assert cause in str(refused.value) and "\n" not in str(refused.value)
    assert "osler sft usmle-2day/format init_from=runs/start" in str(refused.value) and "preflight=warn" in str(refused.value)


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (["ant|bee (B)$", "aspirin"], "Warning: none of the 2 completions before training earned a reward"),
        (["ant|cat (C)$"] * 3, "learns nothing from them; all of them are right"),
        (["ant|cat (C)$", "aspirin"], "pass@1 0.500, pass@2 1.000 over 1 questions; 50% of the answers can be read, 50% of the"),
    ],
    ids=["never right", "always right", "once right"],
)
def test_what_a_preflight_says_of_a_model_that_keeps_to_the_template(group_of, capsys, texts, told):
    preflight([group_of(*texts)], CONFIG)
    said = capsys.readouterr().err
    assert told in said and ("Warning" in said) == ("pass@2 1.000" not in told)


def test_the_permission_to_start_all_the_same_is_given_for_one_start(grpo, tmp_path, capsys):
    hopeless = ("algorithm.max_new_tokens=1", "steps=1")
    assert grpo(tmp_path, *hopeless, "preflight=warn") == 0
    assert "Warning: GRPO would learn nothing" in capsys.readouterr().err
    assert grpo(tmp_path, *hopeless) == 0


def test_a_preflight_changes_nothing_in_the_run_and_is_not_made_again(grpo, tmp_path, capsys):
    asked, plain = tmp_path / "refuse", tmp_path / "off"
    for folder, shown in ((asked, 4), (plain, 0)):
        assert grpo(folder, f"preflight={folder.name}") == 0
        assert capsys.readouterr().err.count("before training: ") == shown
    assert [*map(untimed, logged(asked))] == [*map(untimed, logged(plain))]
    assert_same_tensors(asked, plain)
    samples = [json.loads(line) for line in (asked / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4 and not (plain / "samples.jsonl").exists()
    fields = {"id", "stage", "question", "options", "thinking", "answer", "correct_answer", "correct", "confidence", "cluster"}
    assert samples[0].keys() == fields and samples[0]["stage"] == "grpo step 0"
    assert main(["grpo", "--resume", "--run", str(asked)]) == 0
    assert "before training" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": None}, "init_from"),
        ({"algorithm": {"samples_per_prompt": 1}}, "samples_per_prompt: must be at least 2"),
        ({"algorithm": {"temperature": 1e-30}}, "temperature: must be at least 0.01"),
        ({"algorithm": {"top_k": 1}}, "top_k: must be at least 2"),
        ({"algorithm": {"top_p": 1e-6}}, "top_p: must be at least 0.1"),
        ({"algorithm": {"clip": {"low": 0.0}}}, "clip.low"),
        ({"optim": {"weight_decay_schedule": {"type": "repeats"}}}, "counts epochs of text, and GRPO reads none"),
        ({"tasks": []}, "tasks need at least one"),
        ({"tasks": [{}, {}]}, "its own name"),
        ({"tasks": [{"rewards": {"corect": 1.0}}]}, "corect.*MODULE:FUNCTION"),
        ({"tasks": [{"rewards": {"correct": 1.0, "own:correct": 1.0}}]}, "two functions have one name"),
    ],
)
def test_mistakes_are_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message):
        decode(GrpoConfig, {"init_from": "x", **changes})
