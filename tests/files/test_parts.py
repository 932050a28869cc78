"""Parts of a file hold each row of it once, wherever it is cut, and reading them takes time in proportion to the file."""

import gzip
import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from osler.files import parts, rows
from osler.files.parts import LocalFile, Part, Parts
from osler.files.rows import read_rows, read_texts
from osler.runtime.errors import UserError

LONG = "x" * 300


def in_parts(path: Path) -> list[list[object]]:
    """The column `a` of the rows of each part, where small files are not dealt out."""
    return [[row.values["a"] for row in read_rows(part)] for part in Parts([LocalFile.at(path)], min_parts=1)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"a": 1}\n{"a": 2}\n\n{"a": 3}\n', [1, 2, 3]),
        (b'{"a": 1}\r\n{"a": 2}\r\n{"a": 3}\r\n', [1, 2, 3]),
        (b'\xef\xbb\xbf{"a": 1}\n\xef\xbb\xbf{"a": 2}\n', [1, 2]),
        (b'{"a": 1}\n{"a": "%s"}\n{"a": 3}' % LONG.encode(), [1, LONG, 3]),
        ('{"a": "é中🧪"}\n{"a": "🧪"}'.encode(), ["é中🧪", "🧪"]),
        (b"\n\n\n", []),
        (b"", []),
    ],
)
def test_lines_are_in_one_part_each_wherever_it_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, expected: list[object]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    for size in range(1, len(content) + 2):
        monkeypatch.setattr(parts, "PART_BYTES", size)
        monkeypatch.setattr(rows, "BLOCK_BYTES", 1 + size % 7)
        found = in_parts(path)
        assert len(found) == max(1, -(-len(content) // size))
        assert [value for part in found for value in part] == expected


@dataclass(frozen=True)
class Counted:
    """A file in memory that counts the bytes that are read of it."""

    content: bytes
    name: str = "counted.jsonl"
    stamp: str = ""
    read: list[int] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.content)

    def open(self) -> io.BufferedReader:
        counts = self.read

        class Stream(io.BytesIO):
            def readinto(self, buffer: Any) -> int:
                counts.append(super().readinto(buffer))
                return counts[-1]

        return io.BufferedReader(Stream(self.content), 100)  # type: ignore[arg-type]

    def check(self) -> None:
        pass


def test_a_line_longer_than_many_parts_is_read_about_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once to pass over it, once by the part that it begins in."""
    monkeypatch.setattr(parts, "PART_BYTES", 1000)
    monkeypatch.setattr(rows, "BLOCK_BYTES", 100)
    file = Counted(b'{"a": "%s"}\n{"a": 2}\n' % (b"x" * 200_000))
    assert [row.values["a"] for part in Parts([file]) for row in read_rows(part)] == ["x" * 200_000, 2]
    assert sum(file.read) < 2.5 * file.size


@pytest.mark.parametrize("group_rows", [1, 3, 100])
@pytest.mark.parametrize("part_bytes", [50, 400, 3000, 1 << 20])
def test_row_groups_are_in_one_part_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group_rows: int, part_bytes: int
) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", part_bytes)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": list(range(100)), "b": [LONG] * 100}), path, row_group_size=group_rows)
    read = [row for part in Parts([LocalFile.at(path)], min_parts=1) for row in read_rows(part, ["a"])]
    assert [row.values["a"] for row in read] == list(range(100))
    assert [row.where for row in read] == [f"{path}: row {number}" for number in range(1, 101)]
    assert [list(row.unread) for row in read if row.unread] == [["b"]]


def test_a_parquet_file_without_rows_has_a_part(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": pa.array([], pa.int64())}), tmp_path / "a.parquet")
    assert in_parts(tmp_path / "a.parquet") == [[]]


def test_text_and_what_is_compressed_is_one_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 4)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n{"a": 2}\n'))
    assert in_parts(tmp_path / "a.jsonl.gz") == [[1, 2]]
    (tmp_path / "a.md").write_text("a long text")
    assert list(Parts([LocalFile.at(tmp_path / "a.md")])) == [Part(LocalFile.at(tmp_path / "a.md"))]


def test_the_documents_of_few_files_are_dealt_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each range of a file is dealt among parts, which have every k-th of its rows; a text is not, nor a long packed file."""
    monkeypatch.setattr(parts, "PART_BYTES", 700)
    pq.write_table(pa.table({"a": list(range(10))}), tmp_path / "a.parquet", compression="zstd")
    lines = [f'{{"a": {number}}}\n' for number in range(100, 200)]
    (tmp_path / "b.jsonl").write_text("".join(lines))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode(), compresslevel=0))
    (tmp_path / "d.md").write_text("text")
    files = [LocalFile.at(path) for path in sorted(tmp_path.iterdir())]
    assert files[0].size <= 700 < files[1].size < files[2].size and len(Parts(files, min_parts=1)) == 5
    dealt = Parts(files, min_parts=14)
    of = [[part for part in dealt if part.file == file] for file in files]
    assert list(map(len, of)) == [3, 6, 1, 1]
    first, second, third = ([[row.values["a"] for row in read_rows(part)] for part in some] for some in of[:3])
    assert first == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]] and third == [list(range(100, 200))]
    border = sum(map(len, second[:3]))
    ranges = (100, 100 + border), (100 + border, 200)
    assert second == [list(range(start + first, stop, 3)) for start, stop in ranges for first in range(3)]
    assert [sum(part.num_bytes for part in some) for some in of] == [file.size for file in files]
    assert list(read_texts(of[3][0])) == ["text"]


