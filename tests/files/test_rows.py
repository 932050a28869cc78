"""Everything readable is found once and read the same in every format; every mistake is told with its file, line and field."""

import functools
import gzip
import io
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from osler.files import rows as files
from osler.files.find import ROW_ENDINGS, TEXT_ENDINGS, ending, find_files, shown
from osler.files.rows import read_rows, read_texts
from osler.runtime.errors import UserError

ALL = (*ROW_ENDINGS, *TEXT_ENDINGS)


def find(path: str | Path) -> list[Path]:
    return find_files(path, ALL, key="data.path")


def names(root: Path) -> list[str]:
    return [file.relative_to(root).as_posix() for file in find(root)]


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
    return path


def test_what_is_left_out_is_listed_by_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.txt", "B.JSONL", "c.Parquet", "d.md.GZ"):
        touch(tmp_path / name)
    assert names(tmp_path) == ["B.JSONL", "a.txt", "c.Parquet", "d.md.GZ"] and capsys.readouterr().err == ""
    for name in ("a.json", "b.json", "sub/c.JSON", "d.csv", "e.csv.gz", "LICENSE", ".hidden", ".git/x.txt", "v1.2.pdf"):
        touch(tmp_path / name)
    assert len(find(tmp_path)) == len(find(tmp_path)) == 4
    left_out = "3 .json, 2 hidden, 1 without an ending, 1 .csv, 1 .csv.gz, 1 .pdf"
    assert capsys.readouterr().err == f"{tmp_path}: left out: {left_out}.\n", "logged once"


def test_a_folder_with_nothing_to_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no file that can be read \(it is empty\)\. Readable files end in \.parquet"):
        find(tmp_path)
    touch(tmp_path / "a.json")
    touch(tmp_path / "b.csv")
    with pytest.raises(UserError, match=r"holds no file that can be read \(left out: 1 \.json, 1 \.csv\)"):
        find(tmp_path)


def test_linked_folders_are_followed_once_and_circles_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As rglob does not: it passes over links to folders without a word."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    touch(root / "a" / "1.txt")
    touch(outside / "deep" / "2.txt")
    (root / "0-same").symlink_to(root / "a")
    (root / "linked").symlink_to(outside)
    (outside / "back").symlink_to(root)
    (root / "a" / "self").symlink_to(root / "a" / "self")
    (root / "a" / "gone.txt").symlink_to(root / "nowhere")
    (root / "3.txt").symlink_to(outside / "deep" / "2.txt")
    assert names(root) == ["3.txt", "a/1.txt", "linked/deep/2.txt"]
    assert "left out: 2 linked nowhere, 2 linked twice." in capsys.readouterr().err


