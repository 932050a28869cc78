"""Exams: good files load whole, broken ones are refused by file, line and field, the clinic's items stay what they are."""

import gzip
import json
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from osler.clinic.exam import exam
from osler.config.schema import decode
from osler.data.named import load_task
from osler.runtime.errors import UserError
from osler.tasks.answers import read_answer, read_choice, read_number
from osler.tasks.item import ExamItem, permute, render_answer, render_plain, render_question, shared_questions, spelling
from osler.tasks.programs import PASSED, complete, run_tests
from osler.tasks.registry import ClinicTask, TaskConfig, load_clinic
from osler.tokenizer.chat import Completion

FindShared = Callable[[str], Path]
OPTIONS = {"A": "one", "B": "two", "C": "x", "D": "y"}
ROWS: dict[str, dict[str, Any]] = {
    "medqa": {"question": "Which?", "answer": "two", "answer_idx": "B", "options": OPTIONS},
    "medmcqa": {
        "id": "m1", "question": "Which?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 2, "exp": None,
        "subject_name": "Dental",
    },
    "pubmedqa": {
        "pubid": 7, "question": "Does it?", "context": {"contexts": ["One.", "Two."]}, "long_answer": "It does not.",
        "final_decision": "no",
    },
    "gsm8k": {"question": "6 x 7?", "answer": "6 x 7 = <<6*7=42>>42 apples.\n#### 42"},
    "mmlu": {"question": "Which?", "subject": "anatomy", "choices": ["one", "two", "x", "y"], "answer": 1},
    "humaneval": {
        "task_id": "HumanEval/0", "prompt": "def f():\n    \"\"\"One.\"\"\"\n", "canonical_solution": "    return 1\n",
        "test": "def check(f):\n    assert f() == 1", "entry_point": "f",
    },
    "hellaswag": {
        "activity_label": "Baking bread", "ctx_a": "[header] How to bake [title] Mix  it. A man", "ctx_b": "then",
        "endings": ["flies. [step] Away.", "bakes."], "label": "1",
    },
    "trivia_qa": {"question": "Which?", "question_id": "q_1", "answer": {"value": "The Onion", "aliases": ["Bulb onion"]}},
    "questions": {"question": "Which?", "options": ["one", "two"], "answer": "B"},
}  # fmt: skip


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(name: str, path: Path, **settings: Any) -> list[ExamItem]:
    return load_task(decode(TaskConfig, {"type": name, "path": str(path), **settings}))  # type: ignore[arg-type]


REAL = {
    "medqa": ("medqa-dev.jsonl", {"C": 352, "A": 330, "B": 316, "D": 274}),
    "medmcqa": ("medmcqa-validation-2000.jsonl", {"A": 646, "B": 533, "C": 437, "D": 384}),
    "pubmedqa": ("pubmedqa-labeled-train-500.jsonl", {"A": 276, "B": 169, "C": 55}),
}


@pytest.mark.parametrize("name", REAL)
def test_real_exams_load_whole_and_every_answer_is_read_back_in_any_order(name: str, shared_data: FindShared) -> None:
    items = load(name, shared_data(f"exams/{REAL[name][0]}"), split="dev")
    assert len({item.id for item in items}) == len(items)
    assert Counter("ABCD"[item.answer_index] for item in items) == REAL[name][1]
    for item in items:
        for visit in range(2):
            shown = permute(item, 0, visit)
            assert read_choice(render_answer(shown), shown.options) == shown.answer_index
    first = items[0]
    assert first.split == "dev"
    if name == "medqa":
        assert first.options[first.answer_index] == "Ceftriaxone"
    elif name == "medmcqa":
        assert first.options[3] == "Hypotonic upper lip" and first.answer_index == 3 and first.group == "Dental"
        explained = [item.thinking for item in items if item.thinking]
        assert 700 < len(explained) < 1082  # of 1,082 explanations the ones that say more than a letter
        assert not any(text.lower().startswith(("ans. ", "ans: ", "answer- ")) for text in explained)
        pairs = shared_questions(items[:1000], items[1000:])
        assert len(pairs) == 3  # the file has them twice, with a letter or the case of an option changed
        assert all(item.answer_index == other.answer_index for item, other in pairs)
    else:
        assert first.id == "pubmedqa-10808977" and all(item.context and item.thinking for item in items)


