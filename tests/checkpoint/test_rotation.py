"""Rotation keeps what matters in any history, and counts on nothing that is damaged."""

from __future__ import annotations

import errno
import os
import random

import pytest

from osler.checkpoint import folders
from osler.checkpoint.folders import best_checkpoint, newest_good, rotate, verify
from osler.checkpoint.store import CheckpointSaveError
from osler.runtime.errors import UserError
from tests.checkpoint.conftest import flip, folder, put, rot_silently, steps


def test_milestones_stay(tmp_path):
    for step in range(1, 9):
        put(tmp_path, step, keep_last=2, milestone=step % 3 == 0)
    assert steps(tmp_path) == [3, 6, 7, 8]
    (folder(tmp_path, 3) / "state.json").write_bytes(b"{")
    put(tmp_path, 9, keep_last=1)
    assert steps(tmp_path) == [6, 9]


def test_a_checkpoint_that_does_not_read_back_costs_no_earlier_one(tmp_path, monkeypatch):
    """The disk changes a byte between writing and reading: the new checkpoint goes, and the last good one stays."""
    put(tmp_path, 1)
    rename = folders.Path.rename

    def rename_and_damage(self, target):
        moved = rename(self, target)
        if target == folder(tmp_path, 2):
            flip(target / "model.safetensors", -1)
        return moved

    monkeypatch.setattr(folders.Path, "rename", rename_and_damage)
    with pytest.raises(CheckpointSaveError, match=r"does not read back \(model\.safetensors"):
        put(tmp_path, 2, keep_last=1)
    assert os.listdir(tmp_path) == ["step-000000001"] and verify(folder(tmp_path, 1)) == []


def test_going_back_makes_the_later_ones_old(tmp_path):
    """After a run went back from step 30 to 10, its checkpoint of step 20 is the newest."""
    for step in (10, 30):
        put(tmp_path, step)
    path = put(tmp_path, 20)
    assert newest_good(tmp_path) == (path, [])
    put(tmp_path, 21, keep_last=2)
    assert steps(tmp_path) == [20, 21]


def test_the_good_one_of_two_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    """A replacement that was killed half way left a torn checkpoint and the good one aside; the next one fails too."""
    torn = put(tmp_path, 5)
    flip(torn / "state.json")
    aside = put(tmp_path / "other", 5).rename(f"{torn}.replaced")
    assert newest_good(tmp_path)[0] == aside

    def fail(place):
        if place == "save-rename":
            raise OSError("the disk is gone")

    monkeypatch.setattr("osler.checkpoint.store.fault", fail)
    with pytest.raises(CheckpointSaveError):
        put(tmp_path, 5)
    assert verify(newest_good(tmp_path)[0]) == []


def test_foreign_files_and_links_are_left_alone(tmp_path):
    root, elsewhere = tmp_path / "root", put(tmp_path / "elsewhere", 1)
    put(root, 2)
    (root / "notes.txt").write_text("mine")
    (root / "step-old").mkdir()
    folder(root, 1).symlink_to(elsewhere, target_is_directory=True)
    for step in (3, 4):
        put(root, step, keep_last=1)
    assert sorted(os.listdir(root)) == ["notes.txt", "step-000000001", "step-000000004", "step-old"]
    assert verify(elsewhere) == []


def test_a_torn_best_pointer_stops_rotation_but_not_the_run(tmp_path, capsys):
    put(tmp_path, 1, best=True)
    (tmp_path / "best.json").write_text('{"folder": "../..')
    put(tmp_path, 2, keep_last=1)
    assert steps(tmp_path) == [1, 2]
    assert "best.json" in capsys.readouterr().err
    (tmp_path / "best.json").write_text('{"folder": "../../etc"}')
    with pytest.raises(UserError, match="does not name a checkpoint"):
        best_checkpoint(tmp_path)


@pytest.mark.parametrize("seed", range(5))
def test_rotation_keeps_its_promises_in_any_history(tmp_path, seed):
    rng = random.Random(seed)
    marked = None
    for _ in range(12):
        step, keep_last, is_best = rng.randrange(1, 15), rng.randrange(1, 4), rng.random() < 0.3
        before = [path for path in tmp_path.glob("step-*") if not verify(path)]
        path = put(tmp_path, step, keep_last=keep_last, best=is_best)
        marked = path if is_best else marked
        assert newest_good(tmp_path) == (path, [])
        assert marked is None or (marked.is_dir() and best_checkpoint(tmp_path)[:1] == (marked,))
        left = set(tmp_path.glob("step-*"))
        assert len(left - {marked}) <= keep_last
        assert len(left) >= min(keep_last, len({*before, path}))
        if rng.random() < 0.3:
            (rng.choice(sorted(left - {marked}) or [path]) / "state.json").write_bytes(b"")
            if marked is not None and verify(marked):
                marked = put(tmp_path, 99, keep_last=1, best=True)


