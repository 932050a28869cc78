"""A run goes on from the shards that it has: from another folder, without the files they were made of, or with those moved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from run_folders import STOPPED, at, flip

from osler.cli.main import main
from osler.config.recipe import load_yaml

TEXTS = [f"Finding {number} speaks for disease {number % 7}, and never for its twin. " * 3 for number in range(60)]


@pytest.fixture
def stopped(launch, tmp_path, monkeypatch):
    """A run on notes/, named from where it was started, stopped after five of its twelve steps."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    monkeypatch.chdir(tmp_path)
    own = ["data.type=files", "data.path=notes/"]
    assert launch("pretrain", tmp_path / "whole", *own) == 0
    assert launch("pretrain", tmp_path / "run", *own, fault="train-step:sigterm:5") == STOPPED
    return tmp_path / "run"


def stored_path(run: Path) -> str:
    return load_yaml((run / "config.yaml").read_text(), "")["data"]["path"]


def test_a_run_goes_on_from_another_folder(stopped, tmp_path, monkeypatch, assert_same_run, capsys):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["pretrain", "--resume", "--run", str(stopped), "--dry-run"]) == 0
    capsys.readouterr()
    assert main(["pretrain", "--resume", "--run", str(stopped)]) == 0
    text = capsys.readouterr().err
    assert (
        f"There is nothing at data.path=notes/ from here; going on with what was prepared from it, in {stopped / 'data'}" in text
    )
    assert stored_path(stopped) == "notes/"
    assert_same_run(stopped, tmp_path / "whole")


def test_a_moved_run_whose_data_are_gone_goes_on(stopped, tmp_path, assert_same_run):
    shutil.rmtree(tmp_path / "notes")
    moved = stopped.rename(tmp_path / "moved")
    assert main(["pretrain", "--resume", "--run", str(moved)]) == 0
    assert_same_run(moved, tmp_path / "whole")


@pytest.mark.parametrize("with_recipe", [False, True])
def test_data_may_be_given_from_another_place_when_they_are_the_same(
    with_recipe, stopped, launch, tiny, tmp_path, assert_same_run, capsys
):
    (tmp_path / "notes").rename(tmp_path / "new")
    capsys.readouterr()
    if with_recipe:
        assert launch("pretrain", stopped, "data.type=files", "data.path=new/") == 0
    else:
        assert main(["pretrain", "--resume", "data.path=new/", "--run", str(stopped)]) == 0
    assert "have moved: data.path is new/ here and notes/ there" in capsys.readouterr().err
    assert stored_path(stopped) == "new/"
    assert_same_run(stopped, tmp_path / "whole")
    assert main(["pretrain", "--resume", "--run", str(stopped)]) == 0


def test_other_data_and_no_data_at_another_place_are_refused(stopped, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "all.jsonl").write_text(json.dumps({"text": "Something else."}) + "\n")
    before = (stopped / "config.yaml").read_bytes()
    for path, words in (("other/", "was prepared with another content"), ("typo/", "no file or folder typo")):
        assert main(["pretrain", "--resume", f"data.path={path}", "--run", str(stopped)]) == 2
        text = capsys.readouterr().err
        assert words in text and f"data.path is {path} here and notes/ there" in text
    assert main(["pretrain", "--resume", "data.field=body", "--run", str(stopped)]) == 2
    assert "leave out data.field=body" in capsys.readouterr().err
    assert (stopped / "config.yaml").read_bytes() == before


def test_without_its_shards_a_run_needs_its_data(stopped, tmp_path, capsys):
    shutil.rmtree(tmp_path / "notes")
    shutil.rmtree(stopped / "data")
    for more in ([], ["--dry-run"]):
        assert main(["pretrain", "--resume", "--run", str(stopped), *more]) == 2
        assert "no file or folder notes" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_rotten_shard_is_named_and_prepared_again(split, stopped, tmp_path, assert_same_run, capsys):
    flip(stopped / "data" / split / "tokens-00000.bin")
    assert main(["pretrain", "--resume", "--run", str(stopped)]) == 2
    told = capsys.readouterr().err
    assert f"{split}/tokens-00000.bin has changed" in told and f"delete {stopped / 'data'}" in told
    shutil.rmtree(stopped / "data")
    assert main(["pretrain", "--resume", "--run", str(stopped)]) == 0
    assert_same_run(stopped, tmp_path / "whole")


