"""Checkpoints come back bit for bit, damage is noticed and fallen back from, and rotation keeps what matters."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from osler.checkpoint import folders
from osler.checkpoint.folders import describe_damaged, newest_good, verify
from osler.checkpoint.store import DTYPE_NAMES, CheckpointSaveError, load, resolve, save
from osler.runtime.errors import UserError
from tests.checkpoint.conftest import flip, folder, put, steps

FILES = ["config.yaml", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json"]


# What goes in comes out


def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype in DTYPE_NAMES:
        for shape in ((), (1,), (3, 5), (0, 4), (257,)):
            raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
            raw = raw % 2 if dtype == torch.bool else raw
            tensors[f"{dtype}-{shape}"] = raw.view(dtype).reshape(shape)
    path = save(tmp_path, 5, tensors={"all": tensors, "none": {}}, state={})
    loaded = load(path)
    assert loaded.tensors["none"] == {}
    assert loaded.tensors["all"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        back = loaded.tensors["all"][name]
        assert back.dtype == tensor.dtype and back.shape == tensor.shape
        assert torch.equal(back.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def test_tied_views_and_parameters_are_saved_by_value(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "weight": torch.nn.Parameter(base),
        "tied": base,
        "transposed": base.T,
        "slice": base[1:3, ::2],
        "expanded": torch.ones(1).expand(5),
        "larger than a block": torch.arange(5_000_000, dtype=torch.int32),
    }
    loaded = load(save(tmp_path, 0, tensors={"model": tensors}, state={})).tensors["model"]
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor), name


def test_state_and_files_come_back_exactly_and_other_tools_read_the_tensors(tmp_path):
    state = {"loss": 0.1 + 0.2, "nested": {"list": [1, None, True, "ü"]}, "big": 2**80}
    files = {"tokenizer.json": bytes(range(256)), "empty": b""}
    loaded = load(save(tmp_path, 123, tensors={"model": {"bias": torch.ones(2)}}, state=state, files=files))
    assert (loaded.path, loaded.step, loaded.state, loaded.files) == (folder(tmp_path, 123), 123, state, files)
    with safe_open(loaded.path / "model.safetensors", framework="pt") as file:
        assert list(file.keys()) == ["bias"] and file.metadata() == {"format": "pt"}


def test_names_restrict_reading_and_verifying(tmp_path):
    path = put(tmp_path, 1)
    flip(path / "optimizer.safetensors", -1)
    loaded = load(path, names=["model"])
    assert loaded.tensors.keys() == {"model"} and loaded.files.keys() == {"tokenizer.json", "config.yaml"}
    with pytest.raises(UserError, match=r"optimizer\.safetensors"):
        load(path)


def test_a_state_that_json_cannot_hold_is_refused_before_the_disk_is_touched(tmp_path):
    with pytest.raises(TypeError):
        save(tmp_path / "root", 1, tensors={"model": {"w": torch.ones(1)}}, state={"a": torch.ones(1)})
    assert not (tmp_path / "root").exists()


# Damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "flip": lambda path: flip(path, random.Random(path.name).randrange(path.stat().st_size)),
    "truncate": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "grow": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "unlink": Path.unlink,
}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    put(root, 1)
    put(root, 2)
    return root


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damage_to_any_file_is_noticed_and_fallen_back_from(two_checkpoints, tmp_path, name, damage):
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    good, bad = folder(tmp_path, 1), folder(tmp_path, 2)
    assert newest_good(tmp_path) == (bad, []) and sorted(os.listdir(bad)) == FILES
    DAMAGES[damage](bad / name)
    problems = verify(bad)
    assert len(problems) == 1 and problems[0].startswith(f"{name}: ")
    with pytest.raises(UserError, match=name):
        load(bad)
    assert newest_good(tmp_path) == (good, [(bad, problems)])
    assert name in describe_damaged([(bad, problems)])


def test_the_bytes_of_the_manifest_count(tmp_path):
    path = put(tmp_path, 1) / "manifest.json"
    original = path.read_bytes()
    unnoticed = []
    for index in range(0, len(original), 5):
        path.write_bytes(original)
        flip(path, index)
        with contextlib.suppress(UserError):
            folders.Manifest.read(path.parent)
            unnoticed.append(index)
    assert unnoticed == []


def test_a_manifest_of_another_step_or_format_is_noticed(tmp_path):
    path = put(tmp_path, 1)
    other = shutil.copytree(path, folder(tmp_path, 9))
    assert "belongs to step 1" in verify(other)[0]
    for content in ([], {}, {"sha256": "x"}, {"format": 1, "files": {}}):
        (path / "manifest.json").write_text(json.dumps(content))
        assert len(verify(path)) == 1
    future = {"format": 99}
    (path / "manifest.json").write_text(json.dumps({**future, "sha256": folders._content_hash(future)}))
    assert "format 99" in verify(path)[0]


def test_a_manifest_cannot_reach_outside_its_folder(tmp_path):
    path = put(tmp_path, 1)
    (tmp_path / "secret").write_bytes(b"s")
    files = {"../secret": folders.FileRecord(1, "0" * 64)}
    folders.Manifest(1, 1, files).write(path)
    assert "outside its folder" in verify(path)[0]


class _Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["OSLER_TEST_BOMB"],)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
def test_a_pickle_that_the_manifest_vouches_for_is_not_run(tmp_path, monkeypatch, name):
    """Whoever can write a checkpoint can write its hashes too."""
    monkeypatch.setenv("OSLER_TEST_BOMB", str(tmp_path / "exploded"))
    path = put(tmp_path, 1)
    (path / name).write_bytes(pickle.dumps(_Bomb()))
    written = folders.Manifest.read(path)
    record = folders.FileRecord((path / name).stat().st_size, folders.sha256_file(path / name))
    folders.Manifest(1, 1, {**written.files, name: record}).write(path)
    assert verify(path) == []
    with pytest.raises(UserError, match=name):
        load(path)
    assert not (tmp_path / "exploded").exists()


def test_what_is_not_listed_is_no_part_of_a_checkpoint(tmp_path):
    assert newest_good(tmp_path) == newest_good(tmp_path / "absent") == (None, [])
    assert verify(tmp_path / "absent") == ["absent: no such folder"]
    path = put(tmp_path, 1)
    (path / ".DS_Store").write_bytes(b"x")
    assert verify(path) == [] and load(path).step == 1
    (path / "optimizer.pt").write_bytes(b"x")
    assert verify(path) == ["optimizer.pt: not listed in the manifest, remove it"]
    with pytest.raises(UserError, match=r"optimizer\.pt"):
        load(path)


# A disk that is full or fails


@pytest.mark.parametrize(("kind", "step"), [("ioerror", 1), ("enospc", 2)])
@pytest.mark.parametrize(
    "stage", ["save-tensors", "save-state", "save-files", "save-manifest", "write-atomic", "save-rename", "save-verify"]
)
def test_a_failing_disk_leaves_the_older_checkpoint(tmp_path, fault, stage, kind, step):
    put(tmp_path, 1)
    fault(f"{stage}:{kind}")
    with pytest.raises(CheckpointSaveError, match=f"step-00000000{step} could not be saved"):
        put(tmp_path, step)
    found, skipped = newest_good(tmp_path)
    assert found is not None and skipped == []
    assert load(found).step in (1, step)
    assert list(tmp_path.glob(".*")) == []
    put(tmp_path, 3, keep_last=1)
    assert os.listdir(tmp_path) == ["step-000000003"]


@pytest.mark.parametrize("stage", ["save-best", "rotate"])
def test_a_disk_that_fails_after_the_save_only_warns(tmp_path, fault, stage, capsys):
    put(tmp_path, 1)
    fault(f"{stage}:enospc")
    path = put(tmp_path, 2, keep_last=1, best=True)
    assert verify(path) == []
    assert "Warning" in capsys.readouterr().err
    put(tmp_path, 3, keep_last=1)
    assert 3 in steps(tmp_path) and 1 not in steps(tmp_path)


def test_a_root_that_cannot_exist_is_an_error_a_run_survives(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointSaveError):
        put(tmp_path / "file", 1)


def test_remnants_of_killed_saves_are_removed(tmp_path):
    for name in (".tmp-step-000000007", ".tmp-removed-step-000000003"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".best.json.17-1.tmp").write_bytes(b"{")
    assert newest_good(tmp_path) == (None, [])
    put(tmp_path, 8)
    assert os.listdir(tmp_path) == ["step-000000008"]


# What a person means by a path


def test_resolve_takes_a_checkpoint_a_root_or_a_run(tmp_path, capsys):
    root = tmp_path / "run" / "checkpoints"
    first, second = put(root, 1, best=True), put(root, 2)
    assert resolve(first) == first
    assert resolve(root) == resolve(tmp_path / "run") == second
    assert resolve(tmp_path / "run", which="best") == first
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert resolve(moved, which="best").parent == moved / "checkpoints"
    moved.rename(tmp_path / "run")
    copied = shutil.copytree(first, tmp_path / "my model")
    assert resolve(copied) == copied and load(copied).step == 1
    assert capsys.readouterr().err == ""
    truncate(second / "state.json")
    assert resolve(tmp_path / "run") == first
    assert "going on from" in capsys.readouterr().err
    truncate(first / "state.json")
    with pytest.raises(UserError, match=r"is good: .*state\.json"):
        resolve(root)


def test_resolve_says_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is no folder"):
        resolve(tmp_path / "absent")
    with pytest.raises(UserError, match="no checkpoint in"):
        resolve(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"no checkpoint in {tmp_path.resolve()}\.$"):  # `.` and a full stop would be `..`
        resolve(".")
    put(tmp_path / "quickstart" / "sft" / "checkpoints", 1)
    with pytest.raises(UserError, match=r"holds 1 runs; give the one that you mean: .*sft"):
        resolve(tmp_path / "quickstart")
    put(tmp_path, 1)
    with pytest.raises(UserError, match="marked best"):
        resolve(tmp_path, which="best")
