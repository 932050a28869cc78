"""What a run learns from, between one start and the next: moved, gone, rotten, changed; and shards that were given to it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from run_folders import STOPPED, assert_same_run, at, flip, logged, saved_steps

from osler.config.recipe import load_yaml
from osler.records.jsonl import LIFETIME, read_events

TEXTS = [f"Finding {number} speaks for disease {number % 7}, and never for its twin. " * 3 for number in range(60)]
NOTES = ["data.type=files", "data.path=notes/"]


def write_texts(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture
def stopped(launch, tmp_path, monkeypatch):
    """A run on notes/, named from where it was started, stopped after five of its twelve steps."""
    write_texts(tmp_path / "notes" / "all.jsonl", TEXTS)
    monkeypatch.chdir(tmp_path)
    assert launch("pretrain", tmp_path / "run", *NOTES, fault="train-step:sigterm:5") == STOPPED
    return tmp_path / "run"


@pytest.fixture
def finish_notes(launch, osler, tmp_path):
    """Resume a run that learned from notes/ alone: it ends as one without interruption would."""

    def run(folder: Path, *words: str) -> None:
        assert osler("pretrain", "--resume", *words, "--run", folder) == 0
        write_texts(tmp_path / "notes" / "all.jsonl", TEXTS)
        assert launch("pretrain", tmp_path / "whole", "data.type=files", f"data.path={tmp_path / 'notes'}") == 0
        assert_same_run(folder, tmp_path / "whole")

    return run


def stored_path(run: Path) -> str:
    return load_yaml((run / "config.yaml").read_text(), "")["data"]["path"]


def events_of(run: Path) -> list[tuple[str, int]]:
    return [(event.kind, event.step) for event in read_events(run / "events.jsonl") if event.kind not in LIFETIME]


def fingerprints(text: str) -> list[str]:
    return list(dict.fromkeys(re.findall(r"\b[0-9a-f]{16}\b", text)))


# -- moved, gone, rotten -----------------------------------------------------------------------------------------------


def test_a_run_goes_on_from_another_folder(stopped, tmp_path, monkeypatch, finish_notes, osler, capsys):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert osler("pretrain", "--resume", "--run", stopped, "--dry-run") == 0
    finish_notes(stopped)
    text = capsys.readouterr().err
    assert (
        f"There is nothing at notes/ from here; going on with what was prepared from it, in {stopped / 'data'}" in text
    )
    assert stored_path(stopped) == "notes/"


def test_a_moved_run_whose_data_are_gone_goes_on(stopped, tmp_path, finish_notes):
    shutil.rmtree(tmp_path / "notes")
    finish_notes(stopped.rename(tmp_path / "moved"))
    assert stored_path(tmp_path / "moved") == "notes/"


@pytest.mark.parametrize("with_recipe", [False, True])
def test_data_may_be_given_from_another_place_when_they_are_the_same(
    with_recipe, stopped, launch, tmp_path, finish_notes, capsys
):
    (tmp_path / "notes").rename(tmp_path / "new")
    if with_recipe:
        fault = "train-step:sigterm:1"
        assert launch("pretrain", stopped, "data.type=files", "data.path=new/", fault=fault) == STOPPED
    finish_notes(stopped, *([] if with_recipe else ["data.path=new/"]))
    assert "have moved: data.path is new/ here and notes/ there" in capsys.readouterr().err
    assert stored_path(stopped) == "new/"


def test_other_data_and_no_data_at_another_place_are_refused(stopped, tmp_path, mistake):
    write_texts(tmp_path / "other" / "all.jsonl", ["Something else."])
    before = (stopped / "config.yaml").read_bytes()
    for path, words in (("other/", "was prepared with another content"), ("typo/", "no file or folder typo")):
        text = mistake("pretrain", "--resume", f"data.path={path}", "--run", stopped)
        assert words in text and f"data.path is {path} here and notes/ there" in text
    assert "leave out data.field=body" in mistake("pretrain", "--resume", "data.field=body", "--run", stopped)
    assert "typo" in mistake("pretrain", "--resume", "allow_data_change=true", "data.path=typo", "--run", stopped)
    assert (stopped / "config.yaml").read_bytes() == before


def test_without_its_shards_a_run_needs_its_data(stopped, tmp_path, mistake):
    shutil.rmtree(tmp_path / "notes")
    shutil.rmtree(stopped / "data")
    for more in ([], ["--dry-run"]):
        assert "no file or folder notes" in mistake("pretrain", "--resume", "--run", stopped, *more)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_rotten_shard_is_named_and_prepared_again(split, stopped, finish_notes, mistake):
    flip(stopped / "data" / "notes" / split / "shard-0000000.bin")
    told = mistake("pretrain", "--resume", "--run", stopped)
    assert f"{split}/shard-0000000.bin has changed" in told and f"delete {stopped / 'data'}" in told
    shutil.rmtree(stopped / "data")
    finish_notes(stopped)


def test_a_branch_takes_the_shards_of_its_run_along(stopped, tmp_path, osler):
    """Also from what was set aside, and with nothing tokenised again."""
    shutil.rmtree(tmp_path / "notes")
    assert osler("pretrain", "--resume", "--run", stopped) == 0
    first = saved_steps(stopped)[0]
    assert osler("pretrain", "--run", stopped, "--from-step", first) == 0
    aside = stopped / "set-aside" / f"after-step-{first}"
    for number, origin in enumerate((stopped, aside)):
        branch = ["pretrain", "--branch", origin, "total_tokens=3328", "--run", tmp_path / f"branch-{number}"]
        assert osler(*branch, "--dry-run") == 0
        assert osler(*branch) == 0
    shutil.rmtree(stopped)
    assert osler("pretrain", "--resume", "--run", tmp_path / "branch-1", "--dry-run") == 0
    assert osler("data", "inspect", tmp_path / "branch-1" / "data") == 0


# -- changed -----------------------------------------------------------------------------------------------------------


def test_other_data_are_refused_with_or_without_the_old_shards(stopped, tmp_path, mistake):
    write_texts(tmp_path / "notes" / "all.jsonl", ["A fever that lasts three weeks has a name. " * 20])
    text = mistake("pretrain", "--resume", "--run", stopped)
    assert "another content: " in text and re.search(r"all.jsonl has [0-9,]+ bytes, it had [0-9,]+", text)
    assert "allow it with allow_data_change=true, or choose another folder" in text
    shutil.rmtree(stopped / "data")
    text = mistake("pretrain", "--resume", "--run", stopped)
    assert len(fingerprints(text)) == 2 and "The data changed since checkpoint" in text


def test_other_data_are_taken_when_that_is_allowed(stopped, tmp_path, launch, osler, mistake, capsys):
    """Loudly, with an event, from the checkpoint on, and only for the start that it is given to; the old shards stay."""
    write_texts(tmp_path / "other" / "all.jsonl", ["A fever that lasts three weeks has a name. " * 20])
    other, allow = ["data.type=files", "data.path=other/"], "allow_data_change=true"
    assert launch("pretrain", stopped, *other, allow, fault="train-step:sigterm:2") == STOPPED
    text = capsys.readouterr().err
    assert "Warning: The data changed: from step 5 on the run learns from" in text and "allow_data_change" in text
    assert events_of(stopped) == [("data-change", 5)] and len(list(stopped.glob("data-*"))) == 1
    assert stored_path(stopped) == "other/"
    assert launch("pretrain", stopped, *other, fault="train-step:sigterm:1") == STOPPED  # they are the run's data now
    write_texts(tmp_path / "other" / "all.jsonl", ["A rash that itches at night is scabies. " * 20])
    text = mistake("pretrain", "--resume", "--run", stopped)
    assert "another content: " in text and "all.jsonl has" in text and allow in text
    old = json.loads((stopped / "data" / "manifest.json").read_text())["content_fingerprint"]
    assert osler("pretrain", "--resume", allow, "--run", stopped) == 0
    assert f"The data prepared before (fingerprint {old}) are in {stopped / 'data'}-{old}." in capsys.readouterr().err
    assert events_of(stopped) == [("data-change", 5), ("data-change", 8)]
    assert launch("pretrain", tmp_path / "fresh", *other, allow) == 0
    assert load_yaml((tmp_path / "fresh" / "config.yaml").read_text(), "")["allow_data_change"] is False


def test_a_run_goes_back_to_before_an_allowed_change(tmp_path, launch, capsys):
    """The permission was given for one start; a later one that must go back behind the change needs none."""
    words = {"cough": "A cough that lasts eight weeks is chronic. ", "fever": "A fever that lasts three weeks has a name. "}
    on = {}
    for name, text in words.items():
        write_texts(tmp_path / f"{name}.jsonl", [text * 20])
        on[name] = ["data.type=files", f"data.path={tmp_path / name}.jsonl", "recovery.max_skipped_steps=2"]
    run = tmp_path / "run"
    assert launch("pretrain", run, *on["cough"], fault="train-step:sigterm:4") == STOPPED
    fault = "train-loss:nan:1,train-step:sigterm:1"
    assert launch("pretrain", run, *on["fever"], "allow_data_change=true", fault=fault) == STOPPED
    capsys.readouterr()
    assert launch("pretrain", run, *on["fever"], fault="train-loss:nan:1") == 0
    assert "Going back from step 10 to step-000000004" in " ".join(capsys.readouterr().err.split())


def test_questions_may_move_and_may_not_change(launch, osler, mistake, tmp_path, capsys):
    def write(path: Path, answer: str) -> str:
        options = {"A": "organ", "B": "drug", "C": "age", "D": "cause"}
        fields = {"options": options, "answer": options[answer], "answer_idx": answer}
        path.write_text("".join(json.dumps({"question": f"Finding {number}?", **fields}) + "\n" for number in range(12)))
        return f"tasks=[{{task: {{type: medqa, path: {path}}}}}]"

    run, old, new = tmp_path / "run", tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    assert launch("grpo", run, write(old, "A"), "eval_task=null", "preflight=off", fault="train-step:sigterm:2") == STOPPED
    old.unlink()
    text = mistake("grpo", "--resume", write(new, "B"), "--run", run)
    assert "The data changed since checkpoint" in text and len(fingerprints(text)) == 2 and "allow_data_change=true" in text
    moved = write(new, "A")
    assert osler("grpo", "--resume", moved, "--run", run, fault="train-step:sigterm:1") == STOPPED
    assert f"task.path is {new} here" in capsys.readouterr().err
    write(new, "B")
    assert osler("grpo", "--resume", "allow_data_change=true", "--run", run) == 0
    assert [kind for kind, _ in events_of(run)] == ["data-change"]
    many = moved.replace("}}]", "}, weight: 2}]")
    text = mistake("grpo", "--resume", many, "--run", run)
    assert "holds another run: tasks[0].weight is 2.0 here and 1.0 there" in text


def test_a_run_that_trains_its_own_superwords_goes_on_with_them(launch, tmp_path):
    own = ["tokenizer.type=superbpe", "tokenizer.vocab_size=500"]
    assert launch("pretrain", tmp_path / "whole", *own) == 0
    run = tmp_path / "run"
    assert launch("pretrain", run, *own, fault="train-step:sigterm:5") == STOPPED
    assert launch("pretrain", run, resume=True) == 0
    assert_same_run(run, tmp_path / "whole")
    vocab = json.loads((run / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(vocab) == 500 and any("Ġ" in token[1:] for token in vocab)


# -- shards that `osler data prepare` wrote ----------------------------------------------------------------------------


@pytest.fixture
def shards(tiny, osler, tmp_path):
    notes, out = tmp_path / "notes.jsonl", tmp_path / "shards"
    write_texts(notes, TEXTS)
    assert osler("data", "prepare", notes, "data.holdout_fraction=0.1", f"tokenizer.path={tiny.tokenizer}", "--out", out) == 0
    return out


@pytest.fixture
def bare(tiny, tmp_path) -> Path:
    """The tiny pretraining recipe without data and a tokenizer of its own."""
    recipe = json.loads(Path(tiny.pretrain).read_text())
    del recipe["tokenizer"], recipe["data"]
    path = tmp_path / "bare.yaml"
    path.write_text(json.dumps(recipe))
    return path


def test_training_on_prepared_shards_is_training_on_their_text(
    shards, bare, osler, launch, mistake, tmp_path, capsys
):
    text = [f"data.path={tmp_path / 'notes.jsonl'}", "data.type=files", "data.holdout_fraction=0.1"]
    assert launch("pretrain", tmp_path / "whole", *text) == 0
    (tmp_path / "notes.jsonl").unlink()
    run = tmp_path / "run"
    command = ["pretrain", bare, "data.type=prepared", f"data.path={shards}", "--run", run]
    assert osler(*command, "--dry-run") == 0 and not run.exists()
    for more in ([], ["--dry-run"]):
        assert "no_benchmark_contamination" in mistake(*command, "data.no_benchmark_contamination=true", *more)
    assert osler(*command, fault="train-step:sigterm:5") == STOPPED
    assert osler(*command) == 0
    assert_same_run(run, tmp_path / "whole")
    assert not (run / "data").exists() and any("eval/bits_per_byte" in line for line in logged(run))
    capsys.readouterr()
    assert osler("eval", run) == 0
    assert "bits per byte" in capsys.readouterr().out
    moved = shards.rename(tmp_path / "moved")
    for more in ([], ["--dry-run"]):
        text = mistake("pretrain", "--resume", "--run", run, *more)
        assert f"{shards} is no folder that `osler data prepare` wrote" in text
    assert osler("pretrain", "--resume", f"data.path={moved}", "--run", run) == 0
    branch = ["--branch", run, "total_tokens=3328", "--run", tmp_path / "branch"]
    assert osler("pretrain", *branch, f"data.path={moved}") == 0


def test_shards_of_another_tokenizer_are_refused(shards, bare, tiny, runs, osler, mistake, tmp_path):
    other = tmp_path / "other.json"
    assert osler("tokenizer", "train", tmp_path / "notes.jsonl", "tokenizer.vocab_size=300", "--out", other) == 0
    cut = [tmp_path / "notes.jsonl", f"tokenizer.path={other}", "--out", tmp_path / "others"]
    assert osler("data", "prepare", *cut) == 0
    ours, theirs = (["data.type=prepared", f"data.path={path}"] for path in (shards, tmp_path / "others"))
    for words, whose in (
        (["pretrain", bare, *ours, f"tokenizer.path={other}"], f"the one in {other} is"),
        (["sft", bare, *theirs, f"init_from={runs.pretrain}"], f"of {runs.pretrain}"),
    ):
        for more in (["--dry-run"], []):
            text = mistake(*words, "--run", tmp_path / "run", *more)
            assert "were made with the tokenizer" in text and whose in text and "osler data prepare" in text
    (shards / "tokenizer.json").unlink()  # as an earlier version left it
    text = mistake("pretrain", bare, *ours, "--run", tmp_path / "run")
    assert "set tokenizer.path to the file that it was prepared with" in text
    assert osler("pretrain", bare, *ours, f"tokenizer.path={tiny.tokenizer}", "--run", tmp_path / "run") == 0


def test_one_document_is_prepared_and_inspected_although_nothing_can_be_held_out(tiny, osler, mistake, tmp_path, capsys):
    (tmp_path / "book.txt").write_text("Fever is a sign. " * 50)
    out, command = tmp_path / "out", ["data", "prepare", tmp_path / "book.txt", f"tokenizer.path={tiny.tokenizer}", "--out"]
    assert osler(*command, out) == 0 and osler("data", "inspect", out) == 0
    assert "train" in (told := capsys.readouterr().out) and "validation" not in told
    assert "--workers -3 is no number of processes" in mistake(*command, tmp_path / "other", "--workers", "-3")
    assert "it does not exist" in mistake("data", "inspect", tmp_path / "nowhere")


def test_data_are_prepared_with_the_tokenizer_of_the_model_that_a_run_starts_from(tiny, runs, osler, mistake, tmp_path):
    out, turns = tmp_path / "shards", ["data.type=turns", f"data.path={tiny.turns}", f"init_from={runs.pretrain}"]
    assert osler("data", "prepare", *turns, "tokenizer.vocab_size=300", "--out", out) == 0
    assert (out / "tokenizer.json").read_bytes() == (runs.pretrain / "tokenizer.json").read_bytes()
    assert "no_such_run" in mistake("data", "prepare", *turns[:2], "init_from=no_such_run", "--out", tmp_path / "other")
    assert "validation=[...]" in mistake("data", "prepare", *turns, "seq_len=9", "--out", tmp_path / "other")


def test_shards_that_changed_are_refused_and_turns_keep_their_masks(shards, tiny, runs, osler, mistake, tmp_path):
    turns = ["data.type=turns", f"data.path={tiny.turns}", "data.thinking_field=why"]
    assert osler("data", "prepare", *turns, f"tokenizer.path={tiny.tokenizer}", "--out", tmp_path / "turns") == 0
    command = ["sft", tiny.sft, f"init_from={runs.pretrain}", "--run"]
    on_shards = ["data={type: prepared, path: " + str(tmp_path / "turns") + "}"]
    assert osler(*command, tmp_path / "text", *turns) == 0
    assert osler(*command, tmp_path / "shards-run", *on_shards) == 0
    ends = [(at(tmp_path / run, 12) / "model.safetensors").read_bytes() for run in ("text", "shards-run")]
    assert ends[0] == ends[1]
    shutil.rmtree(tmp_path / "turns")
    shards.rename(tmp_path / "turns")
    assert "The data changed since checkpoint" in mistake(*command, tmp_path / "shards-run", *on_shards)
