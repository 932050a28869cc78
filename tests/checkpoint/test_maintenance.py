"""``osler checkpoint``: what a person is shown of a run's checkpoints, and what may be deleted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from osler.checkpoint import folders, store
from osler.checkpoint.folders import rotate
from osler.cli.main import main
from osler.records.jsonl import read_events
from tests.checkpoint.conftest import flip, put, rot_silently, steps


@pytest.fixture
def run(tmp_path) -> Path:
    """Steps 1 to 5; 2 is the best, 3 a milestone."""
    for step in range(1, 6):
        put(tmp_path / "checkpoints", step, keep_last=9, milestone=step == 3)
    folders.mark_best(folder(tmp_path, 2), "eval/loss", 1.25)
    return tmp_path


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / store.folder_name(step)


def left(run: Path) -> list[int]:
    return steps(run / "checkpoints")


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


def test_verify_records_damage_and_makes_the_run_read_again(run, capsys):
    rot_silently(folder(run, 4) / "model.safetensors")
    assert folders.known_problems(folder(run, 4)) == []  # this process saved it, and it looks as it did
    assert osler("verify", run) == 1 and not (run / "events.jsonl").exists()  # there is no run in this folder
    (run / "config.yaml").write_text("kind: pretrain\n")
    assert osler("verify", folder(run, 4)) == 1
    [event] = read_events(run / "events.jsonl")
    assert (event.step, event.kind, event.name) == (4, "incident", "damaged-checkpoint")
    assert "step-000000004 is damaged (model.safetensors: its content changed" in event.message
    assert folders.known_problems(folder(run, 4)) != []
    newest = put(run / "checkpoints", 6, keep_last=9)
    [(path, _)] = rotate(run / "checkpoints", newest, 3)
    assert path == folder(run, 4) and left(run) == [2, 3, 5, 6]
