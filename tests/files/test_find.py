"""Finding files: everything readable once, everything else listed, whatever a folder holds."""

import os
import socket
from pathlib import Path

import pytest

from osler.errors import UserError
from osler.files.find import ROW_ENDINGS, TEXT_ENDINGS, Found, ending, find_files, is_file, shown

ALL = (*ROW_ENDINGS, *TEXT_ENDINGS)


def find(path: str | Path) -> Found:
    return find_files(path, ALL, key="data.path")


def names(found: Found, root: Path) -> list[str]:
    return [file.relative_to(root).as_posix() for file in found.files]


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
    return path


def test_what_is_left_out_is_listed_by_kind(tmp_path: Path) -> None:
    for name in ("a.txt", "B.JSONL", "c.Parquet", "d.md.GZ"):
        touch(tmp_path / name)
    assert find(tmp_path) == Found([tmp_path / name for name in ("B.JSONL", "a.txt", "c.Parquet", "d.md.GZ")], "")
    for name in ("a.json", "b.json", "sub/c.JSON", "d.csv", "e.csv.gz", "LICENSE", ".hidden", ".git/x.txt", "v1.2.pdf"):
        touch(tmp_path / name)
    found = find(tmp_path)
    assert len(found.files) == 4
    assert found.left_out == "3 .json, 2 hidden, 1 without an ending, 1 .csv, 1 .csv.gz, 1 .pdf"


def test_a_folder_with_nothing_to_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no file that can be read \(it is empty\)\. Read are \.parquet, \.jsonl"):
        find(tmp_path)
    touch(tmp_path / "a.json")
    touch(tmp_path / "b.csv")
    with pytest.raises(UserError, match=r"holds no file that can be read \(left out: 1 \.json, 1 \.csv\)"):
        find(tmp_path)


def test_linked_folders_are_followed_once_and_circles_end(tmp_path: Path) -> None:
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
    found = find(root)
    assert names(found, root) == ["3.txt", "a/1.txt", "linked/deep/2.txt"]
    assert found.left_out == "2 linked nowhere, 2 linked twice"


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
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
    found = find(tmp_path)
    assert names(found, tmp_path) == ["a.txt"]
    assert found.left_out.startswith("1 that cannot be opened: ") and found.left_out.endswith("n (File name too long)")


def test_what_is_no_file_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "a.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket.txt")
        assert find(tmp_path) == Found([tmp_path / "a.txt"], "2 neither file nor folder")


@pytest.mark.parametrize("name", ["gone", "n\0l.txt", "n" * 300, "half\ud83e", "a.txt/b"])
def test_a_path_that_cannot_be_is_a_path_where_nothing_is(tmp_path: Path, name: str) -> None:
    touch(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"There is no file or folder .*; set data\.path to one that is there") as caught:
        find(tmp_path / name)
    assert str(caught.value).isprintable()
    assert not is_file(tmp_path / name)


def test_names_can_always_be_printed(tmp_path: Path) -> None:
    assert shown(Path("Fièvre 🧪.txt")) == "Fièvre 🧪.txt"
    assert shown(os.fsdecode(b"caf\xe9.txt")) == r"caf\udce9.txt"
    assert shown("n\0l\n") == r"n\x00l\n"


def test_the_ending_tells_the_kind() -> None:
    for name, kind in [("a.JSONL.GZ", ".jsonl"), ("a.b.txt.zst", ".txt"), ("a.parquet.gz", ".gz"), ("a.gz", ".gz"), ("a", "")]:
        assert ending(Path(name)) == kind
