"""The whole pipeline, tiny: every stage leaves what the next one and the report need, and a finished stage is not done again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from osler.config.recipe import load_recipe
from osler.config.schema import decode
from osler.quickstart.config import QuickstartConfig
from osler.quickstart.run import Quickstart, run
from osler.runs.folder import stored_config
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder, is_locked, locked

SUPERVISED = (
    *("model.num_layers=2", "model.hidden_size=64", "model.intermediate_size=64", "model.num_heads=2", "model.num_kv_heads=1"),
    *("model.head_dim=16", "model.vocab_size=600", "model.max_seq_len=512", "tokenizer.vocab_size=600"),
    *("data.passages=60", "data.examples=60", "data.cards=30", "data.drills=10", "data.validation_passages=10"),
    *("data.validation_examples=10", "seq_len=256", "batch_tokens=1024", "total_tokens=4096", "compile=never", "precision=fp32"),
)
GRPO = ("steps=1", "preflight=warn", "precision=fp32", "eval_task.limit=4", "algorithm.prompts_per_step=2",
        "algorithm.samples_per_prompt=2", "algorithm.max_new_tokens=8")  # fmt: skip
TINY = (
    *(f"{stage}.{setting}" for stage in ("pretrain", "sft") for setting in SUPERVISED),
    *(f"grpo.{setting}" for setting in GRPO),
    *("sft.exam.every_tokens=2048", "sft.exam.items=6", "exam_items=8", "exam_new_tokens=8"),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("quickstart") / "run"
    assert run(TINY, run_dir=str(root)) == 0
    return root


def test_exams_hold_both_splits_of_every_checkpoint(finished: Path) -> None:
    exams = json.loads((finished / "exams.json").read_text())
    assert set(exams) == {"sft", "sft, earlier checkpoint", "grpo"}
    for scores in exams.values():
        assert set(scores) == {"new_findings", "new_questions"}
        for score in scores.values():
            assert score["n"] == 8 and score["interval"][0] <= score["accuracy"] <= score["interval"][1]
            assert score["constant_letter_baseline"] >= 0.25 and score["method"] == "generation"
    for row in json.loads((finished / "comparison.json").read_text()):
        assert row["difference"] == pytest.approx(row["after"] - row["before"])
        assert row["after"] == exams["grpo"][row["split"]]["accuracy"]


def test_stages_report_and_samples_are_there(finished: Path) -> None:
    stages = json.loads((finished / "stages.json").read_text())
    assert [stage["name"] for stage in stages] == ["pretrain", "sft", "exam sft", "grpo", "exam grpo"]
    assert all(stage["seconds"] >= 0 and stage["what"] for stage in stages)
    page = (finished / "report.html").read_text()
    assert "new_questions" in page.replace(" ", "_").lower() and "not medical advice" in page
    lines = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"sft", "sft, earlier checkpoint", "grpo"}


def test_the_same_command_again_does_what_is_not_finished_and_no_more(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages, metrics = finished / "stages.json", finished / "grpo" / "metrics.jsonl"
    whole, before = json.loads(stages.read_text()), (stages.read_bytes(), metrics.read_bytes())
    assert run(TINY, run_dir=str(finished)) == 0
    assert before == (stages.read_bytes(), metrics.read_bytes()) and "──" not in capsys.readouterr().err
    stages.write_text(json.dumps(whole[:-1]))
    assert run(TINY, run_dir=str(finished)) == 0
    assert [stage["name"] for stage in json.loads(stages.read_text())] == [stage["name"] for stage in whole]
    shown = capsys.readouterr().err
    assert "── exam grpo" in shown and "── grpo" not in shown


def test_another_quickstart_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(UserError, match="Another process is at work"):
        run(TINY, run_dir=str(tmp_path))
    quickstart = Quickstart(decode(QuickstartConfig, load_recipe("quickstart", TINY)), RunFolder(tmp_path))
    assert quickstart.train(lambda config, folder: bool(is_locked(folder.root)), quickstart.config.sft, "sft")


def test_a_torn_line_of_metrics_does_not_stop_the_choice_of_a_checkpoint(finished: Path) -> None:
    quickstart = Quickstart(stored_config(QuickstartConfig, str(finished), ()), RunFolder(finished))
    chosen, metrics = quickstart.earlier_checkpoint(), RunFolder(finished / "sft").metrics
    whole = metrics.read_bytes()
    metrics.write_bytes(whole + b'{"step": 9, "tok')
    assert quickstart.earlier_checkpoint() == chosen
    metrics.write_bytes(whole)


def test_the_shipped_recipe_decodes_and_its_exam_is_large_enough() -> None:
    config = decode(QuickstartConfig, load_recipe("quickstart"))
    assert config.exam_items >= 500
    # every examined checkpoint is kept
    assert config.sft.checkpoint.keep_last >= config.sft.total_tokens // config.sft.exam.every_tokens