def test_real_trivia_and_programs_load_whole_and_every_spelling_is_right(shared_data: FindShared) -> None:
    trivia, programs = load("trivia_qa", shared_data("exams/triviaqa-3000.jsonl")), shared_data("exams/humaneval.jsonl.gz")
    assert len(trivia) == 3000
    for item in trivia:
        for said in item.aliases:
            shown = Completion(thinking="", answer=f"The {said}!", finished=True, well_formed=True)
            assert read_answer(item, shown).right or not spelling(said)
    items = load("humaneval", programs, split="test")
    assert len(items) == 164 and all("\ndef " in f"\n{item.question}" for item in items)
    for item in items[::13]:
        own, empty = (run_tests(complete(item.question, text), item.tests) for text in (item.answer, "pass"))
        assert own == PASSED != empty


def test_real_gsm8k_loads_whole(shared_data: FindShared) -> None:
    items = load("gsm8k", shared_data("exams/gsm8k-train.jsonl"))
    assert len(items) == len({item.id for item in items}) == 7473
    assert items[0].answer == "72" and "109200000" in {item.answer for item in items}
    for item in items:
        assert read_number(item.answer) == Decimal(item.answer) and item.options == ()
        assert item.thinking and "<<" not in item.thinking and "####" not in item.thinking


@pytest.mark.parametrize("name", ROWS)
def test_plain_gzipped_and_parquet_files_give_the_same_items(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    plain = lines(tmp_path / "exam.jsonl", row, row | dict.fromkeys({"question", "prompt", "ctx_b"} & set(row), "Another?"))
    (tmp_path / "exam.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    pq.write_table(pa.Table.from_pylist([json.loads(line) for line in plain.read_text().splitlines()]), tmp_path / "e.parquet")
    items = load(name, plain, split="s")
    assert "nother?" in items[1].question and "nother?" not in items[0].question and items[0].split == "s"
    assert load(name, tmp_path / "exam.jsonl.gz", split="s") == load(name, tmp_path / "e.parquet", split="s") == items
    assert load(name, plain, split="s", limit=1) == items[:1]


OPTIONAL = {("medmcqa", "exp"), ("medmcqa", "subject_name"), ("questions", "options")}
NEEDED = [(name, field) for name, row in ROWS.items() for field in row if (name, field) not in OPTIONAL]


@pytest.mark.parametrize(("name", "field"), NEEDED)
def test_a_missing_field_is_named_with_file_and_line(name: str, field: str, tmp_path: Path) -> None:
    row = ROWS[name]
    path = lines(tmp_path / "exam.jsonl", row, {key: value for key, value in row.items() if key != field})
    with pytest.raises(UserError, match=f"exam.jsonl:2: the field '{field}.*is missing") as caught:
        load(name, path)
    assert "Expected the schema of" in str(caught.value) and "another `type`" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("medqa", {"answer_idx": "E"}, "'answer_idx' is 'E'"),
        ("medqa", {"answer": "one"}, "another option"),
        ("medqa", {"options": {"A": "one", "C": "x"}}, "without a gap"),
        ("medqa", {"options": {"A": "one", "B": None, "C": "x"}}, "not A, C; without a text: B"),
        ("medqa", {"options": "one, two"}, "must be an object or a list"),
        ("medqa", {"options": {"A": "one"}}, "has 1 options; it needs 2 to 26"),
        ("medqa", {"options": [f"text {number}" for number in range(27)]}, "has 27 options; it needs 2 to 26"),
        ("medqa", {"options": [{"key": "A", "value": text} for text in "xy"]}, "has two options with one letter among A, A"),
        ("medqa", {"options": {**OPTIONS, "note": "z"}}, "without a gap, not A, B, C, D, note"),
        ("medqa", {"options": {**OPTIONS, "C": " "}}, "option C in 'options' must be a text that is not empty"),
        ("medqa", {"question": " "}, "'question' is empty"),
        ("medmcqa", {"cop": "2"}, "'cop' must be a whole number"),
        ("medmcqa", {"cop": 5}, "'cop' is 5"),
        ("medmcqa", {"cop": True}, "must be a whole number"),
        ("pubmedqa", {"final_decision": "perhaps"}, "'perhaps'"),
        ("pubmedqa", {"context": {"contexts": []}}, "list of texts"),
        *(("gsm8k", {"answer": answer}, "must end in '#### '") for answer in ("is 42", "#### NaN", "#### 1_000", "#### 1,08")),
        ("gsm8k", {"answer": None}, "must be text"),
        ("mmlu", {"answer": 4}, "'answer' is 4, which is none of the 4 options, counted from 0"),
        ("mmlu", {"answer": "B"}, "must be a whole number"),
        ("mmlu", {"choices": ["one"]}, "has 1 options"),
        ("humaneval", {"test": ""}, "'test' is empty"),
        ("hellaswag", {"label": ""}, "'label' must be the number of one of the 2 'endings'"),
        ("hellaswag", {"label": "2"}, "'label' must be the number"),
        ("trivia_qa", {"answer": {"value": "Onion"}}, "'answer.aliases' is missing"),
        ("questions", {"options": ["one", " one."]}, "two options in 'options' have the same text"),
        ("questions", {"options": ["one", 2]}, "option 1 in 'options' must be a text"),
        ("questions", {"answer": "C"}, "'answer' is 'C', which names none of the 2 options; give the text of one, a letter"),
        ("questions", {"answer": 2}, "'answer' is 2, which names none"),
        ("questions", {"options": ["B", "one"]}, "names more than one"),
        ("questions", {"options": None, "answer": []}, "'answer' is empty"),
        ("questions", {"options": None, "choices": ["one", "two"]}, "the answer is B, .* set options_field=choices?"),
    ],
)
def test_a_wrong_value_is_refused(name: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"exam.jsonl:1: .*{message}"):
        load(name, lines(tmp_path / "exam.jsonl", ROWS[name] | change))


