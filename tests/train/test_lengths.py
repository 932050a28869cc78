"""Data that do not fit a run: examples longer than a row, text shorter than one, files without any, passes without end."""

from __future__ import annotations

import json

import pytest

from osler.cli.main import main
from osler.records.jsonl import read_events


@pytest.fixture
def long_turns(tiny, tmp_path):
    """The tiny questions, every fourth of them with a preface longer than two rows."""
    turns = [json.loads(line) for line in (tiny.root / "turns.jsonl").read_text().splitlines()]
    for turn in turns[::4]:
        turn["question"] = "What was said before has no bearing on this. " * 20 + turn["question"]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(turn) + "\n" for turn in turns), encoding="utf-8")
    return path


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_answers_that_would_be_cut_from_their_questions_are_refused_with_what_to_set(tiny, runs, long_turns, tmp_path, capsys):
    run = tmp_path / "run"
    command = ["sft", tiny.sft, f"init_from={runs.pretrain}", f"data.path={long_turns}", "--run", str(run)]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "40 of 160 examples are longer than a row of seq_len 128 (the longest has " in said
    assert "the most that the model reads (max_seq_len)" in said or "the model reads no more than" in said
    assert "too_long=drop" in said and not (run / "config.yaml").exists()
    assert main([*command, "too_long=drop"]) == 0  # in the same folder
    said = capsys.readouterr().err
    assert "Warning: 40 of 160 examples are longer than a row" in said and "left out (too_long=drop)" in said
    told = [line for line in metrics(run) if "train/loss" in line]
    assert told and all(line["train/loss"] > 1.0 and line["train/unlearned_steps"] == 0 for line in told)
    assert any("eval/loss" in line for line in metrics(run))


def test_a_row_length_that_is_proposed_works(tiny, long_turns, tmp_path, capsys):
    command = ["sft", tiny.sft, f"data.path={long_turns}", "model.max_seq_len=1024", "--run", str(tmp_path / "run")]
    assert main(command) == 2
    proposed = capsys.readouterr().err.split(": set ")[1].split(", or ")[0]
    length = int(proposed.removeprefix("seq_len="))
    assert main([*command, proposed, f"batch_tokens={4 * length}", "total_tokens=1024"]) == 0


def test_dropping_is_refused_and_not_proposed_where_it_leaves_nothing(tiny, long_turns, tmp_path, capsys):
    path = tmp_path / "turns.jsonl"
    rows = [{"question": f"{n} " + "What is it? " * 200, "why": "Clear.", "answer": "(A)"} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = [f"data.path={long_turns}", "seq_len=16", "batch_tokens=64", "too_long=drop"]
    for number, overrides in enumerate(([f"data.path={path}"], short)):
        assert main(["sft", tiny.sft, *overrides, "--run", str(tmp_path / str(number))]) == 2
        said = capsys.readouterr().err
        assert "or leave these examples out" not in said and "leaves nothing to train on or to hold out" in said


def test_text_that_is_read_again_and_again_is_told_at_the_start_and_at_the_end(tiny, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("A cough and a fever.\n")
    run = tmp_path / "run"
    clinic = ["data.type=files", f"data.path={text}", "data.holdout_fraction=0"]
    assert main(["pretrain", tiny.pretrain, *clinic, "--run", str(run)]) == 0
    said = capsys.readouterr().err
    assert "less than one row of seq_len 64" in said
    assert "Note: the run reads its " in said and " times. Up to about 4 times" in said
    assert "Warning: step 12: the run has read its data " in said
    assert "repeated-data" in {alert["name"] for alert in read_events(run / "events.jsonl")[-1].details["unresolved"]}


def test_a_run_over_data_that_suffice_is_told_nothing(tiny, tmp_path, capsys):
    assert main(["pretrain", tiny.pretrain, "--run", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().err
    assert "Note:" not in said and "Warning:" not in said


@pytest.mark.parametrize(("name", "content"), [("empty.jsonl", ""), ("blank.jsonl", '{"text": " "}\n'), ("empty.txt", "")])
@pytest.mark.parametrize("own_tokenizer", [True, False])
def test_files_that_hold_nothing_are_named(tiny, tmp_path, capsys, name, content, own_tokenizer):
    path = tmp_path / name
    path.write_text(content)
    tokenizer = ["tokenizer.path=null", "tokenizer.vocab_size=300"] if own_tokenizer else []
    command = ["pretrain", tiny.pretrain, "data.type=files", f"data.path={path}", *tokenizer, "--run", str(tmp_path / "run")]
    for more in (["--dry-run"], []):
        assert main([*command, *more]) == 2
        assert str(path) in capsys.readouterr().err
