"""``osler checkpoint``: what a person is shown of a run's checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from osler.checkpoint import folders
from osler.cli.main import main
from osler.records.jsonl import read_events
from tests.checkpoint.conftest import folder, put, rot_silently


@pytest.fixture
def root(tmp_path) -> Path:
    """The checkpoints of a run: steps 1 to 5; 2 is the best, 3 a milestone."""
    root = tmp_path / "checkpoints"
    for step in range(1, 6):
        put(root, step, keep_last=9, milestone=step == 3)
    folders.mark_best(folder(root, 2), "eval/loss", 1.25)
    return root


@pytest.fixture
def osler(capsys) -> Callable[..., str]:
    """``osler(code, *words)`` requires an exit code of a command and returns what it says."""

    def run(code: int, *words: object) -> str:
        assert main(["checkpoint", *map(str, words)]) == code
        return "".join(capsys.readouterr())

    return run


def test_list_shows_step_tokens_size_date_and_what_is_special(root, osler):
    (folder(root, 4) / "state.json").write_bytes(b"")
    lines = osler(0, "list", root.parent).splitlines()
    assert "bytes are not checked here: `osler checkpoint verify`" in lines[0]
    assert [line.split()[0] for line in lines] == ["step", "5", "4", "3", "2", "1"]
    assert re.fullmatch(r" +5 +20,480 +0\.2 MB +\d{4}-\d\d-\d\d \d\d:\d\d +newest", lines[1])
    assert "?" in lines[2].split() and lines[2].endswith("DAMAGED")
    assert lines[3].endswith("milestone") and lines[4].endswith("best (eval/loss 1.25)")
    assert lines[5].split()[1] == "4,096" and re.search(r"\d\d:\d\d *$", lines[5])
    assert osler(0, "list", root).splitlines() == lines


def test_verify_reads_every_byte_records_damage_and_makes_the_run_read_again(root, osler):
    assert osler(0, "verify", root.parent).count("every file is as it was saved") == 5
    rot_silently(folder(root, 2) / "model.safetensors")
    (folder(root, 4) / "state.json").unlink()
    assert folders.known_problems(folder(root, 2)) == []  # this process saved it, and it looks as it did
    text = osler(1, "verify", root.parent)
    assert "step-000000002: DAMAGED\n  model.safetensors: its content changed" in text
    assert "step-000000004: DAMAGED\n  state.json: missing" in text and text.count("as it was saved") == 3
    events = root.parent / "events.jsonl"
    assert not events.exists()  # there is no run in this folder
    (root.parent / "config.yaml").write_text("kind: pretrain\n")
    osler(1, "verify", folder(root, 2))
    osler(0, "verify", folder(root, 1))
    [event] = read_events(events)
    assert (event.step, event.kind, event.name) == (2, "incident", "damaged-checkpoint")
    assert "step-000000002 is damaged (model.safetensors: its content changed" in event.message
    assert folders.known_problems(folder(root, 2)) != []


@pytest.mark.parametrize("verb", ["list", "verify"])
def test_wrong_paths_are_told(verb, root, tmp_path, osler):
    (tmp_path / "empty").mkdir()
    assert "is no folder" in osler(2, verb, tmp_path / "nowhere")
    assert "There is no checkpoint in" in osler(2, verb, tmp_path / "empty")
    (tmp_path / "pipeline" / "sft" / "checkpoints").mkdir(parents=True)
    assert f"give the one that you mean: {tmp_path / 'pipeline' / 'sft'}." in osler(2, verb, tmp_path / "pipeline")
    if verb == "list":
        assert "is one checkpoint: give the run folder" in osler(2, verb, folder(root, 1))
