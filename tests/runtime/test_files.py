"""Files are whole or absent; hashes and fingerprints name their content; a run folder has one layout."""

import hashlib
import os
from pathlib import Path

import pytest

from osler.runtime import faults
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder, appearing, fingerprint, new_path, read_json, sha256_file, write_atomic


@pytest.mark.parametrize(
    ("data", "written"),
    [(b"\x00\xff", b"\x00\xff"), ("naïve\n", "naïve\n".encode()), ("caf\udce9", rb"caf\udce9")],  # the last is no UTF-8
)
def test_write_atomic_replaces_a_file_with_ordinary_permissions(tmp_path, data, written):
    path, plain = tmp_path / "file.txt", tmp_path / "plain"
    for each in (path, plain):
        each.write_text("x")
    write_atomic(path, data)
    assert path.read_bytes() == written and sorted(os.listdir(tmp_path)) == ["file.txt", "plain"]
    assert path.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("kind", ["enospc", "ioerror"])
def test_a_failed_write_leaves_the_old_file_and_no_remnant(tmp_path, monkeypatch, kind):
    path = tmp_path / "file.txt"
    write_atomic(path, "old")
    monkeypatch.setenv(faults.VARIABLE, f"write-atomic:{kind}")
    with pytest.raises(OSError):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]
    write_atomic(path, "new")
    assert path.read_text() == "new"


def test_a_json_file_that_is_torn_or_missing_is_named(tmp_path):
    path = tmp_path / "torn.json"
    for content in (b"", b'{"a": 1', b"\xff\xfe", b"\x00" * 40):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"torn\.json"):
            read_json(path)
    for path, said in ((tmp_path / "absent.json", r"absent\.json does not exist"), (tmp_path, tmp_path.name)):
        with pytest.raises(UserError, match=said):
            read_json(path)


def test_hashes_name_their_content(tmp_path):
    (tmp_path / "data").write_bytes(data := bytes(range(256)) * 5000)
    assert sha256_file(tmp_path / "data") == hashlib.sha256(data).hexdigest()
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert fingerprint({"a": 1}) != fingerprint({"a": "1"})
    assert len(fingerprint("x")) == 16
    with pytest.raises(ValueError):
        fingerprint(float("nan"))


def test_a_run_folder_is_made_or_taken_or_refused(tmp_path):
    run = RunFolder.create(tmp_path / "runs" / "one")
    assert run.root.is_dir() and RunFolder.create(run.root) == run
    (tmp_path / "taken").write_text("x")
    with pytest.raises(UserError, match="taken"):
        RunFolder.create(tmp_path / "taken")
    with pytest.raises(UserError, match=r"'.*caf\\udce9' is not UTF-8; choose another with --run"):
        RunFolder.create(tmp_path / "caf\udce9")


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_a_link_is_written_at_where_it_points_to(tmp_path, make):
    (tmp_path / "empty").mkdir()
    for name, target in (("empty", "empty"), ("missing", "not/there/yet")):
        link, place = tmp_path / f"to-{name}", tmp_path / target
        link.symlink_to(place)
        with appearing(link) as hidden:
            make(hidden)
        assert link.is_symlink() and link.samefile(place) and place.is_dir() == (make is Path.mkdir)
        assert [path.name for path in place.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("name", ["file/below", "n" * 300])
def test_a_place_where_nothing_can_be_is_refused_before_the_work(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written \(.*\): name another place with --out"):
        new_path(tmp_path / name)
