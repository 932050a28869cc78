"""`osler distill`: which answers become rows, what is told of them, that it goes on where it stopped, and what it refuses."""

import json
import logging
import shutil
import signal

import pytest

from osler.cli import main as cli
from osler.eval.config import DistillConfig
from osler.eval.distill import questions_of, select
from osler.eval.score import Result
from osler.runtime.files import locked
from osler.tasks.config import MedqaTask
from osler.tasks.item import ExamItem
from osler.tasks.registry import ClinicTask
from osler.tokenizer.chat import Completion

ITEM = ExamItem("q1", "Which drug?", ("aspirin", "iron", "salt"), 1)


def answered(thinking, right=True, well_formed=True, item=ITEM, text="iron (B)"):
    completion = Completion(thinking, text, well_formed, well_formed)
    return Result(item, "answered", right, 1 if item.options else None, text, thinking), completion


def test_right_answers_that_keep_to_the_template_stay_once_and_at_most_keep_of_a_question():
    config = DistillConfig(task=ClinicTask(split="train"), samples=6, keep=2)
    other = ExamItem("q2", "6 x 7?", (), -1, answer="42")
    given = [
        answered("It carries oxygen."), answered(" it carries  Oxygen. "), answered("Anaemia.", well_formed=False),
        answered("A guess.", right=False), answered("Ferritin is low."), answered("So it is."),
        *[answered("", item=other, text=text) for text in ("42", "42.")], *[answered("Six sevens.", item=other, text="42")] * 2,
        *[answered("No.", item=other, text="41", right=False)] * 2,
    ]  # fmt: skip
    rows, questions, fates = select(*zip(*given, strict=True), config, "clinic train", reasoning=True)
    assert [(row["id"], row["thinking"]) for row in rows] == [
        ("q1", "It carries oxygen."), ("q1", "Ferritin is low."), ("q2", "Six sevens."),
    ]  # fmt: skip
    assert rows[0] == {
        "question": "Which drug? aspirin (A) iron (B) salt (C)", "thinking": "It carries oxygen.", "answer": "iron (B)",
        "id": "q1", "exam": "clinic train",
    }  # fmt: skip
    assert [(q["id"], q["samples"], q["right"], q["kept"]) for q in questions] == [("q1", 6, 5, 2), ("q2", 6, 4, 1)]
    assert fates == {"kept": 3, "duplicate": 2, "malformed": 3, "wrong": 3, "spare": 1}
    bare, _, _ = select(*zip(*given, strict=True), config, "clinic train", reasoning=False)
    assert "thinking" not in bare[0]


@pytest.mark.parametrize(
    ("task", "name", "is_for_training"),
    [
        (ClinicTask(split="train"), "clinic train", True),
        (ClinicTask(split="new_findings"), "clinic new_findings", False),
        (MedqaTask(path="exams/medqa-train.jsonl"), "medqa medqa-train.jsonl", True),
        (MedqaTask(path="exams/medqa-train.jsonl", split="test"), "medqa test", False),
        (MedqaTask(path="exams/dev.jsonl", fold="train"), "medqa dev.jsonl, train fold", True),
    ],
)
def test_the_split_is_named(task, name, is_for_training):
    assert questions_of(task) == (name, is_for_training)


