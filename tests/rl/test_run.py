"""The command: from a fine-tuned checkpoint to a finished run folder, resumed, moved, and refused where it must be."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from osler.checkpoint import store
from osler.inference.load import describing_files, load_model
from osler.model.config import ModelConfig
from osler.model.transformer import Transformer
from osler.report.read import read_run
from osler.report.words import model_of
from osler.rl.rollout import RlTask
from osler.rl.run import check_held_out, fingerprint_of, run
from osler.runs.command import Request
from osler.runtime.errors import UserError
from osler.tasks.item import ExamItem, render_answer, render_question
from osler.tasks.registry import ClinicTask, load_task
from osler.tokenizer.bpe import Tokenizer


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A checkpoint of an untrained model whose tokenizer knows the clinic's words."""
    items = load_task(ClinicTask(split="train", limit=50))
    tokenizer = Tokenizer.train([f"{render_question(item)} {render_answer(item)}" for item in items], vocab_size=400)
    config = ModelConfig(
        num_layers=1, hidden_size=16, intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8,
        vocab_size=tokenizer.vocab_size, max_seq_len=512, head_init="normal",
    )  # fmt: skip
    model = Transformer(config)
    model.init_weights(0)
    root = tmp_path_factory.mktemp("sft") / "checkpoints"
    store.save(root, 1, tensors={"model": model.state_dict()}, state={"kind": "sft"}, files=describing_files(config, tokenizer))
    return root.parent


def arguments(start, *more):
    return [
        f"init_from={start}",
        "device=cpu",
        "preflight=warn",  # the model is untrained
        "steps=3",
        "checkpoint.every_steps=1",
        "eval_every_steps=3",
        "eval_task.limit=4",
        "algorithm.prompts_per_step=2",
        "algorithm.samples_per_prompt=2",
        "algorithm.max_new_tokens=8",
        *more,
    ]


def grpo(overrides=(), **options):
    return run(Request(kind="grpo", overrides=overrides, **options))


def test_a_whole_run(start, tmp_path, capsys):
    assert grpo(arguments(start, "parallel.type=fsdp"), run_dir=str(tmp_path / "run")) == 0
    assert capsys.readouterr().err.count("parallel.type=fsdp changes nothing here") == 1, "one process shares with nobody"
    loaded = load_model(tmp_path / "run")
    assert loaded.state["step"] == 3
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 3]
    assert "eval/validation_accuracy" in lines[0]
    assert model_of(read_run(tmp_path / "run"))[1] == loaded.model.config.num_parameters
    assert grpo(arguments(start), run_dir=str(tmp_path / "run")) == 0  # finished: nothing is done twice
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 5


def test_a_moved_run_resumes_without_its_starting_point(start, tmp_path):
    origin = tmp_path / "sft"
    shutil.copytree(start, origin)
    assert grpo(arguments(origin), run_dir=str(tmp_path / "run")) == 0
    whole = load_model(tmp_path / "run").model.state_dict()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / store.folder_name(3))
    shutil.rmtree(origin)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert grpo(resume=True, run_dir=str(tmp_path / "moved")) == 0
    resumed = load_model(tmp_path / "moved").model.state_dict()
    assert all(value.equal(whole[name]) for name, value in resumed.items())


def test_training_on_the_evaluations_questions_is_refused(start, tmp_path):
    overrides = arguments(start, "tasks=[{task: {type: clinic, split: validation, limit: 30}}]")
    with pytest.raises(UserError, match="also in eval_task"):
        grpo(overrides, run_dir=str(tmp_path / "run"))


def test_a_question_of_the_evaluation_is_found_with_a_fifth_option_and_in_other_case():
    item = ExamItem(id="eval-1", question="Which drug treats whooping cough best?", options=("a", "b", "c", "d"), answer_index=0)
    again = replace(item, id="train-1", question="WHICH drug treats  whooping cough best ?", options=("b", "c", "a", "e", "d"))
    tasks = [RlTask("medqa", (replace(item, id="train-0", question="Which drug treats the croup?"), again), ())]
    with pytest.raises(UserError, match=r"1 of 2 questions of task medqa.*train-1, there eval-1"):
        check_held_out(tasks, [item])
    check_held_out(tasks, [replace(item, question="Which drug treats a cold?")])


def test_questions_that_do_not_fit_are_refused_by_number(start, tmp_path):
    with pytest.raises(UserError, match="max_seq_len 512"):
        grpo(arguments(start, "algorithm.max_new_tokens=505"), run_dir=str(tmp_path / "run"))


def test_another_run_in_the_folder_is_refused_and_a_dry_run_of_this_one_says_where_it_goes_on(start, tmp_path, capsys):
    grpo(arguments(start, "steps=1"), run_dir=str(tmp_path / "run"))
    with pytest.raises(UserError, match="seed"):
        grpo(arguments(start, "steps=1", "seed=7"), run_dir=str(tmp_path / "run"))
    capsys.readouterr()
    assert grpo(run_dir=str(tmp_path / "run"), resume=True, dry_run=True) == 0
    text = capsys.readouterr().out
    assert f"# goes on from      step 1: {store.resolve(tmp_path / 'run')}\n" in text and "starts from" not in text


def test_dry_run_touches_nothing(start, tmp_path, capsys):
    assert grpo(arguments(start), run_dir=str(tmp_path / "run"), dry_run=True) == 0
    text = capsys.readouterr().out
    assert "12 of at most 8 tokens" in text and f"# starts from       {store.resolve(start)}, its model" in text
    parameters = load_model(start).model.config.num_parameters
    assert f"# model             {parameters:,} parameters (num_layers 1, hidden_size 16, max_seq_len 512)" in text
    assert not (tmp_path / "run").exists()


def test_a_run_that_ends_inside_its_warm_up_is_warned(start, tmp_path, capsys):
    for warmup, warned in ((3 * 2 * 2 * 8, True), (3 * 2 * 2 * 8 - 1, False)):
        assert grpo(arguments(start, f"schedule.warmup_tokens={warmup}"), run_dir=str(tmp_path / str(warmup))) == 0
        assert ("schedule.warmup_tokens 96 is not below" in capsys.readouterr().err) == warned


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(UserError, match="--run"):
        grpo(resume=True)
    with pytest.raises(UserError, match="no run to resume"):
        grpo(resume=True, run_dir=str(tmp_path))


def test_the_data_fingerprint_changes_with_an_answer():
    item = ExamItem(id="a", question="Which?", options=("x", "y"), answer_index=0)
    named = {fingerprint_of([RlTask("exam", (one,), ())]) for one in (item, item, replace(item, answer_index=1))}
    assert len(named) == 2
