"""Files are whole or absent; hashes and fingerprints name their content; a run folder has one layout."""

from __future__ import annotations

import hashlib
import os

import pytest

from osler.runtime import faults
from osler.runtime.errors import UserError
from osler.runtime.files import (
    RunFolder,
    fingerprint,
    read_json,
    sha256_file,
    write_atomic,
)


def test_write_atomic_writes_bytes_and_text(tmp_path):
    path = tmp_path / "file.txt"
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    write_atomic(path, "naïve\n")
    assert path.read_bytes() == "naïve\n".encode()
    write_atomic(path, "caf\udce9")  # as Python holds a name that is not UTF-8
    assert path.read_text() == r"caf\udce9"
    assert os.listdir(tmp_path) == ["file.txt"]


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


@pytest.mark.skipif(os.name == "nt", reason="file modes are a POSIX idea")
def test_a_written_file_has_ordinary_permissions(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("x")
    write_atomic(tmp_path / "atomic", "x")
    assert (tmp_path / "atomic").stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe", b"\x00" * 40])
def test_a_torn_json_file_is_named(tmp_path, content):
    path = tmp_path / "torn.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"torn\.json"):
        read_json(path)


def test_a_missing_json_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.json does not exist"):
        read_json(tmp_path / "absent.json")
    with pytest.raises(UserError, match=tmp_path.name):
        read_json(tmp_path)


def test_sha256_file_equals_the_hash_of_the_bytes(tmp_path):
    data = bytes(range(256)) * 5000
    (tmp_path / "data").write_bytes(data)
    assert sha256_file(tmp_path / "data") == hashlib.sha256(data).hexdigest()


def test_fingerprint_ignores_key_order_and_sees_every_value():
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
