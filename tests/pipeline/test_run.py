"""A pipeline, tiny: every stage leaves what the next one and the report need, and what is finished or begun stays as it is."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from osler.checkpoint import store
from osler.pipeline.config import decode_pipeline
from osler.pipeline.run import Pipeline, quickstart, run
from osler.runs.folder import read_config
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder, locked
from osler.runtime.world import World

MODEL = (
    *("num_layers=2", "hidden_size=64", "intermediate_size=64", "num_heads=2", "num_kv_heads=1", "head_dim=16"),
    *("vocab_size=600", "max_seq_len=512"),
)
SUPERVISED = (
    *("data.passages=60", "data.examples=60", "data.cards=30", "data.drills=10", "data.validation_passages=10"),
    *("data.validation_examples=10", "seq_len=256", "batch_tokens=1024", "total_tokens=4096", "compile=never", "precision=fp32"),
)
GRPO = ("steps=1", "preflight=warn", "precision=fp32", "eval_task.limit=4", "algorithm.prompts_per_step=2",
        "algorithm.samples_per_prompt=2", "algorithm.max_new_tokens=8")  # fmt: skip
TINY = (
    *(f"pretrain.model.{setting}" for setting in MODEL),
    "pretrain.tokenizer.vocab_size=600",
    *(f"{stage}.{setting}" for stage in ("pretrain", "sft") for setting in SUPERVISED),
    *(f"grpo.{setting}" for setting in GRPO),
    *("sft.exam.every_tokens=2048", "sft.exam.items=6", "exam.task.limit=8", "exam.max_new_tokens=8"),
)
STAGES = ["pretrain", "sft", "grpo", "exam"]


def tiny(root: Path, *more: str) -> int:
    return quickstart(overrides=(*TINY, *more), run_dir=str(root), resume=False, dry_run=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pipeline") / "run"
    assert tiny(root) == 0
    return root


def test_exams_hold_both_splits_of_every_checkpoint(finished: Path) -> None:
    exams = json.loads((finished / "exams.json").read_text())
    assert list(exams) == ["sft", "sft, earlier checkpoint", "grpo"]
    for scores in exams.values():
        assert set(scores) == {"new_findings", "new_questions"}
        for score in scores.values():
            assert score["n"] == 8 and score["interval"][0] <= score["accuracy"] <= score["interval"][1]
            assert score["constant_letter_baseline"] >= 0.25 and score["method"] == "generation"
    comparison = json.loads((finished / "comparison.json").read_text())
    assert [row["split"] for row in comparison] == ["new_findings", "new_questions"]
    for row in comparison:
        assert (row["before_label"], row["after_label"], row["n"]) == ("sft, earlier checkpoint", "grpo", 8)
        assert row["difference"] == pytest.approx(row["after"] - row["before"])
        assert row["after"] == exams["grpo"][row["split"]]["accuracy"]


def test_stages_report_and_samples_are_there(finished: Path) -> None:
    stages = json.loads((finished / "stages.json").read_text())
    assert [stage["name"] for stage in stages] == STAGES
    assert all(stage["seconds"] >= 0 and stage["what"] for stage in stages)
    page = (finished / "report.html").read_text()
    assert "new_questions" in page.replace(" ", "_").lower() and "not medical advice" in page
    lines = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"sft", "sft, earlier checkpoint", "grpo"}
    assert len(list((finished / "answers").glob("*.jsonl"))) == 6


def test_the_same_command_again_does_what_is_not_finished_and_no_more(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(finished, moved)
    stages, metrics = moved / "stages.json", moved / "grpo" / "metrics.jsonl"
    whole, before = json.loads(stages.read_text()), (stages.read_bytes(), metrics.read_bytes())
    exams = (moved / "exams.json").read_bytes()
    assert tiny(moved) == 0
    told = capsys.readouterr()
    assert before == (stages.read_bytes(), metrics.read_bytes()) and "──" not in told.err
    assert (told.out + told.err).count("Report:") == 1
    stages.write_text(json.dumps(whole[:-1]))
    with pytest.raises(UserError, match=r"stage sft: it has begun .* changed any more: optim.lr is 0.5 here and 0.0025"):
        tiny(moved, "sft.optim.lr=0.5")
    assert tiny(moved, "exam.rows=128", "sft.monitor.level=full") == 0, "an exam that has not begun may be changed"
    assert [stage["name"] for stage in json.loads(stages.read_text())] == STAGES
    shown = capsys.readouterr().err
    assert "── exam" in shown and "── grpo" not in shown
    assert (moved / "exams.json").read_bytes() == exams
    assert (moved / "samples.jsonl").read_bytes() == (finished / "samples.jsonl").read_bytes(), "each checkpoint's samples once"
    assert run(None, run_dir=str(moved), resume=True) == 0


def test_a_finished_stage_that_is_gone_is_told_before_the_one_that_needs_it(finished: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(finished, moved)
    stages = json.loads((moved / "stages.json").read_text())
    shutil.rmtree(moved / "sft")
    assert run(None, run_dir=str(moved), resume=True, dry_run=True) == 0, "nothing needs it any more"
    (moved / "stages.json").write_text(json.dumps(stages[:-1]))
    with pytest.raises(
        UserError, match=r"stage exam: it goes on from sft.*, which is finished, and .*sft is gone: put it back; or"
    ):
        run(None, run_dir=str(moved), resume=True, dry_run=True)


def test_a_folder_of_something_else_is_refused(finished: Path, tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(UserError, match="Another process is at work"):
        tiny(tmp_path)
    with pytest.raises(UserError, match="holds a run of kind sft, and a pipeline cannot go on with that"):
        tiny(finished / "sft")
    (tmp_path / "config.yaml").write_text("kind: quickstart\n")
    with pytest.raises(UserError, match="a pipeline cannot go on with that: choose another folder"):
        tiny(tmp_path)
    recipe = tmp_path / "other.yaml"
    recipe.write_text("kind: pipeline\nread: {kind: pretrain}\n")
    with pytest.raises(UserError, match="holds another pipeline, with a stage pretrain"):
        run(str(recipe), run_dir=str(finished))
    with pytest.raises(UserError, match="is for `osler sft`, not for `osler pipeline`"):
        run("usmle-2day/format", run_dir=str(tmp_path / "new"))


def test_a_checkpoint_is_chosen_by_its_exam_its_mark_or_what_started_from_it(finished: Path) -> None:
    pipeline = Pipeline(decode_pipeline(read_config(RunFolder(finished))), RunFolder(finished), World())
    metrics = RunFolder(finished / "sft").metrics
    whole, steps = metrics.read_bytes(), sorted((finished / "sft" / "checkpoints").glob("step-*"))
    lines = [json.loads(line) for line in whole.splitlines()]
    examined = {line["step"]: line for line in lines if "eval/validation_accuracy" in line}
    assert len(examined) == len(steps) == 2
    for line, accuracy in zip(examined.values(), (0.9, 0.3), strict=True):
        line |= {"eval/validation_accuracy": accuracy, "eval/validation_questions_accuracy": accuracy - 0.2}
    torn = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "tok'
    metrics.write_text(torn)
    assert [pipeline.checkpoint(f"sft@accuracy={wanted}") for wanted in ("0.6", "0.3")] == steps
    metrics.write_bytes(whole)
    assert pipeline.checkpoint("sft") == steps[-1] and pipeline.checkpoint(str(finished / "sft")) == steps[-1]
    assert pipeline.checkpoint("sft@best") == store.resolve(finished / "sft", "best")
    assert str(pipeline.checkpoint("grpo@start")) == read_config(RunFolder(finished / "grpo"))["init_from"]


def test_an_interrupted_stage_goes_on_to_the_same_bits(finished: Path, tmp_path: Path, fault, capsys) -> None:
    fault("train-step:sigterm:6")  # four steps are those of pretraining
    assert tiny(tmp_path) == 130
    assert "Stopped and saved. The same command, or `osler pipeline --run" in capsys.readouterr().err
    assert [stage["name"] for stage in json.loads((tmp_path / "stages.json").read_text())] == ["pretrain"]
    fault("nowhere:crash")
    assert run(None, run_dir=str(tmp_path), resume=True) == 0
    for name in ("exams.json", "comparison.json"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()
    step = Path("grpo", "checkpoints", "step-000000001", "model.safetensors")
    assert (tmp_path / step).read_bytes() == (finished / step).read_bytes()


def test_an_exam_does_not_ask_a_checkpoint_again_and_compares_only_what_was_asked_alike(finished: Path, tmp_path, caplog) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(finished, moved)
    pipeline = Pipeline(decode_pipeline(read_config(RunFolder(moved))), RunFolder(moved), World())
    stage = pipeline.config.exam
    with caplog.at_level("INFO"):
        scores = {label: pipeline.sit(stage, label, pipeline.checkpoint(text)) for label, text in stage.of.items()}
    assert caplog.text.count("Going on after 8 of 8 answers") == 6
    for name in ("exams.json", "samples.jsonl"):
        assert (moved / name).read_bytes() == (finished / name).read_bytes()
    scores["grpo"] = [replace(score, settings={**score.settings, "reasoning": False}) for score in scores["grpo"]]
    pipeline.compare(stage, scores)
    assert json.loads((moved / "comparison.json").read_text()) == []
    assert "grpo are not compared, as they were asked differently: reasoning=True and reasoning=False" in caplog.text


def test_a_resumed_pipeline_takes_fields_of_stages_that_have_not_begun(finished: Path, tmp_path: Path, capsys) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(finished, moved)
    stages = json.loads((moved / "stages.json").read_text())
    (moved / "stages.json").write_text(json.dumps(stages[:-2]))
    shutil.rmtree(moved / "grpo")
    assert run(None, ["grpo.steps=3"], run_dir=str(moved), resume=True, dry_run=True) == 0
    assert "to come; completions 12 of at most 8 tokens" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"stage sft: it has begun .* optim.lr is 0.5 here[\s\S]*as sft.FIELD=VALUE.*root=DIR"):
        run(None, ["sft.optim.lr=0.5"], run_dir=str(moved), resume=True, dry_run=True)
    with pytest.raises(UserError, match=r"except for fields of stages that have not begun.*leave out root=elsewhere"):
        run(None, ["grpo.steps=3", "root=elsewhere"], run_dir=str(moved), resume=True, dry_run=True)


def test_a_stage_that_starts_from_another_may_have_a_teacher_with_its_tokenizer(finished: Path, tmp_path: Path, capsys) -> None:
    recipe = tmp_path / "mine.yaml"
    tokenizer = {"path": str(finished / "pretrain" / "tokenizer.json")}
    taught = {"kind": "sft", "init_from": "read", "teacher": {"path": str(finished / "sft")}}
    first = {"kind": "pretrain", "model": {"vocab_size": 600, "max_seq_len": 512}, "tokenizer": tokenizer}
    recipe.write_text(json.dumps({"kind": "pipeline", "read": first, "learn": taught}))
    assert run(str(recipe), run_dir=str(tmp_path / "run"), dry_run=True) == 0
    own = ["read.tokenizer.path=null", "read.tokenizer.vocab_size=600"]
    with pytest.raises(UserError, match=r"stage learn: The teacher .* another tokenizer .* \(yet to be trained\)"):
        run(str(recipe), own, run_dir=str(tmp_path / "run"), dry_run=True)
