"""Reading local files: every kind gives the same documents, and every mistake is named with its file and place."""

import functools
import gzip
import json
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from osler.data.documents import Document
from osler.data.readers import TextFiles, TurnFiles
from osler.errors import UserError
from osler.tokenizer.chat import Turn

zstd = functools.partial(pa.compress, codec="zstd", asbytes=True)
TEXTS = ["First, with é and 🧪.\nTwo lines.", "", "Third\u2028with a line separator."]


def texts(path: Path, field: str = "text") -> list[str]:
    return [document.text for document in TextFiles(path, field)]


def jsonl(rows: list[object]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson"])
def test_json_lines_in_every_compression(tmp_path: Path, ending: str) -> None:
    data = jsonl([{"text": text, "id": 1} for text in TEXTS])
    data = data.replace(b"\n", b"\r\n", 1).rstrip(b"\n")  # Windows line end; no newline at the end of the file
    packed = {".gz": gzip.compress, ".zst": zstd}.get(ending[-4:].lstrip("l"), bytes)(data)
    path = tmp_path / f"notes{ending}"
    path.write_bytes(packed)
    assert texts(path) == TEXTS
    assert [document.where for document in TextFiles(path)] == [f"{path}:{line}" for line in (1, 2, 3)]


def test_json_lines_longer_than_a_block_and_blank_lines(tmp_path: Path) -> None:
    long = "x" * 3_000_000
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + jsonl([{"text": "a"}]) + b"\n  \n" + jsonl([{"text": long}, {"text": None}]))
    assert texts(path) == ["a", long, ""]
    assert [document.where[-2:] for document in TextFiles(path)] == [":1", ":4", ":5"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": pa.array([*TEXTS, None], pa.string()).cast(kind), "n": [1, 2, 3, 4]})
    pq.write_table(table, path, row_group_size=2)
    assert texts(path) == [*TEXTS, ""]
    assert [document.where for document in TextFiles(path)][2] == f"{path}: row 3"


def test_text_files_are_one_document_each(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    (tmp_path / "b.md.gz").write_bytes(gzip.compress(b"# three"))
    (tmp_path / "c.txt").write_bytes(b"")
    assert texts(tmp_path / "a.txt") == ["one\r\ntwo"]
    assert texts(tmp_path) == ["one\r\ntwo", "# three", ""]


def test_a_folder_of_any_mix_is_read_in_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b" / "2.jsonl").write_bytes(jsonl([{"text": "second"}, {"text": "third"}]))
    (tmp_path / "c.md").write_text("fourth")
    pq.write_table(pa.table({"text": ["first"]}), tmp_path / "a.parquet")
    (tmp_path / ".hidden" / "x.txt").write_text("hidden")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert texts(tmp_path) == ["first", "second", "third", "fourth"]
    source = TextFiles(tmp_path)
    assert list(source) == list(source)


def test_turns(tmp_path: Path) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_bytes(jsonl([{"q": "Why?", "t": "Because.", "a": "So."}, {"q": "How?", "t": None, "a": "Thus."}]))
    assert [document.turn for document in TurnFiles(path, "q", "t", "a")] == [
        Turn("Why?", "Because.", "So."),
        Turn("How?", None, "Thus."),
    ]
    assert next(iter(TurnFiles(path, "q", None, "a"))).turn == Turn("Why?", None, "So.")
    (tmp_path / "prose.txt").write_text("not turns")
    assert len(list(TurnFiles(tmp_path, "q", None, "a"))) == 2
    with pytest.raises(UserError, match="cannot be read here"):
        list(TurnFiles(tmp_path / "prose.txt"))


def test_empty_documents() -> None:
    assert Document(text=" \n").is_empty and not Document(text="a").is_empty
    assert Document(turn=Turn("q", "t", " ")).is_empty and Document(turn=Turn("", None, "a")).is_empty
    assert not Document(turn=Turn("q", "", "a")).is_empty


def test_digests_tell_documents_apart_and_the_split_key_ignores_case_and_spacing() -> None:
    documents = [Document(text="ab c"), Document(turn=Turn("ab", None, "c")), Document(turn=Turn("a", None, "bc"))]
    documents += [Document(turn=Turn("ab", "", "c")), Document(text="AB  c\n")]
    assert len({document.exact_digest() for document in documents}) == 5
    assert documents[0].split_key() == documents[-1].split_key()
    assert len({document.split_key() for document in documents}) == 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"text": "ok"}\n[1]\n', r"a\.jsonl:2 holds a JSON list"),
        ("a.jsonl", b'{"body": "ok", "id": 3}\n', r"a\.jsonl:1 has no field 'text'; it has: body, id\."),
        ("a.jsonl", b'{"text": 7}\n', r"a\.jsonl:1: the field 'text' must be text, but it is int"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "caf\xe9"}\n', r"a\.jsonl:2 is not UTF-8.*0xe9 at position 28"),
        ("a.jsonl", b'{"text": "\\ud83e"}\n', r"a\.jsonl:1: the field 'text' holds half a character"),
        ("a.txt", b"one\ntwo \xff", r"a\.txt:2 is not UTF-8 text: byte 0xff at position 8"),
        ("a.txt.gz", gzip.compress(b"words " * 999, mtime=0)[:30], r"a\.txt\.gz cannot be read, it may be torn"),
        ("a.jsonl.gz", b"not gzip", r"a\.jsonl\.gz cannot be read"),
        ("a.jsonl.zst", zstd(bytes(range(256)) * 99)[:-9], r"a\.jsonl\.zst cannot be read"),
        ("a.parquet", b"PAR1 torn", r"a\.parquet cannot be read, it may be torn"),
        ("a.parquet", b"", r"a\.parquet cannot be read"),
        ("a.pdf", b"%PDF", r"a\.pdf is of a kind that cannot be read here.*\.parquet.*\.txt"),
    ],
)
def test_mistakes_name_the_file_and_the_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        texts(tmp_path / name)