# Damage that comes after the save


def put_and_rotate(root, step, keep_last, *, pause=lambda: None, **options):
    """Save a checkpoint; returns what rotation found damaged."""
    return rotate(root, put(root, step, keep_last=99, pause=pause), keep_last, pause=pause, **options)


@pytest.fixture
def another_process(monkeypatch):
    """Forget what this process has verified."""
    return lambda: monkeypatch.setattr(folders, "_verified", {})


@pytest.mark.parametrize("is_torn", [True, False])
def test_a_damaged_checkpoint_does_not_count_for_keep_last(tmp_path, is_torn):
    """What is torn is seen by its size; what has rotted is read, and returned."""
    for step in (1, 2, 3):
        assert put_and_rotate(tmp_path, step, 3) == []
    if is_torn:
        (folder(tmp_path, 2) / "model.safetensors").write_bytes(b"torn")
        assert put_and_rotate(tmp_path, 4, 3) == []
    else:
        flip(folder(tmp_path, 2) / "model.safetensors")
        [(path, problems)] = put_and_rotate(tmp_path, 4, 3)
        assert path == folder(tmp_path, 2) and "its content changed" in problems[0]
    assert steps(tmp_path) == [1, 3, 4] and all(verify(folder(tmp_path, step)) == [] for step in (1, 3, 4))


def test_a_checkpoint_that_cannot_be_read_for_a_moment_is_not_deleted(tmp_path, monkeypatch, another_process):
    """As on a network disk that is away: nobody knows whether it is damaged, so it neither counts nor goes."""
    for step in (1, 2, 3):
        put_and_rotate(tmp_path, step, 3)
    another_process()
    real = folders.sha256_file

    def away(path, pause):
        if path.parent == folder(tmp_path, 2):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, pause)

    with monkeypatch.context() as patched:
        patched.setattr(folders, "sha256_file", away)
        [(path, problems)] = put_and_rotate(tmp_path, 4, 3)
    assert path == folder(tmp_path, 2) and "cannot be read" in problems[0]
    assert steps(tmp_path) == [1, 2, 3, 4] and verify(folder(tmp_path, 2)) == []
    assert put_and_rotate(tmp_path, 5, 4) == [] and steps(tmp_path) == [2, 3, 4, 5]


def test_rot_under_unchanged_names_and_times_is_found_by_the_next_process(tmp_path, another_process):
    """The one to go back to must be good as well."""
    for step in (1, 2, 3, 4):
        put_and_rotate(tmp_path, step, 9)
    rot_silently(folder(tmp_path, 3) / "model.safetensors")
    assert folders.known_problems(folder(tmp_path, 3)) == []  # this process saved it, and it looks as it did
    another_process()
    [(path, _)] = put_and_rotate(tmp_path, 5, 1, good_step=3)
    assert path == folder(tmp_path, 3) and steps(tmp_path) == [2, 5]


def test_rotation_reads_a_checkpoint_once_in_a_process(tmp_path, another_process):
    def blocks(step: int) -> int:
        pauses = []
        put_and_rotate(tmp_path, step, 2, pause=lambda: pauses.append(step))
        return len(pauses)

    usual = {blocks(step) for step in range(1, 6)}
    assert len(usual) == 1 and usual.pop() >= 8  # as many to write as to read back, and none of those before
    another_process()
    first, second = blocks(6), blocks(7)
    assert second < first <= 2 * second and steps(tmp_path) == [6, 7]


@pytest.mark.parametrize(("good_step", "kept"), [(None, [4, 5]), (5, [4, 5]), (4, [4, 5]), (3, [3, 4, 5]), (0, [4, 5])])
def test_the_checkpoint_that_a_rollback_would_take_stays(tmp_path, good_step, kept):
    for step in range(1, 6):
        path = put(tmp_path, step, keep_last=9)
    assert rotate(tmp_path, path, 2, good_step) == [] and steps(tmp_path) == kept
