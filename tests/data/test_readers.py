"""Local files as documents: every kind gives the same documents; what `files/` reads is tested there."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from osler.data.config import TurnsData
from osler.data.documents import Document
from osler.data.readers import TextFiles
from osler.data.sources import open_turns
from osler.runtime.errors import UserError
from osler.tokenizer.chat import Turn

TEXTS = ["First, with é and 🧪.\nTwo lines.", "", "Third\u2028with a line separator."]


def texts(path: Path, field: str = "text") -> list[str]:
    return [document.text for document in TextFiles(path, field)]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    """Write a table in the format that the name asks for."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def turns(path: Path, *fields: str | None) -> list[Document]:
    """Read the columns of questions, reasoning and answers."""
    names = ("question_field", "thinking_field", "answer_field")
    data = TurnsData(path=str(path), **dict(zip(names, fields, strict=bool(fields))))
    return list(open_turns(data, "data").documents())


both_formats = pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])


def test_rows_become_documents_that_know_their_place(tmp_path: Path) -> None:
    """`tests/files` has every format and compression; nulls are empty, and Windows line ends are no text."""
    path = tmp_path / "notes.jsonl.gz"
    data = "".join(json.dumps({"text": text, "id": 1}, ensure_ascii=False) + "\n" for text in [*TEXTS, None]).encode()
    path.write_bytes(gzip.compress(data.replace(b"\n", b"\r\n", 1).rstrip(b"\n")))
    assert texts(path) == [*TEXTS, ""]
    assert [document.where for document in TextFiles(path)] == [f"{path}:{line}" for line in (1, 2, 3, 4)]
    for number, kind in enumerate((pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()))):
        path = tmp_path / f"{number}.parquet"
        table = pa.table({"text": pa.array([*TEXTS, None], pa.string()).cast(kind), "n": [1, 2, 3, 4]})
        pq.write_table(table, path, row_group_size=2)
        assert texts(path) == [*TEXTS, ""]
        assert [document.where for document in TextFiles(path)][2] == f"{path}: row 3"


def test_a_folder_of_any_mix_is_read_in_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    write(tmp_path / "b" / "2.jsonl", [{"text": "second"}, {"text": "third"}])
    (tmp_path / "c.md").write_bytes(b"\xef\xbb\xbffour\r\nth")
    (tmp_path / "d.md.gz").write_bytes(gzip.compress(b"# fifth"))
    (tmp_path / "e.txt").write_bytes(b"")
    write(tmp_path / "a.parquet", [{"text": "first"}])
    assert texts(tmp_path) == ["first", "second", "third", "four\r\nth", "# fifth", ""]
    source = TextFiles(tmp_path)
    assert list(source) == list(source)


@both_formats
def test_turns(tmp_path: Path, name: str) -> None:
    """Null reasoning is none, empty reasoning is empty."""
    path = write(tmp_path / name, [{"q": "Why?", "t": why, "a": "So."} for why in ("Because.", None, "")])
    expected = [Turn("Why?", why, "So.") for why in ("Because.", None, "")]
    assert [document.turn for document in turns(path, "q", "t", "a")] == expected
    assert turns(path, "q", None, "a")[0].turn == Turn("Why?", None, "So.")
    (tmp_path / "prose.txt").write_text("not turns")
    assert len(turns(tmp_path, "q", None, "a")) == 3
    with pytest.raises(UserError, match="cannot be read here") as caught:
        turns(tmp_path / "prose.txt")
    assert ".jsonl.zst" in str(caught.value) and ", .txt" not in str(caught.value)


def test_documents_are_told_apart_and_the_split_key_ignores_case_and_spacing() -> None:
    documents = [Document(text="ab c"), Document(turn=Turn("ab", None, "c")), Document(turn=Turn("a", None, "bc"))]
    documents += [Document(turn=Turn("ab", "", "c")), Document(text="AB  c\n")]
    assert len({document.exact_digest() for document in documents}) == 5
    assert documents[0].split_key() == documents[-1].split_key()
    assert len({document.split_key() for document in documents}) == 4
    assert not any(document.is_empty for document in documents)
    assert Document(text=" \n").is_empty
    assert Document(turn=Turn("q", "t", " ")).is_empty and Document(turn=Turn("", None, "a")).is_empty


@both_formats
def test_a_value_that_is_no_text_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="1: the field 'n' must be text, but it is int"):
        texts(write(tmp_path / name, [{"n": 7}]), "n")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (None, "Set data.field=NAME to the column of text, or data.type=turns for questions with answers (data.question_field="),
        (("question", None, "answer"), "Set data.answer_field=NAME to the column that holds it."),
        (
            ("question", "why", "response"),
            "Set data.thinking_field=NAME to the column with the reasoning, or data.thinking_field=",
        ),
    ],
)
@both_formats
def test_rows_without_a_column_name_the_keys_that_would_read_them(
    tmp_path: Path, fields: tuple[str, str | None, str] | None, said: str, name: str
) -> None:
    path = write(tmp_path / name, [{"question": "x", "response": "x"}])
    with pytest.raises(UserError) as caught:
        texts(path) if fields is None else turns(path, *fields)
    assert said in str(caught.value) and "it has: question, response." in str(caught.value)


def test_the_keys_are_those_of_who_asks(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "Why?", "answer": "So."}])
    with pytest.raises(UserError, match=r"^(?!.*data\.).*Set text_field=NAME"):
        list(TextFiles(path, path_key="text", field_key="text_field"))
    with pytest.raises(UserError, match="set text to one that exists"):
        list(TextFiles(tmp_path / "gone", path_key="text"))


@both_formats
def test_columns_that_look_like_content_and_are_not_read_are_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    row: dict[str, object] = {
        "question": "Which?", "options": {"A": "x", "B": "y"}, "rationale": "Because.", "answer": "x", "answer_idx": "A",
    }  # fmt: skip
    path = write(tmp_path / name, [row, {**row, "question": "What?"}])
    assert len(turns(tmp_path)) == len(turns(tmp_path)) == 2
    assert capsys.readouterr().err == f"{tmp_path}: columns not read: options, rationale.\n"
    turns(tmp_path, "question", "rationale", "answer")
    assert capsys.readouterr().err == f"{tmp_path}: columns not read: options.\n"
    list(TextFiles(path, "rationale"))
    assert capsys.readouterr().err == f"{path}: columns not read: question, options, answer.\n"


def test_what_a_name_that_is_not_utf8_leaves_in_documents_can_be_written(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9t\xe9"))
    folder.mkdir()
    (folder / os.fsdecode(b"\xe9.txt")).write_text("a text")
    write(folder / os.fsdecode(b"\xe8.jsonl"), [{"text": "one"}])
    for document in TextFiles(folder):
        assert document.where.isprintable()