def test_torn_and_unsuitable_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"title": ["a"] * 999, "n": list(range(999))}), path)
    with pytest.raises(UserError, match=r"has no field 'text'; it has: title, n\."):
        texts(path)
    with pytest.raises(UserError, match="row 1: the field 'n' must be text, but it is int"):
        texts(path, "n")
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(UserError, match="may be torn"):
        texts(path, "title")
    damaged = bytearray(whole)
    damaged[8:60] = bytes(52)
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="may be torn"):
        texts(path, "title")


def test_invalid_utf8_in_parquet_names_the_row(tmp_path: Path) -> None:
    bad = pa.array([b"fine", b"also", b"caf\xe9"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: row 3, field 'text' is not UTF-8 text: byte 0xe9 at position 3"):
        texts(tmp_path / "a.parquet")


def test_missing_and_empty_places(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no file or folder"):
        texts(tmp_path / "absent")
    with pytest.raises(UserError, match=r"holds no file that can be read \(it is empty\)\. Readable files end in \.parquet"):
        texts(tmp_path)
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert texts(tmp_path) == []


def test_an_empty_path_is_not_the_current_folder() -> None:
    with pytest.raises(UserError, match="path is empty"):
        list(TextFiles("", "text"))


def test_every_kind_that_is_read_is_named_and_every_kind_that_is_named_is_read(tmp_path: Path) -> None:
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")
    with pytest.raises(UserError) as caught:
        texts(tmp_path)
    named = re.findall(r"\.[a-z.]*[a-z]", str(caught.value).split("Readable files end in ")[1])
    assert set(named) >= {".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".md.gz", ".txt", ".txt.gz", ".txt.zst"}
    pack = {".gz": gzip.compress, ".zst": zstd}
    for number, ending in enumerate(named):
        content = jsonl([{"text": "read"}])
        if ending == ".parquet":
            pq.write_table(pa.table({"text": ["read"]}), tmp_path / "0.parquet")
            continue
        (tmp_path / f"{number}{ending}").write_bytes(pack.get(Path(ending).suffix, bytes)(content))
    assert len(texts(tmp_path)) == len(named)
    with pytest.raises(UserError) as caught:
        list(TurnFiles(tmp_path / "notes.pdf"))
    assert ".jsonl.zst" in str(caught.value) and ".txt" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (["question", "answer"], "set data.type=turns, or data.field=NAME"),
        (["question", "thinking", "answer"], "set data.type=turns data.thinking_field=thinking, or"),
        (
            ["Question", "Complex_CoT", "Response"],
            "data.question_field=Question data.answer_field=Response data.thinking_field=Complex_CoT",
        ),
        (["messages"], "write one row with a question and an answer for each exchange, and set data.type=turns"),
        (["body", "title"], "it has: body, title. Set data.field=NAME to the column of text, or data.type=turns"),
    ],
)
@pytest.mark.parametrize("is_parquet", [False, True])
def test_rows_without_the_column_of_text_name_the_keys_that_would_read_them(
    tmp_path: Path, columns: list[str], said: str, is_parquet: bool
) -> None:
    path = tmp_path / ("a.parquet" if is_parquet else "a.jsonl")
    if is_parquet:
        pq.write_table(pa.table({column: ["x"] for column in columns}), path)
    else:
        path.write_bytes(jsonl([dict.fromkeys(columns, "x")]))
    with pytest.raises(UserError) as caught:
        texts(path)
    assert said in str(caught.value) and f"it has: {', '.join(columns)}." in str(caught.value)


def test_turns_without_a_column_name_the_key_that_chooses_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl([{"question": "Why?", "response": "So."}]))
    for fields, said in [
        (("question", None, "answer"), "set data.type=turns data.answer_field=response."),
        (("quest", None, "response"), "set data.type=turns data.question_field=question data.answer_field=response."),
        (("question", "why", "response"), "Set data.thinking_field to the column that holds the reasoning, or"),
    ]:
        with pytest.raises(UserError) as caught:
            list(TurnFiles(path, *fields))
        assert said in str(caught.value)
    path.write_bytes(jsonl([{"question": "Why?", "rationale": "Because.", "answer": "So."}]))
    with pytest.raises(UserError, match=r"Set data\.thinking_field=rationale, or"):
        list(TurnFiles(path, thinking_field="thinking"))
    path.write_bytes(jsonl([{"q": "Why?", "answer": "So."}]))
    with pytest.raises(UserError, match=r"it has: q, answer\. Set data\.question_field=NAME"):
        list(TurnFiles(path))


def test_the_keys_are_those_of_who_asks(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl([{"question": "Why?", "answer": "So."}]))
    with pytest.raises(UserError, match=r"Set text_field=NAME") as caught:
        list(TextFiles(path, path_key="text", field_key="text_field"))
    assert "data." not in str(caught.value)
    with pytest.raises(UserError, match="set text to one that exists"):
        list(TextFiles(tmp_path / "gone", path_key="text"))


def test_what_is_left_out_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.txt", "b.json", "c.csv", "d.json"):
        (tmp_path / name).write_text("x")
    source = TextFiles(tmp_path)
    assert len(list(source)) == len(list(source)) == 1
    assert capsys.readouterr().err == f"{tmp_path}: left out: 2 .json, 1 .csv.\n"
    (tmp_path / "e.jsonl").write_bytes(jsonl([{"question": "Why?", "answer": "So."}]))
    assert len(list(TurnFiles(tmp_path))) == 1
    assert capsys.readouterr().err == f"{tmp_path}: left out: 2 .json, 1 .txt, 1 .csv.\n"


@pytest.mark.parametrize("is_parquet", [False, True])
def test_columns_that_look_like_content_and_are_not_read_are_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], is_parquet: bool
) -> None:
    row = {"question": "Which?", "options": {"A": "x", "B": "y"}, "rationale": "Because.", "answer": "x", "answer_idx": "A"}
    for name in ("a", "b"):
        path = tmp_path / (f"{name}.parquet" if is_parquet else f"{name}.jsonl")
        rows = [row, {**row, "question": "What?"}]
        pq.write_table(pa.Table.from_pylist(rows), path) if is_parquet else path.write_bytes(jsonl(rows))
    assert len(list(TurnFiles(tmp_path))) == len(list(TurnFiles(tmp_path))) == 4
    said = f"{tmp_path}: columns not read: options, rationale. data.thinking_field=rationale would read the reasoning.\n"
    assert capsys.readouterr().err == said
    list(TurnFiles(tmp_path, thinking_field="rationale"))
    assert capsys.readouterr().err == f"{tmp_path}: columns not read: options.\n"
    list(TextFiles(path, "rationale"))
    assert capsys.readouterr().err == f"{path}: columns not read: question, options, answer.\n"


@pytest.mark.parametrize("is_parquet", [False, True])
def test_null_reasoning_is_none_and_empty_reasoning_is_empty(tmp_path: Path, is_parquet: bool) -> None:
    rows = [{"question": "q", "answer": "a", "why": why} for why in ("Because.", None, "")]
    path = tmp_path / ("a.parquet" if is_parquet else "a.jsonl")
    pq.write_table(pa.Table.from_pylist(rows), path) if is_parquet else path.write_bytes(jsonl(rows))
    turns = [document.turn for document in TurnFiles(path, thinking_field="why")]
    assert [turn.thinking for turn in turns if turn] == ["Because.", None, ""]


def test_a_json_file_is_read_when_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(jsonl([{"text": "read"}]))
    assert texts(tmp_path / "a.json") == ["read"]


def test_what_a_name_that_is_not_utf8_leaves_in_documents_can_be_written(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9t\xe9"))
    folder.mkdir()
    (folder / os.fsdecode(b"\xe9.txt")).write_text("a text")
    (folder / os.fsdecode(b"\xe8.jsonl")).write_bytes(jsonl([{"text": "one"}]))
    for document in TextFiles(folder):
        assert document.where.isprintable() and document.source.isprintable()
