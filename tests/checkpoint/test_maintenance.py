"""``osler checkpoint``: what a person is shown of a run's checkpoints, and what may be deleted."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest
import torch

from osler.checkpoint import manifest, store
from osler.cli import main
from osler.records.events import read_events


@pytest.fixture
def run(tmp_path) -> Path:
    """Steps 1 to 5; 2 is the best, 3 a milestone."""
    for step in range(1, 6):
        tensors = {"model": {"weight": torch.full((1000,), float(step))}}
        store.save(
            tmp_path / "checkpoints", step, tensors=tensors, state={"tokens": 4096 * step}, keep_last=9, milestone=step == 3
        )
    store.mark_best(folder(tmp_path, 2), "eval/loss", 1.25)
    return tmp_path


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / store.folder_name(step)


def left(run: Path) -> list[int]:
    return sorted(int(name.split("-")[1]) for name in os.listdir(run / "checkpoints") if name.startswith("step-"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def osler(*words: object) -> int:
    return main(["checkpoint", *map(str, words)])


def test_list_shows_step_tokens_size_date_and_what_is_special(run, capsys):
    (folder(run, 4) / "state.json").write_bytes(b"")
    assert osler("list", run) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "bytes are not checked here: `osler checkpoint verify`" in lines[0]
    assert [line.split()[0] for line in lines] == ["step", "5", "4", "3", "2", "1"]
    assert re.fullmatch(r" +5 +20,480 +0\.0 MB +\d{4}-\d\d-\d\d \d\d:\d\d +newest", lines[1])
    assert "?" in lines[2].split() and lines[2].endswith("DAMAGED")
    assert lines[3].endswith("milestone") and lines[4].endswith("best (eval/loss 1.25)")
    assert lines[5].split()[1] == "4,096" and re.search(r"\d\d:\d\d *$", lines[5])
    assert osler("list", run / "checkpoints") == 0


def test_verify_reads_every_byte(run, capsys):
    assert osler("verify", run) == 0
    assert capsys.readouterr().out.count("every file is as it was saved") == 5
    flip(folder(run, 2) / "model.safetensors")
    (folder(run, 4) / "state.json").unlink()
    assert osler("verify", run) == 1
    text = capsys.readouterr().out
    assert "step-000000002: DAMAGED\n  model.safetensors: its content changed" in text
    assert "step-000000004: DAMAGED\n  state.json: missing" in text and text.count("as it was saved") == 3
    assert osler("verify", folder(run, 2)) == 1 and osler("verify", folder(run, 1)) == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--keep-last", 2], [4, 5]),
        (["--keep-last", 1, "--keep-best"], [2, 5]),
        (["--keep-last", 1, "--keep-best", "--keep-milestones"], [2, 3, 5]),
        (["--keep-last", 9], [1, 2, 3, 4, 5]),
    ],
)
def test_prune_keeps_what_it_is_told_to(run, options, expected, capsys):
    sizes = {step: sum(file.stat().st_size for file in folder(run, step).iterdir()) for step in range(1, 6)}
    assert osler("prune", run, *options, "--dry-run") == 0
    text = capsys.readouterr().out
    assert left(run) == [1, 2, 3, 4, 5] and text.count("would be deleted") == 5 - len(expected)
    freed = sum(size for step, size in sizes.items() if step not in expected)
    assert f"{freed / 1e6:,.1f} MB would be free" in text
    assert osler("prune", run, *options) == 0
    assert left(run) == expected and "MB are free" in capsys.readouterr().out


def test_prune_never_takes_the_last_good_one(run, capsys):
    for step in (4, 5):
        flip(folder(run, step) / "model.safetensors")
    assert osler("prune", run, "--keep-last", 1) == 0
    assert left(run) == [3] and store.verify(folder(run, 3)) == []
    flip(folder(run, 3) / "model.safetensors")
    assert osler("prune", run, "--keep-last", 1) == 2
    assert left(run) == [3] and "none is deleted" in capsys.readouterr().err


def test_prune_says_why_each_goes(run, capsys):
    flip(folder(run, 5) / "model.safetensors")
    assert osler("prune", run, "--keep-last", 1, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub(r" .* would be deleted", "", line) for line in lines[:-1]] == [
        "step-000000001: older than the last 1",
        "step-000000002: older than the last 1; the best, which --keep-best keeps",
        "step-000000003: older than the last 1; a milestone, which --keep-milestones keeps",
        "step-000000005: damaged",
    ]


def test_prune_leaves_what_a_save_is_writing(run):
    (run / "checkpoints" / ".tmp-step-000000006").mkdir()
    assert osler("prune", run, "--keep-last", 1) == 0
    assert (run / "checkpoints" / ".tmp-step-000000006").is_dir()


@pytest.mark.parametrize("verb", ["list", "verify", "prune"])
def test_wrong_paths_are_told(verb, run, tmp_path, capsys):
    more = ["--keep-last", 1] if verb == "prune" else []
    (tmp_path / "empty").mkdir()
    for path, words in ((tmp_path / "nowhere", "is no folder"), (tmp_path / "empty", "There is no checkpoint in")):
        assert osler(verb, path, *more) == 2
        assert words in capsys.readouterr().err
    if verb != "verify":
        assert osler(verb, folder(run, 1), *more) == 2
        assert "is one checkpoint: give the run folder" in capsys.readouterr().err


def test_prune_keeps_at_least_one(run, capsys):
    assert osler("prune", run, "--keep-last", 0) == 2
    assert "at least one checkpoint stays" in capsys.readouterr().err and left(run) == [1, 2, 3, 4, 5]


def test_the_group_lists_its_commands(capsys):
    assert main(["checkpoint"]) == 2
    text = capsys.readouterr().err
    assert all(f"`checkpoint {verb}`" in text for verb in ("list", "verify", "prune"))
    assert main(["checkpoint", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"checkpoint {verb} " in text for verb in ("list", "verify", "prune"))


# -- damage that comes after the save ----------------------------------------------------------------------------------


def save(run: Path, step: int, **options) -> list[tuple[Path, list[str]]]:
    """Save a checkpoint of some blocks; returns what damage was found on the way."""
    found: list[tuple[Path, list[str]]] = []
    tensors = {"model": {"weight": torch.full((1 << 20,), float(step))}}
    report = {"on_damage": lambda *damaged: found.append(damaged)}
    store.save(run / "checkpoints", step, tensors=tensors, state={}, **report, **options)
    return found


def test_a_checkpoint_that_rotted_does_not_count_for_keep_last(tmp_path):
    for step in (1, 2, 3):
        assert save(tmp_path, step, keep_last=3) == []
    flip(folder(tmp_path, 2) / "model.safetensors")
    [(path, problems)] = save(tmp_path, 4, keep_last=3)
    assert path == folder(tmp_path, 2) and "its content changed" in problems[0]
    assert left(tmp_path) == [1, 3, 4] and all(store.verify(folder(tmp_path, step)) == [] for step in (1, 3, 4))


def test_a_checkpoint_that_cannot_be_read_for_a_moment_is_not_deleted(tmp_path, monkeypatch):
    """As on a network disk that is away: nobody knows whether it is damaged, so it neither counts nor goes."""
    for step in (1, 2, 3):
        save(tmp_path, step, keep_last=3)
    monkeypatch.setattr(manifest, "_verdicts", {})
    real = manifest.sha256_file

    def away(path, pause):
        if path.parent == folder(tmp_path, 2):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, pause)

    with monkeypatch.context() as patched:
        patched.setattr(manifest, "sha256_file", away)
        [(path, problems)] = save(tmp_path, 4, keep_last=3)
    assert path == folder(tmp_path, 2) and "cannot be read" in problems[0]
    assert left(tmp_path) == [1, 2, 3, 4] and store.verify(folder(tmp_path, 2)) == []
    assert save(tmp_path, 5, keep_last=4) == [] and left(tmp_path) == [2, 3, 4, 5]


def test_rot_under_unchanged_names_and_times_is_found_by_the_next_process(tmp_path, monkeypatch):
    """As a disk rots; the one to go back to must be good as well."""
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep_last=9)
    rotten = folder(tmp_path, 3) / "model.safetensors"
    times = rotten.stat().st_atime_ns, rotten.stat().st_mtime_ns
    flip(rotten)
    os.utime(rotten, ns=times)
    monkeypatch.setattr(manifest, "_verdicts", {})
    [(path, _)] = save(tmp_path, 5, keep_last=1, good_step=3)
    assert path == folder(tmp_path, 3) and left(tmp_path) == [2, 5]


def test_rotation_reads_a_checkpoint_once_in_a_process(tmp_path, monkeypatch):
    def blocks(step: int) -> int:
        pauses = []
        save(tmp_path, step, keep_last=2, pause=lambda: pauses.append(step))
        return len(pauses)

    usual = {blocks(step) for step in range(1, 6)}
    assert len(usual) == 1 and usual.pop() >= 8  # as many to write as to read back, and none of those before
    monkeypatch.setattr(manifest, "_verdicts", {})
    first, second = blocks(6), blocks(7)
    assert second < first <= 2 * second and left(tmp_path) == [6, 7]


def test_verify_tells_the_runs_diary_and_the_run_itself(run, capsys):
    rotten = folder(run, 4) / "model.safetensors"
    times = rotten.stat().st_atime_ns, rotten.stat().st_mtime_ns
    flip(rotten)
    os.utime(rotten, ns=times)
    assert manifest.verdict(folder(run, 4)) == []  # this process saved it, and it looks as it did
    assert osler("verify", run) == 1 and not (run / "events.jsonl").exists()  # there is no run in this folder
    (run / "config.yaml").write_text("kind: pretrain\n")
    assert osler("verify", folder(run, 4)) == 1
    [event] = read_events(run / "events.jsonl")
    assert (event.step, event.kind, event.name) == (4, "incident", "damaged-checkpoint")
    assert "step-000000004 is damaged (model.safetensors: its content changed" in event.message
    assert manifest.verdict(folder(run, 4)) != []
    assert [path for path, _ in save(run, 6, keep_last=3)] == [folder(run, 4)] and left(run) == [2, 3, 5, 6]