def test_files_that_are_no_exam_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "exam.csv").write_text("a,b\n")
    for name, said in {
        "empty.jsonl": r"empty\.jsonl has no rows",
        "exam.csv": r"exam\.csv is of a kind that cannot be read here.*\.parquet",
        "absent.jsonl": r"no file or folder .*absent\.jsonl; set task\.path to",
    }.items():
        with pytest.raises(UserError, match=said):
            load("medqa", tmp_path / name)


def test_an_exam_may_be_a_folder_and_have_five_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    five = ROWS["medqa"] | {"options": {**OPTIONS, "E": "five"}, "answer_idx": "E", "answer": "five"}
    lines(tmp_path / "a.jsonl", five)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROWS["medqa"]).encode()))
    (tmp_path / "notes.csv").write_text("x")
    keyed = [{"key": letter, "value": text} for letter, text in five["options"].items()]  # another file of five options has these
    lines(tmp_path / "c.jsonl", five | {"options": keyed})
    items = load("medqa", tmp_path)
    assert [item.answer_index for item in items] == [4, 1, 4] and items[0] == items[2]
    assert f"{tmp_path}: left out: 1 .csv." in capsys.readouterr().err


def test_what_the_rows_of_other_exams_become(tmp_path: Path) -> None:
    read = {name: load(name, lines(tmp_path / f"{name}.jsonl", ROWS[name]))[0] for name in ROWS}
    mmlu, story, trivia, program = (read[name] for name in ("mmlu", "hellaswag", "trivia_qa", "humaneval"))
    assert (mmlu.options[mmlu.answer_index], mmlu.group) == ("two", "anatomy")
    assert render_plain(story, "cloze") == "Baking bread: How to bake. Mix it. A man Then"
    assert story.options == ("flies. Away.", "bakes.")
    assert render_question(story) == f"{render_plain(story, 'cloze')} flies. Away. (A) bakes. (B)" and story.answer_index == 1
    assert (trivia.answer, trivia.aliases) == ("The Onion", ("The Onion", "Bulb onion"))
    assert program.question.startswith("def f") and program.tests.endswith("== 1\n\ncheck(f)\n")


