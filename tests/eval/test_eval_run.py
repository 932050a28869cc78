"""`osler eval` from the command line to the printed table and the run folder's exams.json, on models trained for seconds."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from osler.cli import main as cli
from osler.config.recipe import load_yaml
from osler.config.schema import decode
from osler.eval.config import CLINIC_EXAM, EXAM_SEED, EvalConfig, ExamSettings, config_of
from osler.eval.exams import greedy, presentations, score_by_generation, score_by_likelihood
from osler.eval.run import complete, parts, remarks, table
from osler.eval.score import Result, ScoredExam, summarise
from osler.inference.engine import InferenceEngine
from osler.inference.load import open_model
from osler.records.answers import AnswerLog, read_sheets
from osler.report.page import build_report
from osler.report.read import read_run
from osler.report.words import verdict
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder, read_json
from osler.tasks.item import ExamItem
from osler.tasks.registry import ClinicTask, load_clinic
from osler.train.config import TrainConfig
from osler.train.run import train

NOTES = ["Day 1. The fever is gone; the patient sleeps – and eats well.", "Day 2. The fever is high.", "Day 3. It is gone."]


@pytest.fixture
def runs(clinic_runs: Path, tmp_path: Path) -> Path:
    """A fresh copy: an evaluation writes into it."""
    return Path(shutil.copytree(clinic_runs, tmp_path / "runs"))


def evaluate(*arguments: str) -> int:
    return cli.main(["eval", *arguments])


def test_the_printed_score_is_the_score_and_goes_where_the_report_finds_it(runs, capsys):
    assert evaluate(str(runs / "sft"), "task.limit=12", "max_new_tokens=8", "permutations=2") == 0
    captured = capsys.readouterr()
    ready = open_model(runs / "sft", device="cpu")
    items = list(presentations(load_clinic(split="new_findings", limit=12, seed=EXAM_SEED), 2, seed=0))
    engine = InferenceEngine(ready.model)
    expected = score_by_generation(engine, ready.tokenizer, items, greedy(8))
    stored = read_json(runs / "sft" / "exams.json")
    assert list(stored) == ["sft"] and list(stored["sft"]) == ["new_findings", "new_questions"]
    row = stored["sft"]["new_findings"]
    assert row["correct"] == expected.correct and row["interval"] == list(expected.interval)
    assert row["cut"] == expected.cut and row["n"] == 12 and row["presentations"] == 24
    shown, in_all_orders = (line for line in captured.out.splitlines() if line.startswith("new_findings "))
    assert f"{expected.accuracy:.1%}" in shown and "12 × 2" in shown and "25.0%" in shown
    assert f"{expected.measures['right in all orders']['value']:.1%}" in in_all_orders.split("right in all orders")[1]
    assert "24/24 questions asked" in captured.err
    read = read_run(runs / "sft").exams
    shown = [(score.label, score.split, score.method) for score in read]
    assert shown == [("sft", "new_findings", "generation"), ("sft", "new_questions", "generation")]
    assert read[0].constant_letter_baseline == pytest.approx(0.25) and read[0].chance == pytest.approx(0.25)


def test_questions_that_do_not_fit_are_named_as_the_cause(runs, capsys):
    assert evaluate(str(runs / "sft"), "task.split=validation", "task.limit=40", "max_new_tokens=240") == 0
    out = capsys.readouterr().out
    row = read_json(runs / "sft" / "exams.json")["sft"]["validation"]
    assert (row["too_long"], row["presentations"], row["max_seq_len"]) == (40, 40, 256)
    assert "40 of 40 questions did not fit into the model's context of 256 tokens" in out and "smaller max_new_tokens" in out
    assert re.search(r"count as wrong. The first is \S+\. A smaller", out)
    assert next(line for line in out.splitlines() if line.startswith("validation ")).endswith(" 40")
    said = verdict(read_run(runs / "sft").exams[0])
    assert said.startswith("40 of 40 questions did not fit") and "guessing" not in out


def test_a_model_of_plain_text_is_scored_by_likelihood_and_that_is_said(runs, capsys):
    assert evaluate(str(runs / "textbook"), "task.split=validation", "task.limit=40", "normalise=tokens") == 0
    captured = capsys.readouterr()
    assert captured.err.count("plain text alone") == 1 and "method=likelihood" in captured.err
    rows = read_json(runs / "textbook" / "exams.json")["pretrain"]
    assert list(rows) == ["validation, cloze", "validation, cloze, raw", "validation, letters"]
    ready = open_model(runs / "textbook", device="cpu")
    items = load_clinic(split="validation", limit=40, seed=EXAM_SEED)
    for (name, row), normalise in zip(rows.items(), ("tokens", "none", "none"), strict=True):
        form = name.split(", ")[1]
        whole = score_by_likelihood(ready.model, ready.tokenizer, items, form=form, template=False, normalise=normalise)
        assert row["letters"] == whole.letters and row["interval"] == list(whole.interval)
        assert bool(row["measures"]) == (normalise == "none") == ("accuracy at 50% coverage" in row["measures"])
    assert "B " in captured.out.split("letters answered")[1]


def test_both_methods_stand_side_by_side(runs, capsys):
    assert evaluate(str(runs / "sft"), "method=both", "task.split=validation", "task.limit=4", "max_new_tokens=4") == 0
    rows = read_json(runs / "sft" / "exams.json")["sft"]
    methods = {split: row["method"] for split, row in rows.items()}
    raw = {"validation, likelihood, raw": "likelihood, raw"}
    assert methods == {"validation": "generation", "validation, likelihood": "likelihood", **raw}
    assert re.search(r"^validation +generation.*\n^validation +likelihood", capsys.readouterr().out, re.M)


def test_scores_of_other_exams_and_steps_are_kept_and_the_run_itself_comes_last(runs):
    common = ("task.limit=4", "max_new_tokens=4")
    earlier, newest = sorted((runs / "sft" / "checkpoints").glob("step-*"))[-2:]
    assert evaluate(str(runs / "sft"), "task.split=validation", *common) == 0
    assert evaluate(str(earlier), "task.split=validation", *common) == 0
    assert evaluate(str(runs / "sft"), "task.split=train", *common) == 0
    stored = read_json(runs / "sft" / "exams.json")
    assert list(stored) == [f"sft, step {int(earlier.name[5:])}", "sft"]
    assert list(stored["sft"]) == ["validation", "train"]
    assert newest.name != earlier.name


def test_a_smaller_exam_does_not_replace_a_larger_one(runs, capsys):
    run, common = runs / "sft", ("task.split=validation", "task.limit=8", "max_new_tokens=4", "method=both")
    assert evaluate(str(run), *common) == 0
    files = [run / "exams.json", *sorted(run.glob("answers/*"))]
    before = {file: file.read_bytes() for file in files}
    capsys.readouterr()
    assert evaluate(str(run), *common, "task.limit=3") == 0
    told = capsys.readouterr()
    assert {file: file.read_bytes() for file in files} == before and re.search(r"^validation +generation.* 3 ", told.out, re.M)
    assert "3 questions are asked and not saved, to keep the run's answers of this checkpoint to 8. To replace " in told.err
    assert f"delete {files[1]}." in told.err and "Saved to" not in told.err
    assert evaluate(str(run), *common, "task.limit=3", "task.seed=5") == 0  # other questions
    assert "3 questions replace the run's answers of this checkpoint to 8. " in capsys.readouterr().err
    for file in files[1:]:
        file.unlink()
    assert evaluate(str(run), *common, "task.limit=3") == 0 and read_json(files[0])["sft"]["validation"]["n"] == 3


def test_a_checkpoint_outside_a_run_folder_is_scored_and_nothing_is_written(runs, tmp_path, capsys):
    [*_, newest] = sorted((runs / "sft" / "checkpoints").glob("step-*"))
    alone = Path(shutil.copytree(newest, tmp_path / "alone"))
    before = sorted(alone.iterdir())
    assert evaluate(str(alone), "task.limit=4", "task.split=validation", "max_new_tokens=4") == 0
    assert sorted(alone.iterdir()) == before and not (tmp_path / "exams.json").exists()
    assert f"not saved: {alone} is in no run folder" in capsys.readouterr().err


def test_an_exam_from_a_file(runs, tmp_path, capsys):
    exam = tmp_path / "medqa.jsonl"
    row = {"question": "Which?", "options": {"A": "one", "B": "two"}, "answer": "two", "answer_idx": "B"}
    exam.write_text("".join(json.dumps({**row, "question": f"Which of {number}?"}) + "\n" for number in range(5)))
    task = ("task.type=medqa", f"task.path={exam}")
    assert evaluate(str(runs / "notes"), *task) == 0
    assert re.search(r"^medqa +cloze ", capsys.readouterr().out, re.M)
    assert read_json(runs / "notes" / "exams.json")["pretrain"]["medqa, cloze"]["constant_letter_baseline"] == 1.0
    assert evaluate(str(runs / "notes"), f"task.path={exam}") == 2
    assert "needs `type`, one of: clinic, gsm8k, hellaswag" in capsys.readouterr().err


def test_the_clean_subset_stands_beside_the_full_set(runs, tmp_path, capsys):
    """A run on data that were checked for an exam, and a fine-tuning that begins with it on data that were not."""
    exam, words = tmp_path / "medqa.jsonl", [f"w{number}" for number in range(400)]
    row = {"options": {"A": "one", "B": "two"}, "answer": "two", "answer_idx": "B"}
    questions = [" ".join(words[40 * number : 40 * number + 40]) for number in range(5)]
    exam.write_text("".join(json.dumps({**row, "question": f"{question}?"}) + "\n" for question in questions))
    notes = tmp_path / "notes.jsonl"
    texts = [f"Note {number}: {NOTES[number % 3]}" for number in range(40)]
    notes.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, questions[3].upper()]))
    config = load_yaml((runs / "notes" / "config.yaml").read_text(), "")
    clean = {"exams": [{"type": "medqa", "path": str(exam)}]}
    data = {"type": "files", "path": str(notes), "clean": clean, "no_benchmark_contamination": True}
    train(decode(TrainConfig, {**config, "data": data}), RunFolder.create(runs / "checked"))
    unchecked = {**config, "init_from": str(runs / "checked")}
    train(decode(TrainConfig, unchecked), RunFolder.create(runs / "unchecked"))
    task = ("task.type=medqa", f"task.path={exam}")
    assert evaluate(str(runs / "checked"), *task) == 0
    captured = capsys.readouterr()
    assert "5 of its 5 questions were looked for in the model's data. 1 were found" in captured.err
    assert re.search(r"^medqa, clean +cloze .* 4 ", captured.out, re.M)
    stored = read_json(runs / "checked" / "exams.json")["pretrain"]
    assert stored["medqa, cloze"]["n"] == 5 and stored["medqa, clean, cloze"]["n"] == 4
    assert evaluate(str(runs / "unchecked"), *task) == 0
    assert "clean" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def readers(clinic_runs: Path, tmp_path_factory) -> Path:
    """Two runs of one step that read 640 tokens, with dense and with sparse attention."""
    root = tmp_path_factory.mktemp("readers")
    config = load_yaml((clinic_runs / "sft" / "config.yaml").read_text(), "")
    config |= {"model": {**config["model"], "max_seq_len": 640}, "total_tokens": 512}
    config["data"] |= {"cards": 0, "drills": 0}
    index = {"index_heads": 2, "index_head_dim": 16, "top_k": 64, "local_window": 16}
    for name, fields in {"dense": {}, "sparse": index}.items():
        model = {**config["model"], "attention": {"type": name, **fields}}
        assert train(decode(TrainConfig, {**config, "model": model}), RunFolder.create(root / name))
    return root


def test_a_needle_test_by_length_and_depth_goes_on_and_is_compared(readers, capsys):
    command = ("--needle", "task.lengths=[420,640]", "task.depths=[0,100]", "task.limit=3")
    assert evaluate(str(readers / "dense"), *command, "--json", str(readers / "scores.json")) == 0
    printed = capsys.readouterr().out
    assert re.search(r"copy, cloze: accuracy by .*\ntokens +0% deep +100% deep\n420 +\d+% +\d+%\n640 ", printed)
    answers = readers / "dense" / "answers" / "sft-needle-cloze.jsonl"
    whole, lines = answers.read_text(), answers.read_text().splitlines(keepends=True)
    answers.write_text("".join(lines[:5]))
    assert evaluate(str(readers / "dense"), *command) == 0
    again = capsys.readouterr()
    assert "Going on after 4 of 12" in again.err and again.out == printed and answers.read_text() == whole
    scores = read_json(readers / "scores.json")["scores"]
    assert [(one["split"], one["n"], one["too_long"]) for one in scores[::2]] == [("needle", 12, 0), ("copy", 12, 0)]
    assert list(scores[0]["groups"]) == [f"{length} tokens, {depth}% deep" for length in (420, 640) for depth in (0, 100)]
    assert evaluate(str(readers / "sparse"), *command) == 0
    assert cli.main(["compare", *(str(readers / name) for name in ("dense", "sparse")), "--out", str(readers / "both.html")]) == 0
    table = capsys.readouterr().out
    assert re.search(r"^needle, cloze +dense → sparse .* 12$", table, re.M)
    assert len(re.findall('<svg class="chart heat"', (readers / "both.html").read_text())) == 4
    page = build_report(readers / "dense").read_text()
    assert len(re.findall('<svg class="chart heat"', page)) == 2 and "fine-tuning on copy, cloze, accuracy by length" in page


def test_a_needle_test_that_does_not_fit_is_refused_by_name(readers, capsys):
    for fields, said in (
        (["task.lengths=[420,641]"], "lengths has 641, and the model reads 640 tokens (max_seq_len): ask for lengths up to 640"),
        (["method=both", "max_new_tokens=400"], "lengths has 240, which is too short: needle-7001-000000 takes 3"),
        (["task.lengths=[256]"], "tokens with a history of 5 visits. Ask for more, such as lengths=[512]."),
        (["task.lengths=[99]"], "lengths has 99, which is too short"),
        (["task.depths=[50,101]"], "task.depths[1]"),
        (["task.lengths=[420,420]"], "lengths [420, 420] has a number twice"),
        (["task.split=hay"], "no split 'hay'"),
        (["task=medqa:x"], "--needle is an exam, and another is given"),
    ):
        assert evaluate(str(readers / "dense"), "--needle", *fields) == 2
        assert said in capsys.readouterr().err


def test_questions_without_options_cannot_be_scored_by_likelihood(runs, tmp_path, capsys):
    sums = tmp_path / "sums.jsonl"
    sums.write_text(json.dumps({"question": "What is 6 x 7?", "answer": "six sevens\n#### 42"}) + "\n")
    command = (str(runs / "sft"), "task.type=gsm8k", f"task.path={sums}")
    assert evaluate(*command, "method=likelihood") == 2
    assert "no options" in capsys.readouterr().err
    assert evaluate(*command, "max_new_tokens=4") == 0
    assert re.search(r"^gsm8k +generation .*– +– ", capsys.readouterr().out, re.M)


def test_a_text_by_name_is_measured_by_words_too(runs, tmp_path, capsys):
    lines = [" = Fever = ", "It is high .", " = = Course = = ", "It is gone .", " = Rash = ", "It stays ."]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    command = (str(runs / "notes"), "source.name=wikitext", f"source.path={tmp_path}")
    assert evaluate(*command) == 0
    captured = capsys.readouterr()
    num_bytes = sum(len(line) + 1 for line in lines)
    assert "2/2 documents" in captured.err and f"{num_bytes} bytes" in captured.out
    assert re.search(r"^wikitext-test: .* perplexity \d+\.\d, \d+\.\d by words", captured.out)
    assert evaluate(*command, "documents=1") == 0
    assert "1/1 documents" in capsys.readouterr().err
    assert evaluate(str(runs / "notes"), "source.name=wikitex") == 2
    assert "source.name=wikitex is no source" in capsys.readouterr().err


def test_text_is_measured_in_bits_per_byte_whatever_the_window_of_a_table(runs, tmp_path, capsys):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text(NOTES[0] + "\n\n" + NOTES[1], encoding="utf-8")
    (folder / "blank.txt").write_text(" \n")
    (folder / "b.jsonl").write_text(json.dumps({"text": NOTES[2]}) + "\n")
    assert evaluate(str(runs / "notes"), f"text={folder}") == 0
    captured = capsys.readouterr()
    num_bytes = len((NOTES[0] + "\n\n" + NOTES[1] + NOTES[2]).encode())
    assert f"({num_bytes:,} bytes" in captured.out and "128 tokens at a time" in captured.out
    assert "2/2 documents" in captured.err and "exam" not in captured.out
    bits = [float(captured.out.split(": ")[1].split()[0])]
    assert evaluate(str(runs / "notes"), f"text={folder}", "seq_len=16") == 0
    bits.append(float(capsys.readouterr().out.split(": ")[1].split()[0]))
    assert bits[0] != bits[1] and bits[0] == pytest.approx(bits[1], rel=0.2)


def test_a_run_on_text_of_ones_own_is_measured_on_its_held_out_part(runs, capsys):
    assert evaluate(str(runs / "notes")) == 0
    line = capsys.readouterr().out
    logged = [json.loads(text) for text in (runs / "notes" / "metrics.jsonl").read_text().splitlines()]
    expected = [entry["eval/bits_per_byte"] for entry in logged if "eval/bits_per_byte" in entry][-1]
    assert line.startswith(f"the run's held-out text: {expected:.4f} bits per byte")
    shutil.rmtree(runs / "notes" / "data")
    assert evaluate(str(runs / "notes")) == 2
    assert "text=FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task.split=finals"], "no exam split 'finals'"),
        (["task.limit=0"], "task.limit: must be at least 1"),
        (["task={type: medqa, path: x.txt, limit: -1}"], "task.limit: must be at least 1"),
        (["max_new_tokens=400"], "no room for a question"),
        (["text=no/such/folder"], "no file or folder no/such/folder"),
        (["method=guess"], "method"),
        (["permutations=0"], "permutations: must be at least 1"),
        (["task.limt=3"], "did you mean `task.limit`"),
        (["seq_len=4000", "text=x.txt"], "max_seq_len"),
        (["temperature=1e-40"], "temperature is 1e-40: give 0"),
        (["samples=4"], "needs a temperature above 0"),
        (["task=medqa"], "path"),
        (["task=medqa", "task.split=validation", "root=."], "task.split=validation: an exam by name asks one split, test."),
        (["task.type=hub", "task.name=medqa", "task.split=validation", "root=."], "an exam by name asks one split, test."),
        (["task.type=hub", "task.name=medqa", "task.split=tset", "root=."], "task.split=tset: an exam by name asks"),
        (["task=clinic,medqb:x.jsonl"], "unknown type `medqb`; did you mean `medqa`?"),
        (["task=clinic", "tasks=[clinic]"], "task and tasks are both given"),
        (["tasks=[{type: medqa, path: no.jsonl}]"], "no file or folder no.jsonl"),
        (["task=clinic", "--json", "no/such/scores.json"], "there is no folder no/such"),
    ],
)
def test_mistakes_are_one_message(runs, arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("Some text.")
    assert evaluate(str(runs / "sft"), *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_folder_of_runs_names_them(runs, capsys):
    assert evaluate(str(runs)) == 2
    assert f"{runs / 'sft'}, {runs / 'textbook'}" in capsys.readouterr().err


def test_a_task_without_type_is_the_clinic_with_some_fields_changed():
    found = parts(config_of(["task.limit=7"]))
    assert list(found) == ["new_findings", "new_questions"]
    assert all(part.limit == 7 and part.seed == EXAM_SEED for part in found.values())
    assert list(parts(config_of(["task.type=clinic", "task.split=validation"]))) == ["validation"]
    assert parts(config_of(["task.limit=7", "task=clinic:new_findings"])) == {"new_findings": found["new_findings"]}
    assert config_of(["text=notes/"]).task is None
    with pytest.raises(match=r"task\.path"):
        config_of(["task.type=pubmedqa"])
    for limited in ("task.limit=5", "tasks=[{type: medqa, path: a.jsonl, limit: 5}]"):
        with pytest.raises(UserError, match="subset and limit both say how many"):
            config_of([limited, "subset=9"])
    twice = "{type: medqa, path: a.jsonl, split: dev}"
    with pytest.raises(UserError, match=r"medqa dev a\.jsonl is given twice"):
        parts(config_of([f"tasks=[{twice}, {twice}, {twice}]"]))
    with pytest.raises(UserError, match="new_findings of the exam clinic is given twice"):
        parts(config_of(["tasks=[clinic, {type: clinic, split: new_findings, seed: 1}]"]))
    with pytest.raises(ValueError, match="task and tasks are both given"):
        ExamSettings(task=CLINIC_EXAM, tasks=(CLINIC_EXAM,))


def test_an_exam_is_known_by_its_name(runs, tmp_path, capsys):
    [(name, task)] = parts(config_of(["task=pubmedqa", "subset=9"])).items()
    assert (name, task.type, task.name, task.limit, task.seed) == ("pubmedqa", "hub", "pubmedqa", 9, 0)
    folder = tmp_path / "root" / "gsm8k"
    folder.mkdir(parents=True)
    for split, count in (("train", 3), ("test", 5)):
        rows = [{"question": f"What is {n} x {count}?", "answer": f"It is.\n#### {n * count}"} for n in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (f"root={folder.parent}", "max_new_tokens=4")
    assert evaluate(str(runs / "textbook"), "task=gsm8k", *words) == 0  # the official split, test
    captured = capsys.readouterr()
    assert re.findall("^gsm8k +(.*?)  ", captured.out, re.M) == [
        "generation", "generation, strict-match", "generation, flexible-extract"
    ]  # fmt: skip
    assert read_json(runs / "textbook" / "exams.json")["pretrain"]["gsm8k"]["n"] == 5 and "test.jsonl" in captured.err
    assert evaluate(str(runs / "textbook"), "task=gsm8kk", *words) == 2
    assert "task: gsm8kk is no exam that Osler knows; did you mean `gsm8k`?" in capsys.readouterr().err
    assert evaluate(str(runs / "textbook"), "task=clinik", *words) == 2
    assert "did you mean `clinic`?" in capsys.readouterr().err
    assert evaluate(str(runs / "textbook"), "task=gsm8k", "root=nowhere") == 2
    assert "no file or folder nowhere/gsm8k; set root to one" in capsys.readouterr().err
    assert cli.main(["show", "eval", "task=medqa:a.jsonl"]) == 0
    assert "path: a.jsonl" in capsys.readouterr().out


def test_a_model_that_was_taught_can_be_asked_as_plain_text_asks(runs, tmp_path, capsys):
    options = dict(zip("ABCD", ("iron", "zinc", "gold", "tin"), strict=True))
    row = {"question": "What helps?", "options": options, "answer": "zinc", "answer_idx": "B"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    task = f"task=medqa:{tmp_path / 'a.jsonl'}"
    for method, methods in (("auto", ["cloze", "cloze, raw", "letters"]), ("generation", ["generation"])):
        assert evaluate(str(runs / "sft"), task, "prompt=plain", f"method={method}", "max_new_tokens=8") == 0
        asked = re.findall("^medqa, plain prompt +(.*?)  ", capsys.readouterr().out, re.M)
        assert list(dict.fromkeys(asked)) == methods
    [sheet] = (sheet for sheet in read_sheets(runs / "sft" / "answers") if sheet.method == "letters")
    assert sheet.settings == {"permutations": 1, "template": False, "normalise": "none"}


def test_a_grpo_run_without_the_clinic_sits_the_exam_it_was_evaluated_on(clinic_runs):
    ready = open_model(clinic_runs / "notes", device="cpu")
    exam = {"type": "medqa", "path": "test.jsonl", "split": "test"}
    other = replace(ready, training={"tasks": [{"task": {"type": "medqa", "path": "train.jsonl"}}], "eval_task": exam})
    config, shards = complete(EvalConfig(), other)
    assert list(parts(config)) == ["medqa test"] and not shards
    with pytest.raises(UserError, match="task=medqa:FILE"):
        complete(EvalConfig(), replace(ready, training={"data": {"type": "turns"}}))
    taught = replace(ready, training={"data": {"type": "prepared", "path": str(clinic_runs / "sft" / "data")}})
    assert complete(EvalConfig(), taught)[0].task == CLINIC_EXAM
    unlike = {"type": "prepared", "path": str(clinic_runs / "notes" / "data")}
    assert not replace(ready, training={"data": unlike}).knows_clinic
    given = EvalConfig(task=ClinicTask())
    assert complete(given, other) == (given, {})


@pytest.mark.parametrize(
    "words",
    [
        "task=medqa:a.jsonl,clinic:train",
        "tasks=[medqa:a.jsonl, {split: train}]",
        "task=[{type: medqa, path: a.jsonl}, clinic:train]",
    ],
)
def test_several_exams_are_named_as_a_person_would(words):
    found = parts(config_of([words]))
    assert list(found) == ["medqa", "train"] and found["medqa"].path == "a.jsonl" and found["train"].seed == EXAM_SEED
    assert list(parts(config_of(["task=medqa:a.jsonl,medqa:b.jsonl"]))) == ["medqa", "medqa b.jsonl"]
    found = parts(config_of([words, "subset=9", "seed=4"]))
    assert (found["medqa"].limit, found["medqa"].seed, found["train"].limit) == (9, 4, 9)


def test_several_exams_are_one_table_and_json_and_a_page_with_the_wrong_answers_first(runs, tmp_path, capsys):
    sums, scores = tmp_path / "sums.jsonl", tmp_path / "scores.json"
    sums.write_text("".join(json.dumps({"question": f"What is {n} x 7?", "answer": f"#### {7 * n}"}) + "\n" for n in range(5)))
    words = ("method=both", "subset=4", "max_new_tokens=4", "samples=2", "temperature=0.7", "--json", str(scores))
    assert evaluate(str(runs / "sft"), "task=clinic:validation", *words) == 0
    assert evaluate(str(runs / "sft"), f"task=gsm8k:{sums},clinic:train", *words[1:]) == 0
    told = read_json(scores)
    rows = [(score["label"], score["split"], score["n"]) for score in told["scores"]]
    assert rows == [("sft", "gsm8k", 4), ("sft", "train", 4)]
    assert told["scores"][1]["measures"].keys() == {"pass@2", "majority of 2"} and told["config"]["subset"] == 4
    out = capsys.readouterr().out
    for line in (r"^train +generation +pass@2 .* 4$", r"^validation +likelihood, raw .* 4 "):
        assert re.search(line, out, re.M)
    run = read_run(runs / "sft")
    assert [(sheet.name, len(sheet.answers)) for sheet in run.answers] == [
        ("gsm8k", 8), ("train", 8), ("validation", 8), ("validation, likelihood", 4)
    ]  # fmt: skip
    page = build_report(run).read_text(encoding="utf-8").split('id="answers"')[1].split("</section>")[0]
    marks = [re.findall("✓|✗", part) for part in page.split("<details>")[1:5]]
    assert all(found == sorted(found, reverse=True) for found in marks) and "✗" in marks[0]


@pytest.mark.parametrize("method", ["generation", "likelihood"])
def test_an_interrupted_evaluation_goes_on_where_it_stopped(runs, method, capsys, monkeypatch):
    command = (str(runs / "sft"), "task=clinic:validation", "subset=9", f"method={method}", "max_new_tokens=4", "rows=2")
    assert evaluate(*command) == 0
    whole = read_json(runs / "sft" / "exams.json")
    add = AnswerLog.add

    def dies(log, number, *rest):
        add(log, number, *rest)
        if len(log.outputs) == 5:
            raise KeyboardInterrupt

    def interrupted() -> Path:
        with monkeypatch.context() as patched:
            patched.setattr(AnswerLog, "add", dies)
            assert evaluate(*command) == 130
        [path] = (runs / "sft" / "answers").glob("*.jsonl")
        with path.open("a") as file:
            file.write('{"number": 8, "out')  # a torn line
        (runs / "sft" / "exams.json").unlink()
        assert not read_sheets(path.parent)
        capsys.readouterr()
        return path

    path = interrupted()
    assert evaluate(*command) == 0
    assert "Going on after 5 of 9 answers" in capsys.readouterr().err and read_json(runs / "sft" / "exams.json") == whole
    [sheet] = read_sheets(path.parent)
    assert len(sheet.answers) == 9 and sheet.method == method
    assert evaluate(*command) == 0 and "Going on" not in capsys.readouterr().err  # it was finished
    interrupted()
    other = ("max_new_tokens=5",) if method == "generation" else ("normalise=tokens",)
    assert evaluate(*command, *other) == 0 and "Going on" not in capsys.readouterr().err
    assert len(read_sheets(path.parent)[0].answers) == 9


def test_runs_and_checkpoints_are_compared_question_by_question(runs, capsys, tmp_path):
    earlier = sorted((runs / "sft" / "checkpoints").glob("step-*"))[-2]
    words = ("task=clinic:validation", "method=likelihood")
    for checkpoint, subset in ((earlier, 30), (runs / "sft", 40), (runs / "textbook", 30)):
        assert evaluate(str(checkpoint), *words, f"subset={subset}") == 0
    capsys.readouterr()
    assert cli.main(["compare", str(earlier), str(runs / "sft")]) == 0
    titles, line = capsys.readouterr().out.strip().splitlines()
    assert titles.split()[0] == "exam" and f"{earlier.name} → sft" in line and line.endswith("30 of 40")
    before, after = ({answer.id: answer.correct for answer in sheet.answers} for sheet in read_sheets(runs / "sft" / "answers"))
    gained, lost = (sum(after[name] - before[name] == change for name in before) for change in (1, -1))
    assert line.split()[-6:-4] == [str(gained), str(lost)]
    assert evaluate(str(earlier), *words, "subset=30", "normalise=none") == 0
    assert cli.main(["compare", str(earlier), str(runs / "sft")]) == 2
    assert "validation, likelihood is not compared" in (told := capsys.readouterr().err)
    assert "asked differently: normalise=none and normalise=bytes" in told
    assert cli.main(["compare", str(runs / "textbook"), str(earlier)]) == 2  # letters and cloze against the answer as taught
    assert "no answers to the same exam" in capsys.readouterr().err
    assert cli.main(["compare", str(runs / "sft"), str(runs / "notes"), "--out", str(tmp_path / "page.html")]) == 0
    assert "stores the answers" in capsys.readouterr().out


def test_remarks_say_what_a_score_is_worth():
    def score(right: int, wrong: int, status: str = "answered") -> ScoredExam:
        items = [ExamItem(str(k), "?", ("a", "b", "c", "d"), answer_index=k % 4) for k in range(right + wrong)]
        results = [Result(each, status, right=k < right, predicted=0) for k, each in enumerate(items)]
        return replace(summarise(results), split="exam", method="generation")

    assert list(remarks(score(90, 10))) == []
    assert "not told apart" in next(remarks(score(26, 74)))
    assert "worse than the better of guessing" in next(remarks(score(2, 98)))
    assert "max_new_tokens" in list(remarks(score(0, 100, "cut")))[1]
    [cause] = remarks(score(0, 100, "too_long"))  # no question was asked, so nothing is worse than guessing
    assert "did not fit" in cause
    wide = table([score(90, 10), score(1, 1)]).splitlines()
    assert len({line.index("generation") for line in wide[1:3]}) == 1 and len(wide[0]) == len(wide[1])