def test_what_cannot_be_opened_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder whose path is longer than the system takes cannot be listed, not even by root."""
    touch(tmp_path / "a.txt")
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        for _ in range(20):
            os.mkdir("n" * 250)
            os.chdir("n" * 250)
    finally:
        os.chdir(here)
    assert names(tmp_path) == ["a.txt"]
    said = capsys.readouterr().err
    assert "left out: 1 that cannot be opened: " in said and said.endswith("n (File name too long).\n")


def test_what_is_no_file_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    touch(tmp_path / "a.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket.txt")
        assert names(tmp_path) == ["a.txt"]
    assert "left out: 2 neither file nor folder." in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gone", "n\0l.txt", "n" * 300, "half\ud83e", "a.txt/b"])
def test_a_path_that_cannot_be_is_a_path_where_nothing_is(tmp_path: Path, name: str) -> None:
    touch(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"There is no file or folder .*; set data\.path to one that exists") as caught:
        find(tmp_path / name)
    assert str(caught.value).isprintable()


def test_names_can_always_be_printed_and_endings_tell_the_kind() -> None:
    assert shown(Path("Fièvre 🧪.txt")) == "Fièvre 🧪.txt"
    assert shown(os.fsdecode(b"caf\xe9.txt")) == r"caf\udce9.txt"
    assert shown("n\0l\n") == r"n\x00l\n"
    for name, kind in [("a.JSONL.GZ", ".jsonl"), ("a.b.txt.zst", ".txt"), ("a.parquet.gz", ".gz"), ("a.gz", ".gz"), ("a", "")]:
        assert ending(Path(name)) == kind


zstd = functools.partial(pa.compress, codec="zstd", asbytes=True)


def values(path: Path, columns: list[str] | None = None) -> list[dict[str, Any]]:
    return [row.values for row in read_rows(path, columns)]


def as_parquet(table: pa.Table) -> bytes:
    pq.write_table(table, buffer := io.BytesIO())
    return buffer.getvalue()


PARQUET = as_parquet(pa.table({"title": ["a"] * 999, "n": list(range(999))}))
NOT_UTF8 = as_parquet(pa.table({"text": pa.array([b"fine", b"also", b"caf\xe9"], pa.binary()).view(pa.string())}))


def refusal(path: Path, content: bytes, columns: list[str] | None = None) -> str:
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read_texts(path)) if ending(path) in TEXT_ENDINGS else values(path, columns)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_byte_order_marks_line_ends_and_joined_files(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n\xef\xbb\xbf{"a": "%s"}' % (b"x" * 3_000_000))  # longer than a block
    assert [(row.where, row.values["a"]) for row in read_rows(path)] == [(f"{path}:1", 1), (f"{path}:4", "x" * 3_000_000)]
    for pack, suffix in ((gzip.compress, ".gz"), (zstd, ".zst")):
        packed = tmp_path / f"a.jsonl{suffix}"
        packed.write_bytes(pack(b'{"a": 1}\n') + pack(b'{"a": 2}\n'))  # as `cat one.gz two.gz` makes it
        assert values(packed) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"a": "\\ud83e"}', ":1: the field 'a' holds half a character at position 0"),
        ("a.jsonl", b'\n{"a": {"b": ["x", "y\\uDD2A"]}}', ":2: the field 'a.b' holds half a character at position 1"),
        ("a.jsonl", b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", ":1 is not JSON (maximum recursion depth exceeded"),
        ("a.jsonl", b'{"a": "caf\xe9"}', ":1 is not UTF-8 text: byte 0xe9 at position 10. Convert the file to UTF-8."),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), ":1 is not UTF-8 text: byte 0xff at position 0"),
        ("a.jsonl", b'{"a": 1, "b": {"c": 2, "c": 3}}', ":1: the field 'c' occurs twice"),
        ("a.jsonl", b'{"a": 1}\n\0\0\0\0', ":2 is not JSON"),
        ("a.jsonl", b'\xef\xbb\xbf \n[\n  {"a": 1}\n]', " begins with '['. Every line must hold one JSON object; turn an array"),
        ("a.jsonl", b'{\n  "a": 1\n}', ":1 is not JSON (Expecting property name enclosed in double quotes"),
        ("a.jsonl", b'{\n  "a": 1\n}', "jq -c . INDENTED.json > ROWS.jsonl"),
        ("a.jsonl", b'{"a": 1}\n7\n', ":2 holds a JSON int. Every line must hold one JSON object."),
        ("a.txt", b"one\ntwo \xff", ":2 is not UTF-8 text: byte 0xff at position 8"),
        ("a.txt", "fever and cough".encode("utf-16-le"), " holds NUL bytes, so it is probably UTF-16"),
        ("a.txt.gz", gzip.compress(b"words " * 999, mtime=0)[:30], " cannot be read, it may be torn"),
        ("a.jsonl.gz", b"not gzip", " cannot be read"),
        ("a.jsonl.zst", zstd(bytes(range(256)) * 99)[:-9], " cannot be read"),
        ("a.jsonl.gz", b"", " cannot be read, it may be torn: it is empty"),
        ("a.parquet", b"PAR1 torn", " cannot be read, it may be torn"),
        ("a.parquet", b"", " cannot be read"),
        ("a.parquet", PARQUET[:-20], " cannot be read, it may be torn"),
        ("a.parquet", PARQUET[:8] + bytes(52) + PARQUET[60:], " cannot be read, it may be torn"),
        ("a.parquet", NOT_UTF8, ": row 3, field 'text' is not UTF-8 text: byte 0xe9 at position 3"),
    ],
)
def test_mistakes_are_told_with_their_place(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    assert (said if said.startswith("jq") else name + said) in refusal(tmp_path / name, content)


def test_every_kind_that_is_named_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        find_files(tmp_path, (*ROW_ENDINGS, *TEXT_ENDINGS), key="x")
    named = re.findall(r"\.[a-z.]*[a-z]", str(caught.value).split("end in ")[1])
    assert set(named) >= {".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".md.gz", ".txt", ".txt.gz", ".txt.zst"}
    pack = {".gz": gzip.compress, ".zst": zstd}
    for number, kind in enumerate(named):
        path = tmp_path / f"{number}{kind}"
        path.write_bytes(PARQUET if kind == ".parquet" else pack.get(path.suffix, bytes)(b'{"title": "a"}'))
    for file in find_files(tmp_path, named, key="x"):
        content = next(read_texts(file)) if ending(file) in TEXT_ENDINGS else next(iter(read_rows(file))).values["title"]
        assert content in ("a", '{"title": "a"}')


def test_what_is_not_asked_for_or_only_looks_wrong_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"a": "\\ud83e\\uddea", "b": "\\ud83e"}',
        b'{"a": "n\\u0000l", "b": "\\\\ud83e"}',
    ]
    path.write_bytes(b"\n".join(lines))
    assert [row["a"] for row in values(path, ["a"])] == ["🧪", "n\0l"]
    (tmp_path / "b.txt").write_bytes(b"fever and\0 cough")
    assert list(read_texts(tmp_path / "b.txt")) == ["fever and\0 cough"]


def test_the_way_out_of_an_array_works(tmp_path: Path) -> None:
    """What the message proposes is run as it stands."""
    (tmp_path / "ARRAY.json").write_text(json.dumps([{"a": "é\n"}, {"a": 2}], indent=2))
    said = refusal(tmp_path / "a.jsonl", (tmp_path / "ARRAY.json").read_bytes())
    command = said.split("with: python ")[1]
    subprocess.run(f"{sys.executable} {command}", shell=True, cwd=tmp_path, check=True)
    assert values(tmp_path / "ROWS.jsonl") == [{"a": "é\n"}, {"a": 2}]


def test_an_array_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_lines_between", lambda *given: 1 / 0)
    assert "begins with '['" in refusal(tmp_path / "a.jsonl", b"[" + b" " * 3_000_000)


def test_columns_that_occur_twice_in_parquet(tmp_path: Path) -> None:
    twice = pa.table([pa.array(["x"]), pa.array(["y"]), pa.array(["z"])], names=["a", "a", "b"])
    pq.write_table(twice, tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet", ["b", "b"]) == [{"b": "z"}]
    for columns in (["a"], None):
        with pytest.raises(UserError, match=r"a\.parquet has two columns 'a'; which one is meant\?"):
            values(tmp_path / "a.parquet", columns)
    inner = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["c", "c"])
    pq.write_table(pa.table({"a": inner}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet: row 1, field 'a' cannot be read: .*duplicate"):
        values(tmp_path / "b.parquet")


def test_files_of_every_name(tmp_path: Path) -> None:
    """Names that are not UTF-8 are read, and shown escaped; an ending may be in upper case."""
    folder = str(tmp_path).encode()
    for name, content in [(b"caf\xe9.JSONL", b'{"a": 1}\n'), (b"\xff.jsonl.GZ", gzip.compress(b'{"a": 1}\n'))]:
        (path := Path(str(folder + b"/" + name, "utf-8", "surrogateescape"))).write_bytes(content)
        assert values(path) == [{"a": 1}]
        assert "\\udc" in next(iter(read_rows(path))).where
    path = Path(str(folder + b"/caf\xe9.PARQUET", "utf-8", "surrogateescape"))
    with open(path, "wb") as file:
        pq.write_table(pa.table({"a": ["n\0l"]}), file)
    assert values(path) == [{"a": "n\0l"}]
    assert r"caf\udce9.PARQUET cannot be read" in refusal(path, bytes(300))


def test_the_same_rows_in_both_formats(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"a": "x", "b": None, "c": {"d": ["é"]}, "n": 1}, {"a": "", "b": "y", "c": None, "n": 2}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for columns in (None, ["a", "c"], ["a", "absent"]):
        one, other = ([*read_rows(tmp_path / f"a{ending}", columns)] for ending in (".jsonl", ".parquet"))
        assert [list(row.columns) for row in one] == [list(row.columns) for row in other] == [["a", "b", "c", "n"]] * 2
        assert [list(row.unread) for row in one] == [list(row.unread) for row in other]
        for name in columns or rows[0]:
            assert [row.values.get(name, "none") for row in one] == [row.values.get(name, "none") for row in other]
    assert [list(row.unread) for row in read_rows(tmp_path / "a.jsonl", ["a"])] == [["b", "c"], []]
    row = {"text": "x", "id": "1", "source_url": "u", "file_path": "p", "lang": "en", "n": 1, "ok": True, "options": {"A": "x"}}
    (tmp_path / "about.jsonl").write_text(json.dumps(row) + "\n")
    assert [list(row.unread) for row in read_rows(tmp_path / "about.jsonl", ["text"])] == [["options"]]
