"""Finding files: everything readable once, everything else listed, whatever a folder holds."""

import os
import socket
from pathlib import Path

import pytest

from osler.files.find import ROW_ENDINGS, TEXT_ENDINGS, ending, find_files, shown
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


def test_names_can_always_be_printed(tmp_path: Path) -> None:
    assert shown(Path("Fièvre 🧪.txt")) == "Fièvre 🧪.txt"
    assert shown(os.fsdecode(b"caf\xe9.txt")) == r"caf\udce9.txt"
    assert shown("n\0l\n") == r"n\x00l\n"


def test_the_ending_tells_the_kind() -> None:
    for name, kind in [("a.JSONL.GZ", ".jsonl"), ("a.b.txt.zst", ".txt"), ("a.parquet.gz", ".gz"), ("a.gz", ".gz"), ("a", "")]:
        assert ending(Path(name)) == kind
