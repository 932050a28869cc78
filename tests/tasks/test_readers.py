"""The exam files: real ones load whole, broken ones are refused by file, line and field."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from osler.config.decode import decode
from osler.config.schema import encode
from osler.runtime.errors import UserError
from osler.tasks import gsm8k, medmcqa, medqa, pubmedqa
from osler.tasks.answers import read_choice, read_number
from osler.tasks.item import permute, render_answer
from osler.tasks.registry import TASK_CONFIGS, TASKS, TaskConfig, load_task

MEDQA = {"question": "Which?", "answer": "two", "answer_idx": "B", "options": {"A": "one", "B": "two", "C": "x", "D": "y"}}
MEDMCQA = {
    "id": "m1", "question": "Which?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 2, "exp": None,
    "subject_name": "Dental",
}  # fmt: skip
PUBMEDQA = {
    "pubid": 7, "question": "Does it?", "context": {"contexts": ["One.", "Two."]}, "long_answer": "It does not.",
    "final_decision": "no",
}  # fmt: skip
GSM8K = {"question": "6 x 7?", "answer": "6 x 7 = <<6*7=42>>42 apples.\n#### 42"}
ROWS = {"medqa": MEDQA, "medmcqa": MEDMCQA, "pubmedqa": PUBMEDQA, "gsm8k": GSM8K}
LOADERS: dict[str, Any] = {"medqa": medqa.load, "medmcqa": medmcqa.load, "pubmedqa": pubmedqa.load, "gsm8k": gsm8k.load}


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def shared(name: str) -> Path:
    root = os.environ.get("OSLER_SHARED_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data"
    path = Path(root) / "exams" / name
    if not path.is_file():
        pytest.skip(f"the real exam file {name} is not here; set OSLER_SHARED_DATA to the folder that has exams/{name}")
    return path


def test_real_medqa_loads_whole() -> None:
    items = medqa.load(shared("medqa-dev.jsonl"), split="dev")
    assert len(items) == len({item.id for item in items}) == 1272
    assert Counter(item.answer_letter for item in items) == {"C": 352, "A": 330, "B": 316, "D": 274}
    assert items[0].options[items[0].answer_index] == "Ceftriaxone" and items[0].split == "dev"


def test_real_medmcqa_loads_whole() -> None:
    items = medmcqa.load(shared("medmcqa-validation-2000.jsonl"))
    assert len(items) == len({item.id for item in items}) == 2000
    assert Counter(item.answer_index for item in items) == {0: 646, 1: 533, 2: 437, 3: 384}
    assert items[0].options[3] == "Hypotonic upper lip" and items[0].answer_index == 3 and items[0].group == "Dental"
    explained = [item for item in items if item.thinking]
    assert 700 < len(explained) < 1082  # of 1,082 explanations the ones that say more than a letter
    assert not any(item.thinking.lower().startswith(("ans. ", "ans: ", "answer- ")) for item in explained if item.thinking)


def test_real_pubmedqa_loads_whole() -> None:
    items = pubmedqa.load(shared("pubmedqa-labeled-train-500.jsonl"))
    assert len(items) == len({item.id for item in items}) == 500
    assert Counter(item.options[item.answer_index] for item in items) == {"yes": 276, "no": 169, "maybe": 55}
    assert items[0].id == "pubmedqa-10808977" and all(item.context and item.thinking for item in items)


def test_real_gsm8k_loads_whole() -> None:
    items = gsm8k.load(shared("gsm8k-train.jsonl"))
    assert len(items) == len({item.id for item in items}) == 7473
    assert items[0].answer == "72" and "109200000" in {item.answer for item in items}
    for item in items:
        assert read_number(item.answer) == Decimal(item.answer) and item.options == ()
        assert item.thinking and "<<" not in item.thinking and "####" not in item.thinking


def test_every_real_answer_is_read_back_in_any_order() -> None:
    exams = [medqa.load(shared("medqa-dev.jsonl")), medmcqa.load(shared("medmcqa-validation-2000.jsonl"))]
    for item in [*exams[0], *exams[1], *pubmedqa.load(shared("pubmedqa-labeled-train-500.jsonl"))]:
        for visit in range(2):
            shown = permute(item, 0, visit)
            assert read_choice(render_answer(shown), shown.options) == shown.answer_index


@pytest.mark.parametrize("name", ROWS)
def test_plain_gzipped_and_parquet_files_give_the_same_items(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    plain = lines(tmp_path / "exam.jsonl", [row, row | {"question": "Another?", "id": "m2"}])
    (tmp_path / "exam.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    pq.write_table(pa.Table.from_pylist([json.loads(line) for line in plain.read_text().splitlines()]), tmp_path / "e.parquet")
    items = LOADERS[name](plain, split="s")
    assert len(items) == 2 and items[0].split == "s"
    assert LOADERS[name](tmp_path / "exam.jsonl.gz", split="s") == items
    assert LOADERS[name](tmp_path / "e.parquet", split="s") == items
    assert LOADERS[name](plain, split="s", limit=1) == items[:1]


MISSING = {
    "medqa": ("question", "answer_idx", "answer", "options"), "medmcqa": ("cop", "opc", "id"),
    "pubmedqa": ("context", "final_decision", "pubid"), "gsm8k": ("answer",),
}  # fmt: skip


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, fields in MISSING.items() for field in fields])
def test_a_missing_field_is_named_with_file_and_line(name: str, field: str, tmp_path: Path) -> None:
    row = ROWS[name]
    path = lines(tmp_path / "exam.jsonl", [row, {key: value for key, value in row.items() if key != field}])
    with pytest.raises(UserError, match=f"exam.jsonl:2: the field '{field}.*is missing") as caught:
        LOADERS[name](path)
    assert "Expected the schema of" in str(caught.value) and "another task.type" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("medqa", {"answer_idx": "E"}, "'answer_idx' is 'E'"),
        ("medqa", {"answer": "one"}, "another option"),
        ("medqa", {"options": {"A": "one", "C": "x"}}, "without a gap"),
        ("medqa", {"options": {"A": "one", "B": None, "C": "x"}}, "not A, C; without a text: B"),
        ("medqa", {"options": ["one", "two"]}, "must be an object"),
        ("medqa", {"question": " "}, "'question' is empty"),
        ("medmcqa", {"cop": "2"}, "'cop' must be a whole number"),
        ("medmcqa", {"cop": 5}, "'cop' is 5"),
        ("medmcqa", {"cop": True}, "must be a whole number"),
        ("pubmedqa", {"final_decision": "perhaps"}, "'perhaps'"),
        ("pubmedqa", {"context": {"contexts": []}}, "list of texts"),
        ("gsm8k", {"answer": "it is 42"}, "must end in '#### '"),
        ("gsm8k", {"answer": "#### NaN"}, "must end in '#### '"),
        ("gsm8k", {"answer": "#### 1_000"}, "must end in '#### '"),
        ("gsm8k", {"answer": "#### 1,08"}, "must end in '#### '"),
        ("gsm8k", {"answer": None}, "must be text"),
    ],
)
def test_a_wrong_value_is_refused(name: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "exam.jsonl", [ROWS[name] | change])
    with pytest.raises(UserError, match=f"exam.jsonl:1: .*{message}"):
        LOADERS[name](path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("torn.jsonl", b'{"question": "x"', "torn.jsonl:1 is not JSON"),
        ("list.jsonl", b"[1, 2]\n", "one JSON object"),
        ("empty.jsonl", b"\n\n", "no rows"),
        ("exam.csv", b"a,b\n", r"of a kind that cannot be read here.*\.parquet"),
        ("fake.jsonl.gz", b"not gzip", "cannot be read"),
        ("half.jsonl", b'{"options": {"A": "\\ud83e"}}', "half.jsonl:1: the field 'options.A' holds half a character"),
        ("absent.jsonl", None, r"no file or folder .*set task\.path to"),
    ],
)
def test_files_that_are_no_exam_are_refused(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        medqa.load(tmp_path / name)
    assert name in str(caught.value)


def test_an_exam_may_be_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines(tmp_path / "a.jsonl", [GSM8K])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps(GSM8K | {"question": "7 x 6?"}).encode()))
    (tmp_path / "notes.csv").write_text("x")
    assert [item.question for item in gsm8k.load(tmp_path)] == ["6 x 7?", "7 x 6?"]
    assert f"{tmp_path}: left out: 1 .csv." in capsys.readouterr().err


def mcqa_file(path: Path, cops: list[int | None]) -> Path:
    return lines(path, [MEDMCQA | {"id": f"m{i}", "cop": cop} for i, cop in enumerate(cops)])


def test_medmcqa_files_that_count_from_one_are_refused_and_convert_on_request(tmp_path: Path) -> None:
    original = mcqa_file(tmp_path / "original.json", [1, 4, 2, 3])
    with pytest.raises(UserError, match=r"counts its options from 1.*first_option=1 beside its path"):
        medmcqa.load(original)
    assert [item.answer_index for item in medmcqa.load(original, first_option=1)] == [0, 3, 1, 2]
    without_fours = mcqa_file(tmp_path / "no_four.jsonl", [1, 2, 3] * 20)
    with pytest.raises(UserError, match="from 1 to 3"):
        medmcqa.load(without_fours)
    with pytest.raises(UserError, match="counts its options from 1"):
        medmcqa.load(original, limit=1)  # the whole file is looked at
    hub = mcqa_file(tmp_path / "hub.jsonl", [0, 1, 2, 3])
    with pytest.raises(UserError, match="counts from 0"):
        medmcqa.load(hub, first_option=1)
    with pytest.raises(UserError, match="mixed"):
        medmcqa.load(mcqa_file(tmp_path / "mixed.jsonl", [0, 4]))


def test_medmcqa_rows_without_a_label_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = medmcqa.load(mcqa_file(tmp_path / "some.jsonl", [0, -1, 3, None]))
    assert [item.answer_index for item in items] == [0, 3]
    assert "2 of 4 rows have no label" in capsys.readouterr().err
    with pytest.raises(UserError, match="test split"):
        medmcqa.load(mcqa_file(tmp_path / "none.jsonl", [-1, -1]))


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
    assert medmcqa.load(lines(tmp_path / "e.jsonl", [MEDMCQA | {"exp": exp}]))[0].thinking == thinking


def test_medqa_takes_five_options(tmp_path: Path) -> None:
    row = MEDQA | {"options": {**MEDQA["options"], "E": "five"}, "answer_idx": "E", "answer": "five"}  # type: ignore[dict-item]
    assert medqa.load(lines(tmp_path / "e.jsonl", [row]))[0].answer_index == 4


def test_options_that_point_at_options_or_are_equal_are_counted_at_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = [{}, {"opd": "All of the above"}, {"opc": "a"}, {"opd": "Both A and B", "opb": "A "}]
    path = lines(tmp_path / "exam.jsonl", [MEDMCQA | change | {"id": f"m{n}"} for n, change in enumerate(changes)])
    assert len(load_task(medmcqa.MedmcqaTask(path=str(path)))) == 4
    said = capsys.readouterr().err
    assert "2 of 4 questions have options that point at others" in said and "1 of 4 questions have an option twice" in said
    load_task(medqa.MedqaTask(path=str(lines(tmp_path / "m.jsonl", [MEDQA]))))
    assert "options" not in capsys.readouterr().err


def test_a_task_is_chosen_by_its_config(tmp_path: Path) -> None:
    path = lines(tmp_path / "m.jsonl", [MEDQA])
    config = decode(TaskConfig, {"type": "medqa", "path": str(path), "split": "test"})  # type: ignore[arg-type]
    assert isinstance(config, medqa.MedqaTask) and encode(config)["path"] == str(path)
    assert load_task(config) == medqa.load(path, split="test")
    assert set(TASK_CONFIGS) == {"clinic", "medqa", "medmcqa", "pubmedqa", "gsm8k"} and set(TASK_CONFIGS.values()) == set(TASKS)