def test_a_teacher_writes_rows_that_sft_learns_and_goes_on_where_it_was_stopped(runs, osler, tmp_path, capsys):
    """The teacher is right about every fourth time; the rows of a stopped and of a whole run are the same."""
    command = [
        "distill",
        runs.sft,
        "task.limit=12",
        "task=clinic:validation",
        "samples=4",
        "max_new_tokens=12",
    ]
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert osler(*command, "--out", whole) == 0
    told = capsys.readouterr()
    assert "clinic validation does not say that it is for training" in told.err and "task=clinic:train" in told.err
    rows, summary = (
        [json.loads(line) for line in whole.read_text().splitlines()],
        json.loads(whole.with_suffix(".summary.json").read_text()),
    )
    assert rows and all(row["exam"] == summary["exam"] == "clinic validation" for row in rows)
    assert f"Kept: {len(rows):,} answers" in told.out and len(summary["questions"]) == 12
    assert sum(question["kept"] for question in summary["questions"]) == len(rows) == summary["answers"]["kept"]
    answers = whole.with_suffix(".answers.jsonl").read_text().splitlines(keepends=True)
    assert len(answers) == 1 + 12 * 4
    cut.with_suffix(".answers.jsonl").write_text("".join(answers[:20]) + answers[20][:9])  # killed while it wrote a line
    assert osler(*command, "--out", cut) == 0 and "Going on after 19 of 48 answers" in capsys.readouterr().err
    assert cut.read_bytes() == whole.read_bytes()
    assert osler(*command, "keep=1", "--out", cut) == 0 and "Going on after 48 of 48 answers" in capsys.readouterr().err
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for other in ("seed=1", "task.limit=3"):
        assert osler(*command, other, "--out", cut) == 2
        assert "cut.answers.jsonl has 48 answers of another model, to other questions" in capsys.readouterr().err
    with locked(cut.with_suffix(".answers.jsonl")):
        assert osler(*command, "--out", cut) == 2 and "Another process is at work on" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    kept = [json.loads(line)["id"] for line in cut.read_text().splitlines()]
    assert sorted(set(kept)) == sorted(kept) and set(kept) == {row["id"] for row in rows}
    learn = ["sft", f"init_from={runs.sft}", "data.type=turns", f"data.path={whole}", "data.thinking_field=thinking"]
    fields = ["seq_len=256", "batch_tokens=512", "total_tokens=512", "device=cpu", "compile=never", "data.holdout_fraction=0"]
    assert osler(*learn, *fields, "--run", tmp_path / "learned") == 0
    assert "learned task=questions:FILE   sit an exam" in capsys.readouterr().err


def test_an_interruption_says_how_to_go_on_and_a_task_in_the_short_form_is_the_same(runs, osler, tmp_path, capsys):
    """Ctrl-C comes where the command says that it goes on; the short form asks the same questions, or it could not go on."""
    short, out = ["distill", runs.sft, "samples=1", "max_new_tokens=12"], tmp_path / "rows.jsonl"
    assert osler(*short, "task.type=clinic", "task.split=train", "--out", out) == 0
    answers = out.with_suffix(".answers.jsonl")
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[:-1]))

    class Interrupt(logging.Handler):
        def emit(self, record):
            if record.getMessage().startswith("Going on after 399 of 400 answers"):
                signal.raise_signal(signal.SIGINT)

    logging.getLogger().addHandler(handler := Interrupt())
    assert osler(*short, "task=clinic:train", "--out", out) == 130
    logging.getLogger().removeHandler(handler)
    assert f"The answers so far stay in {answers}; the same command goes on from there" in capsys.readouterr().err


def test_what_cannot_become_rows_is_refused_in_words(runs, clinic_runs, tmp_path, capsys, fault):
    task, out = ["task.type=clinic", "task.split=train", "task.limit=2"], ["--out", str(tmp_path / "rows.jsonl")]

    def refused(*words):
        assert cli.main(["distill", *map(str, words)]) == 2
        return capsys.readouterr().err

    assert "trained on text alone and never learned to answer" in refused(clinic_runs / "textbook", *task, *out)
    assert "give a file that ends with .jsonl" in refused(runs.sft, *task, "--out", tmp_path / "rows.txt")
    assert "give a file that ends with .jsonl" in refused(runs.sft, *task, "--out", tmp_path / "gone" / "rows.jsonl")
    own = tmp_path / "own.jsonl"
    own.write_text("{}\n")
    assert "no `osler distill` wrote it: give a file of another name" in refused(runs.sft, *task, "--out", own)
    fault("write-atomic:enospc")
    assert "Free some of the disk" in refused(runs.sft, *task, *out) and not (tmp_path / "rows.summary.json").exists()
    fault("nowhere:crash")
    assert "is no folder" in refused(tmp_path / "gone", *task, *out) and "task" in refused(runs.sft, *out)
    assert "temperature above 0" in refused(runs.sft, *task, "temperature=0", *out)
    told = refused(runs.sft, *task, "max_new_tokens=1", *out)
    assert "0.0% of them right" in told and "there is nothing to learn from" in told and not (tmp_path / "rows.jsonl").exists()
    assert json.loads((tmp_path / "rows.summary.json").read_text())["answers"] == {"wrong": 16}
    shutil.copytree(runs.sft, tmp_path / "torn")
    for saved in (tmp_path / "torn" / "checkpoints").glob("step-*"):
        (saved / "model.safetensors").write_bytes(b"torn")
    assert "No checkpoint in " in refused(tmp_path / "torn", *task, *out)