def test_parts_of_petabytes_take_no_memory() -> None:
    files = [LocalFile(Path(f"{number}.jsonl"), 10**12 + number, "") for number in range(1000)]
    found = Parts(files)
    per_file = -(-(10**12) // parts.PART_BYTES)
    assert len(found) == 1000 * per_file and found[5 * per_file].file is files[5] and found[5 * per_file].start == 0
    last = found[len(found) - 1]
    assert last.file is files[-1] and last.stop is None and last.start + last.num_bytes == files[-1].size
    assert [found[per_file - 1].start, found[per_file].start] == [(per_file - 1) * parts.PART_BYTES, 0]
    with pytest.raises(IndexError):
        found[len(found)]


def test_a_mistake_in_a_later_part_has_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 64)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"a": number}) + "\n" for number in range(20)) + "{\n")
    with pytest.raises(UserError, match=rf"a\.jsonl, line at byte {path.stat().st_size - 2} is not JSON"):
        in_parts(path)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n' * 9)
    file = LocalFile.at(path)
    reading = read_rows(Part(file))
    next(reading)
    os.utime(path, ns=(1, 1))
    for read in (lambda: list(reading), lambda: list(read_rows(Part(file)))):
        with pytest.raises(UserError, match=r"a\.jsonl changed while it was being read"):
            read()
    path.unlink()
    with pytest.raises(UserError, match=r"a\.jsonl cannot be read: No such file .* Run the same command again when it can"):
        list(read_rows(Part(file)))
    path.mkdir()
    with pytest.raises(UserError, match=r"a\.jsonl cannot be read: Is a directory. Run the same command again when it can"):
        list(read_rows(path))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_long_text_is_cut_at_ends_of_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    text = "\ufeff" + "".join(f"Line {number} é.\n" for number in range(50)) + "中" * 40
    data = text.encode()
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(gzip.compress(data) if suffix else data)
    for size in range(20, len(data) + 2, 7):
        monkeypatch.setattr(rows, "TEXT_BYTES", size)
        found = list(read_texts(path))
        assert "".join(found) == text[1:] and max(len(piece.encode()) for piece in found) <= size
        assert all(piece.endswith("\n") or set(piece) <= {"中"} or piece is found[-1] for piece in found)
    monkeypatch.setattr(rows, "TEXT_BYTES", 40)
    path = tmp_path / "b.txt"
    path.write_bytes(b"a short line\n" * 20 + b"caf\xe9 \n")
    with pytest.raises(UserError, match=r"b\.txt:21 is not UTF-8 text: byte 0xe9 at position 263"):
        list(read_texts(path))