@pytest.mark.parametrize(
    ("row", "settings", "answer"),
    [
        ({"options": ["one", "two"], "answer": "two."}, {}, "two (B)"),
        ({"options": {"A": "one", "B": "two"}, "answer": "B"}, {}, "two (B)"),
        ({"options": ["one", "two"], "answer": 1}, {}, "two (B)"),
        ({"options": ["one", "two"], "answer": 1}, {"first_option": 1}, "one (A)"),
        ({"options": ["3", "2", "1"], "answer": "1"}, {}, "1 (C)"),
        ({"choices": ["one", "two"], "q": {"right": "A"}}, {"options_field": "choices", "answer_field": "q.right"}, "one (A)"),
        ({"answer": "about half"}, {}, "about half"),
        ({"answer": 0.5, "options": None}, {}, "0.5"),
        ({"answer": "rest", "choices": None}, {"options_field": "choices"}, "rest"),
        ({"answer": ["gout", "podagra"]}, {}, "gout"),
    ],
)
def test_questions_of_ones_own(row: dict[str, Any], settings: dict[str, Any], answer: str, tmp_path: Path) -> None:
    [item] = load("questions", lines(tmp_path / "own.jsonl", {"question": "Which?", **row}), **settings)
    assert render_answer(item) == answer and item.aliases == (("gout", "podagra") if answer == "gout" else ())


def test_a_limit_takes_the_first_questions_or_draws_them_by_a_seed(tmp_path: Path) -> None:
    path = lines(tmp_path / "e.jsonl", *(ROWS["gsm8k"] | {"question": f"{number} x 7?"} for number in range(40)))
    items = load("gsm8k", path)
    assert load("gsm8k", path, limit=5) == items[:5] and load("gsm8k", path, limit=50, seed=1) == items
    five, ten, other = (load("gsm8k", path, limit=limit, seed=seed) for limit, seed in ((5, 1), (10, 1), (5, 2)))
    assert [item for item in items if item in ten] == ten and all(item in ten for item in five) and five != other
    assert five not in (items[:5], items[-5:]) and len(five) == 5


def test_solved_examples_stand_before_each_question(tmp_path: Path) -> None:
    exam = lines(tmp_path / "e.jsonl", ROWS["medqa"], ROWS["medqa"] | {"question": "What then?"})
    train = lines(tmp_path / "t.jsonl", *(ROWS["medqa"] | {"question": f"Example {number}?"} for number in range(3)))
    items = load("medqa", exam, shots=2, shots_path=str(train))
    solved = [f"Example {number}? one (A) two (B) x (C) y (D)\nAnswer: two (B)\n\n" for number in range(2)]
    assert render_question(items[1]) == "".join([*solved, "What then? one (A) two (B) x (C) y (D)"])
    assert permute(items[1], 0, 1).shots == items[1].shots
    for settings, told in (
        ({"shots": 4, "shots_path": str(train)}, "has 3 questions, fewer than shots=4"),
        ({"shots": 1, "shots_path": str(exam)}, "the example medqa-.* is also a question of"),
        ({"shots": 1, "shots_path": "none"}, "no file or folder none; set task.shots_path"),
        ({"shots": 1}, "shots=1 needs shots_path"),
    ):
        with pytest.raises(UserError, match=told):
            load("medqa", exam, **settings)


def test_only_what_is_asked_for_is_taken_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subjects = ["anatomy", "astronomy", "anatomy"]
    path = lines(tmp_path / "mmlu.jsonl", *(ROWS["mmlu"] | {"subject": subject} for subject in subjects))
    assert len(load("mmlu", path, split="test")) == 2
    said = capsys.readouterr().err
    assert "1 of 3 rows have another subject" in said and "has 2 questions of mmlu; the test split that models" in said
    with pytest.raises(UserError, match="no row whose 'subject' is genetics; it has anatomy, astronomy"):
        load("mmlu", path, subjects=["anatomy", "genetics"])
    ids, papers = tmp_path / "ids.json", lines(tmp_path / "p.jsonl", *(ROWS["pubmedqa"] | {"pubid": pubid} for pubid in (7, 8)))
    ids.write_text('{"8": "no"}')
    assert [item.id for item in load("pubmedqa", papers, ids=str(ids))] == ["pubmedqa-8"]
    ids.write_text("[]")
    with pytest.raises(UserError, match="no row whose 'pubid' is one of those that are asked for; it has 7, 8"):
        load("pubmedqa", papers, ids=str(ids))


