"""Before GRPO learns anything: what the model writes is shown, and a start from which nothing can be learned is refused."""

from __future__ import annotations

import json

import pytest

from osler.cli.main import main
from osler.inference.load import load_model
from osler.rl.config import AlgorithmConfig, GrpoConfig
from osler.rl.rollout import Group, Prompt, RewardTerm, RlTask, score
from osler.rl.run import preflight
from osler.runtime.errors import UserError
from osler.tasks.item import ExamItem
from osler.tasks.rewards import correct
from osler.tokenizer.bpe import ANSWER, EOS

ITEM = ExamItem(id="q", question="Which drug?", options=("ant", "bee", "cat", "dog"), answer_index=0)
TASK = RlTask("exam", (ITEM,), (RewardTerm("correct", correct),))
CONFIG = GrpoConfig(init_from="runs/start", algorithm=AlgorithmConfig(max_new_tokens=8))


def answered(tokenizer, *texts: str) -> list[Group]:
    """The group of a policy that wrote the given texts, each with its markers."""
    samples = []
    for text in texts:
        ids: list[int] = []
        for number, part in enumerate(text.removesuffix(EOS).split(ANSWER)):
            ids += [tokenizer.special_id(ANSWER)] * (number > 0) + tokenizer.encode(part)
        ended = text.endswith(EOS)
        ids += [tokenizer.eos_id] * ended
        samples.append(score(tokenizer, Prompt(TASK, ITEM), ids, [0.0] * len(ids), CONFIG.algorithm))
    return [Group(Prompt(TASK, ITEM), [0], samples)]


@pytest.mark.parametrize(
    ("texts", "cause"),
    [
        (["ant ant", "aspirin"], "The model never ends: either it was not taught to, or algorithm.max_new_tokens=8 is too small"),
        ([f"ant{ANSWER}bee", "pain"], "The model never ends"),
        ([f"ant{EOS}", f"aspirin{EOS}", "pain"], f"does not write the template, in which {ANSWER} stands between"),
        ([f"ant{ANSWER}aspirin{EOS}", f"ant{ANSWER}pain{EOS}"], "its answers name no option"),
    ],
)
def test_a_start_that_teaches_nothing_is_refused_with_its_cause(tokenizer, texts, cause):
    with pytest.raises(UserError) as refused:
        preflight(answered(tokenizer, *texts), CONFIG)
    assert cause in str(refused.value) and "\n" not in str(refused.value)
    assert "osler sft usmle-2day/format init_from=runs/start" in str(refused.value) and "preflight=warn" in str(refused.value)


def test_a_model_that_keeps_to_the_template_and_is_never_right_may_begin(tokenizer, capsys):
    preflight(answered(tokenizer, f"ant{ANSWER}bee (B){EOS}", "aspirin"), CONFIG)
    assert "Warning: none of the 2 completions before training earned a reward" in capsys.readouterr().err


def test_questions_that_are_all_answered_right_teach_nothing(tokenizer, capsys):
    preflight(answered(tokenizer, *[f"ant{ANSWER}ant (A){EOS}"] * 3), CONFIG)
    assert "learns nothing from them; all of them are right" in capsys.readouterr().err


def test_one_right_answer_is_enough(tokenizer, capsys):
    preflight(answered(tokenizer, f"ant{ANSWER}ant (A){EOS}", "aspirin"), CONFIG)
    told = capsys.readouterr().err
    assert "Warning" not in told
    assert "pass@1 0.500, pass@2 1.000 over 1 questions; 50% of the answers can be read, 50% of the completions were cut" in told


def start(tiny, runs, folder, *more) -> int:
    shorter = ["steps=2", "eval_every_steps=2", "checkpoint.every_steps=1"]
    return main(["grpo", tiny.grpo, f"init_from={runs.sft}", *shorter, *more, "--run", str(folder)])


def test_a_refused_start_leaves_nothing_and_the_next_one_takes_the_same_folder(tiny, runs, tmp_path, capsys):
    folder = tmp_path / "run"
    assert start(tiny, runs, folder, "algorithm.max_new_tokens=1") == 2
    assert "The model never ends" in capsys.readouterr().err and not folder.exists()
    assert start(tiny, runs, folder, "algorithm.max_new_tokens=1", "preflight=warn", "steps=1") == 0
    assert "Warning: GRPO would learn nothing" in capsys.readouterr().err
    assert start(tiny, runs, folder, "algorithm.max_new_tokens=1", "steps=1") == 0, "the permission is given for one start"


def test_a_preflight_changes_nothing_in_the_run_and_is_not_made_again(tiny, runs, tmp_path, capsys):
    for name in ("refuse", "off"):
        assert start(tiny, runs, tmp_path / name, f"preflight={name}") == 0
        assert capsys.readouterr().err.count("before training: ") == (4 if name == "refuse" else 0)
    found, plain = ([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()] for name in ("refuse", "off"))
    clocks = ("time", "perf/", "eval/seconds")
    for line in (*found, *plain):
        for key in [key for key in line if key.startswith(clocks)]:
            del line[key]
    assert found == plain
    weights = [load_model(tmp_path / name).model.state_dict() for name in ("refuse", "off")]
    assert all(value.equal(weights[1][name]) for name, value in weights[0].items())
    samples = [json.loads(line) for line in (tmp_path / "refuse" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4 and not (tmp_path / "off" / "samples.jsonl").exists()
    assert samples[0].keys() == {
        "id", "stage", "question", "options", "thinking", "answer", "correct_answer", "correct",
    }  # fmt: skip
    assert main(["grpo", "--resume", "--run", str(tmp_path / "refuse")]) == 0
    assert "before training" not in capsys.readouterr().err


def test_a_disk_that_refuses_the_samples_costs_a_warning(tiny, runs, tmp_path, capsys):
    (tmp_path / "run" / "samples.jsonl" / "in-the-way").mkdir(parents=True)
    assert start(tiny, runs, tmp_path / "run", "steps=1") == 0
    assert "samples.jsonl could not be written" in capsys.readouterr().err
