"""Rotation keeps what matters in any history, and counts on nothing that is damaged."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
import torch

from osler.checkpoint import folders
from osler.checkpoint.folders import best_checkpoint, folder_name, mark_best, newest_good, rotate, verify
from osler.checkpoint.store import CheckpointSaveError, load, save
from osler.runtime.errors import UserError
from tests.checkpoint.conftest import flip, put, rot_silently, steps


def test_the_last_ones_and_the_best_stay(tmp_path):
    for step in range(1, 8):
        put(tmp_path, step, keep_last=2, best=step == 3)
        newest_two = {max(1, step - 1), step}
        assert set(steps(tmp_path)) == newest_two | ({3} if step >= 3 else set())
    found = best_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.metric, found.value) == (3, "eval/loss", 0.5)
    mark_best(tmp_path / "step-000000007", "eval/loss", 0.4)
    put(tmp_path, 8, keep_last=2)
    assert steps(tmp_path) == [7, 8]


def test_milestones_stay(tmp_path):
    for step in range(1, 9):
        put(tmp_path, step, keep_last=2, milestone=step % 3 == 0)
    assert steps(tmp_path) == [3, 6, 7, 8]
    (tmp_path / "step-000000003" / "state.json").write_bytes(b"{")
    put(tmp_path, 9, keep_last=1)
    assert steps(tmp_path) == [6, 9]


def test_a_checkpoint_that_does_not_read_back_costs_no_earlier_one(tmp_path, monkeypatch):
    """The disk changes a byte between writing and reading: the new checkpoint goes, and the last good one stays."""
    put(tmp_path, 1)
    rename = Path.rename

    def rename_and_damage(self, target):
        moved = rename(self, target)
        if Path(target).name == "step-000000002":
            flip(Path(target) / "model.safetensors", -1)
        return moved

    monkeypatch.setattr(Path, "rename", rename_and_damage)
    with pytest.raises(CheckpointSaveError, match=r"does not read back \(model\.safetensors"):
        put(tmp_path, 2, keep_last=1)
    assert os.listdir(tmp_path) == ["step-000000001"] and verify(tmp_path / "step-000000001") == []


def test_a_damaged_checkpoint_does_not_count_among_the_last(tmp_path):
    for step in (1, 2, 3):
        put(tmp_path, step)
    (tmp_path / "step-000000003" / "model.safetensors").write_bytes(b"torn")
    put(tmp_path, 4, keep_last=2)
    assert steps(tmp_path) == [2, 4]


def test_going_back_makes_the_later_ones_old(tmp_path):
    """After a run went back from step 30 to 10, its checkpoint of step 20 is the newest."""
    for step in (10, 30):
        put(tmp_path, step)
    path = put(tmp_path, 20)
    assert newest_good(tmp_path) == (path, [])
    put(tmp_path, 21, keep_last=2)
    assert steps(tmp_path) == [20, 21]


def test_saving_a_step_again_replaces_it(tmp_path):
    put(tmp_path, 1)
    rotate(tmp_path, save(tmp_path, 1, tensors={}, state={"again": True}), 1)
    assert load(tmp_path / "step-000000001").state == {"again": True}
    assert steps(tmp_path) == [1]


def test_foreign_files_and_links_are_left_alone(tmp_path):
    root, elsewhere = tmp_path / "root", put(tmp_path / "elsewhere", 1)
    put(root, 2)
    (root / "notes.txt").write_text("mine")
    (root / "step-old").mkdir()
    (root / "step-000000001").symlink_to(elsewhere, target_is_directory=True)
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
        assert marked is None or marked.is_dir()
        left = set(tmp_path.glob("step-*"))
        assert len(left - {marked}) <= keep_last
        assert len(left) >= min(keep_last, len({*before, path}))
        if rng.random() < 0.3:
            (rng.choice(sorted(left - {marked}) or [path]) / "state.json").write_bytes(b"")
            if marked is not None and verify(marked):
                put(tmp_path, 99, keep_last=1)
                marked = tmp_path / "step-000000099"
                mark_best(marked, "", None)


# Damage that comes after the save


def folder(root: Path, step: int) -> Path:
    return root / folder_name(step)


def save_big(root: Path, step: int, keep_last: int, *, pause=lambda: None, **options) -> list[tuple[Path, list[str]]]:
    """Save a checkpoint of some blocks; returns what rotation found damaged."""
    saved = save(root, step, tensors={"model": {"weight": torch.full((1 << 20,), float(step))}}, state={}, pause=pause)
    return rotate(root, saved, keep_last, pause=pause, **options)


@pytest.fixture
def another_process(monkeypatch):
    """Forget what this process has verified."""
    return lambda: monkeypatch.setattr(folders, "_verified", {})


def test_a_checkpoint_that_rotted_does_not_count_for_keep_last(tmp_path):
    for step in (1, 2, 3):
        assert save_big(tmp_path, step, 3) == []
    flip(folder(tmp_path, 2) / "model.safetensors")
    [(path, problems)] = save_big(tmp_path, 4, 3)
    assert path == folder(tmp_path, 2) and "its content changed" in problems[0]
    assert steps(tmp_path) == [1, 3, 4] and all(verify(folder(tmp_path, step)) == [] for step in (1, 3, 4))


def test_a_checkpoint_that_cannot_be_read_for_a_moment_is_not_deleted(tmp_path, monkeypatch, another_process):
    """As on a network disk that is away: nobody knows whether it is damaged, so it neither counts nor goes."""
    for step in (1, 2, 3):
        save_big(tmp_path, step, 3)
    another_process()
    real = folders.sha256_file

    def away(path, pause):
        if path.parent == folder(tmp_path, 2):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, pause)

    with monkeypatch.context() as patched:
        patched.setattr(folders, "sha256_file", away)
        [(path, problems)] = save_big(tmp_path, 4, 3)
    assert path == folder(tmp_path, 2) and "cannot be read" in problems[0]
    assert steps(tmp_path) == [1, 2, 3, 4] and verify(folder(tmp_path, 2)) == []
    assert save_big(tmp_path, 5, 4) == [] and steps(tmp_path) == [2, 3, 4, 5]


def test_rot_under_unchanged_names_and_times_is_found_by_the_next_process(tmp_path, another_process):
    """The one to go back to must be good as well."""
    for step in (1, 2, 3, 4):
        save_big(tmp_path, step, 9)
    rot_silently(folder(tmp_path, 3) / "model.safetensors")
    assert folders.known_problems(folder(tmp_path, 3)) == []  # this process saved it, and it looks as it did
    another_process()
    [(path, _)] = save_big(tmp_path, 5, 1, good_step=3)
    assert path == folder(tmp_path, 3) and steps(tmp_path) == [2, 5]


def test_rotation_reads_a_checkpoint_once_in_a_process(tmp_path, another_process):
    def blocks(step: int) -> int:
        pauses = []
        save_big(tmp_path, step, 2, pause=lambda: pauses.append(step))
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