def test_an_exam_that_prints_an_option_twice_loads_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = lines(tmp_path / "twice.jsonl", ROWS["medqa"], ROWS["medqa"] | {"options": {**OPTIONS, "D": "one"}})
    assert len(load("medqa", path)) == 2
    assert "1 questions print an option twice, first" in (said := capsys.readouterr().err) and "twice.jsonl:2" in said


@pytest.mark.parametrize(
    ("cops", "settings", "found"),
    [
        ([1, 4, 2, 3], {}, "counts its options from 1.*first_option=1 beside its path"),
        ([1, 4, 2, 3], {"limit": 1}, "counts its options from 1"),  # the whole file is looked at
        ([1, 4, 2, 3], {"first_option": 1}, [0, 3, 1, 2]),
        ([1, 2, 3] * 20, {}, "from 1 to 3"),
        ([1, 2, 3], {}, [1, 2, 3]),  # too few to tell
        ([0, 1, 2, 3], {"first_option": 1}, "counts from 0"),
        ([0, 4], {}, "mixed"),
        ([0, -1, 3, None], {}, [0, 3]),
        ([-1, -1], {}, "test split"),
    ],
)
def test_medmcqa_numbers_options_from_0_or_1_and_leaves_out_rows_without_a_label(
    cops: list[int | None], settings: dict[str, Any], found: str | list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = lines(tmp_path / "e.jsonl", *(ROWS["medmcqa"] | {"id": f"m{i}", "cop": cop} for i, cop in enumerate(cops)))
    if isinstance(found, str):
        with pytest.raises(UserError, match=found):
            load("medmcqa", path, **settings)
    else:
        assert [item.answer_index for item in load("medmcqa", path, **settings)] == found
        assert ("2 of 4 rows have no label" in capsys.readouterr().err) == (None in cops)


@pytest.mark.parametrize(
    ("exp", "thinking"),
    [
        ("Ans. (B) Penicillin binds the transpeptidase of the wall.", "Penicillin binds the transpeptidase of the wall."),
        ("Answer- C. It binds the transpeptidase of the wall.", "It binds the transpeptidase of the wall."),
        ("Ans. B: 5 days", None),
        ("Both drugs bind the wall, so option B is the best choice here.", None),
        ("Causes are (a) fever (b) cough and others as well.", None),
        ("", None),
        (None, None),
    ],
)
def test_explanations_never_name_a_letter(exp: str | None, thinking: str | None, tmp_path: Path) -> None:
    assert load("medmcqa", lines(tmp_path / "e.jsonl", ROWS["medmcqa"] | {"exp": exp}))[0].thinking == thinking


def test_clinic_items_keep_question_options_answer_and_reasoning() -> None:
    made, items = exam(3, "new_findings", 40), load_task(ClinicTask(split="new_findings", limit=40, seed=3))
    assert len(items) == len({item.id for item in items}) == 40
    for clinic, item in zip(made, items, strict=True):
        assert (item.question, item.options, item.answer_index) == (clinic.question, clinic.options, clinic.answer_index)
        assert item.thinking == clinic.thinking and item.split == "new_findings"
        assert (item.group, item.cluster) == (clinic.relation, f"{clinic.relation}/{clinic.condition}")
        assert all(f"{option} (" in render_question(item) for option in item.options)
        assert read_choice(render_answer(item), item.options) == item.answer_index
    drills = load_clinic(split="drill", limit=20, seed=3)
    assert len(drills) == 20 and all(one.split == "drill" and one.options[one.answer_index] in one.question for one in drills)