def test_a_branch_takes_the_shards_of_its_run_along(stopped, tmp_path, capsys):
    """Also from what was set aside, and with nothing tokenised again."""
    shutil.rmtree(tmp_path / "notes")
    assert main(["pretrain", "--resume", "--run", str(stopped)]) == 0
    first = min(int(path.name[5:]) for path in (stopped / "checkpoints").glob("step-*"))
    assert main(["pretrain", "--run", str(stopped), "--from-step", str(first)]) == 0
    aside = stopped / "set-aside" / f"after-step-{first}"
    for number, origin in enumerate((stopped, aside)):
        branch = ["pretrain", "--branch", str(origin), "total_tokens=3328", "--run", str(tmp_path / f"branch-{number}")]
        assert main([*branch, "--dry-run"]) == 0
        assert main(branch) == 0
    shutil.rmtree(stopped)
    assert main(["pretrain", "--resume", "--run", str(tmp_path / "branch-1"), "--dry-run"]) == 0
    assert main(["data", "inspect", str(tmp_path / "branch-1" / "data")]) == 0


def test_questions_may_be_given_from_another_place_when_they_are_the_same(launch, tmp_path, capsys):
    def write(path: Path, answer: str) -> str:
        rows = [
            {
                "question": f"Finding {number}?",
                "options": {"A": "organ", "B": "drug", "C": "age", "D": "cause"},
                "answer": {"A": "organ", "B": "drug"}[answer],
                "answer_idx": answer,
            }
            for number in range(12)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return f"tasks=[{{task: {{type: medqa, path: {path}}}}}]"

    run, old = tmp_path / "run", tmp_path / "old.jsonl"
    assert launch("grpo", run, write(old, "A"), "eval_task=null", "preflight=off", fault="train-step:sigterm:2") == STOPPED
    old.unlink()
    for answer, code, words in (
        ("B", 2, "The data changed since checkpoint"),
        ("A", 0, f"task.path is {tmp_path / 'new.jsonl'} here"),
    ):
        moved = write(tmp_path / "new.jsonl", answer)
        assert main(["grpo", "--resume", moved, "--run", str(run)]) == code
        assert words in capsys.readouterr().err
    assert main(["grpo", "--resume", "--run", str(run)]) == 0
    many = moved.replace("}}]", "}, weight: 2}]")
    assert main(["grpo", "--resume", many, "--run", str(run)]) == 2
    assert "holds another run: tasks[0].weight is 2.0 here and 1.0 there" in capsys.readouterr().err


# -- shards that `osler data prepare` wrote ----------------------------------------------------------------------------


@pytest.fixture
def shards(tiny, tmp_path):
    notes, out = tmp_path / "notes.jsonl", tmp_path / "shards"
    notes.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    command = ["data", "prepare", str(notes), "data.holdout_fraction=0.1", "--tokenizer", str(tiny.tokenizer), "--out", str(out)]
    assert main(command) == 0
    return out


def recipe_on(tiny, tmp_path: Path) -> str:
    """The tiny pretraining recipe without a tokenizer of its own."""
    recipe = json.loads(Path(tiny.pretrain).read_text())
    del recipe["tokenizer"], recipe["data"]
    path = tmp_path / "bare.yaml"
    path.write_text(json.dumps(recipe))
    return str(path)


def test_training_on_prepared_shards_is_training_on_their_text(
    shards, osler, launch, tiny, tmp_path, assert_same_run, capsys
):
    text = [f"data.path={tmp_path / 'notes.jsonl'}", "data.type=files", "data.holdout_fraction=0.1"]
    assert launch("pretrain", tmp_path / "whole", *text) == 0
    (tmp_path / "notes.jsonl").unlink()
    command = ["pretrain", recipe_on(tiny, tmp_path), "data.type=prepared", f"data.path={shards}", "--run", str(tmp_path / "run")]
    assert main([*command, "--dry-run"]) == 0 and not (tmp_path / "run").exists()
    assert osler(*command, fault="train-step:sigterm:5") == STOPPED
    assert osler(*command) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert not (tmp_path / "run" / "data").exists()
    assert any("eval/bits_per_byte" in line for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run")]) == 0
    assert "bits per byte" in capsys.readouterr().out
    moved = shards.rename(tmp_path / "moved")
    for more in ([], ["--dry-run"]):
        assert main(["pretrain", "--resume", "--run", str(tmp_path / "run"), *more]) == 2
        assert f"{shards} is no folder that `osler data prepare` wrote" in capsys.readouterr().err
    assert main(["pretrain", "--resume", f"data.path={moved}", "--run", str(tmp_path / "run")]) == 0
    branch = ["--branch", str(tmp_path / "run"), "total_tokens=3328", "--run", str(tmp_path / "branch")]
    assert main(["pretrain", *branch, f"data.path={moved}"]) == 0


def test_shards_of_another_tokenizer_are_refused(shards, tiny, runs, tmp_path, capsys):
    other = tmp_path / "other.json"
    assert main(["tokenizer", "train", str(tmp_path / "notes.jsonl"), "tokenizer.vocab_size=300", "--out", str(other)]) == 0
    cut = [str(tmp_path / "notes.jsonl"), "--tokenizer", str(other), "--out", str(tmp_path / "others")]
    assert main(["data", "prepare", *cut]) == 0
    bare = recipe_on(tiny, tmp_path)
    ours, theirs = (["data.type=prepared", f"data.path={path}"] for path in (shards, tmp_path / "others"))
    for words, whose in (
        (["pretrain", bare, *ours, f"tokenizer.path={other}"], f"the one in {other} is"),
        (["sft", bare, *theirs, f"init_from={runs.pretrain}"], f"of {runs.pretrain}"),
    ):
        for more in (["--dry-run"], []):
            assert main([*words, "--run", str(tmp_path / "run"), *more]) == 2
            text = capsys.readouterr().err
            assert "were made with the tokenizer" in text and whose in text and "osler data prepare" in text
    (shards / "tokenizer.json").unlink()  # as an earlier version left it
    assert main(["pretrain", bare, *ours, "--run", str(tmp_path / "run")]) == 2
    assert "set tokenizer.path to the file that it was prepared with" in capsys.readouterr().err
    assert main(["pretrain", bare, *ours, f"tokenizer.path={tiny.tokenizer}", "--run", str(tmp_path / "run")]) == 0


def test_shards_that_changed_are_refused_and_turns_keep_their_masks(shards, tiny, runs, tmp_path, capsys):
    turns = ["data.type=turns", f"data.path={tiny.turns}", "data.thinking_field=why"]
    cut = ["--tokenizer", str(tiny.tokenizer), "--out", str(tmp_path / "turns")]
    assert main(["data", "prepare", *turns, *cut]) == 0
    command = ["sft", tiny.sft, f"init_from={runs.pretrain}", "--run"]
    on_shards = ["data={type: prepared, path: " + str(tmp_path / "turns") + "}"]
    assert main([*command, str(tmp_path / "text"), *turns]) == 0
    assert main([*command, str(tmp_path / "shards-run"), *on_shards]) == 0
    ends = [(at(tmp_path / run, 12) / "model.safetensors").read_bytes() for run in ("text", "shards-run")]
    assert ends[0] == ends[1]
    shutil.rmtree(tmp_path / "turns")
    shards.rename(tmp_path / "turns")
    assert main([*command, str(tmp_path / "shards-run"), *on_shards]) == 2
    assert "The data changed since checkpoint" in capsys.readouterr().err


def test_leave_to_change_the_data_is_no_leave_to_mistype_them_and_is_given_once(stopped, tmp_path, launch, capsys):
    before = (stopped / "config.yaml").read_text()
    assert main(["pretrain", "--resume", "allow_data_change=true", "data.path=typo", "--run", str(stopped)]) == 2
    assert "typo" in capsys.readouterr().err and (stopped / "config.yaml").read_text() == before
    assert launch("pretrain", tmp_path / "other", "data.type=files", "data.path=notes/", "allow_data_change=true") == 0
    assert load_yaml((tmp_path / "other" / "config.yaml").read_text(), "")["allow_data_change"] is False
