"""Whatever is wrong with what a person gives: one paragraph that says what and where, exit code 2, no traceback."""

from __future__ import annotations

import io
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from run_folders import at, flip
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from osler.cli.main import main
from osler.config.recipe import dump_yaml, load_yaml
from osler.data.prepared import open_prepared
from osler.inference.load import load_model
from osler.tokenizer.bpe import Tokenizer

WITH_PATH = "(with data.type=files or data.type=turns or data.type=hub or data.type=prepared)"
COUGH = "A cough that lasts eight weeks is chronic. " * 20


@pytest.fixture
def own_text(tiny):
    """Overrides that train the tiny recipe on a file or folder of text."""
    return lambda path: [tiny.pretrain, "data.type=files", f"data.path={path}"]


# -- configuration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rate=1", "learning_rate: unknown key; did you mean `optim.lr`?"),
        ("path=notes", f"`data.path` {WITH_PATH} or `teacher.path` or `tokenizer.path`?"),
        ("optim={type: muon, eps: 0}", "optim.eps: must be above 0, given 0"),
        ("batch_tokens=300", "batch_tokens 300 is not a multiple of seq_len 64"),
        ("micro_batch_tokens=192", "micro_batch_tokens 192 must be a multiple of seq_len 64 that divides batch_tokens 256"),
        ("model.num_kv_heads=3", "num_heads 2 is not a multiple of num_kv_heads 3"),
        ("device=tpu", "Unknown device 'tpu': use auto, cpu, cuda or cuda:N"),
        ("init_from=no/such/run", "no/such/run is no folder"),
        ("tokenizer.path=no/such.json", "no/such.json"),
        ("model.vocab_size=400", "512 tokens, the model only 400: set model.vocab_size=512"),
        ("exam={every_tokens: 512, splits: [tset]}", "tset"),
        ("exam={every_tokens: 512, tasks: [{type: medqa, path: no.jsonl}]}", "set exam.tasks[0].path"),
        ("exam={tasks: [{type: medqa, path: a}, {type: medqa, path: b}]}", "give each a split of its own"),
    ],
)
def test_a_wrong_field_is_named(override, message, mistake, tiny, tmp_path):
    assert message in mistake("pretrain", tiny.pretrain, override, "--run", tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()  # so the mended command may use the same folder


def test_a_tokenizer_that_loses_the_text_is_refused_before_the_run(mistake, tiny, tmp_path):
    backend = Backend(models.WordLevel({"[UNK]": 0, "fever": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "t.json"))
    (tmp_path / "notes.txt").write_text("cough and fever")
    given = ["data.type=files", f"data.path={tmp_path / 'notes.txt'}", f"tokenizer.path={tmp_path / 't.json'}"]
    for more in (["--dry-run"], []):
        assert "is read back as '[UNK]" in mistake("pretrain", tiny.pretrain, *given, "--run", tmp_path / "run", *more)
    assert not (tmp_path / "run").exists()


# -- data --------------------------------------------------------------------------------------------------------------


PARQUET = io.BytesIO()
pq.write_table(pa.table({"text": [f"Sentence number {n} about fever." for n in range(300)]}), PARQUET)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.txt", None, "There is no file or folder"),
        ("empty.txt", b"", "nothing to learn from: no text in any of 1 documents"),
        ("blank.jsonl", b'{"text": " "}\n', "blank.jsonl"),
        ("torn.parquet", PARQUET.getvalue()[:-200], "torn.parquet cannot be read, it may be torn"),
        ("latin.txt", b"Fi\xe8vre", "latin.txt:1 is not UTF-8 text: byte 0xe8 at position 2"),
        ("lines.jsonl", b'{"text": "good"}\n{"text": "brok\n{"text": "good"}\n', "lines.jsonl:2 is not JSON"),
        ("other.jsonl", b'{"body": "a", "title": "b"}\n', "has no field 'text'; it has: body, title"),
    ],
)
def test_a_file_that_cannot_be_learned_from_is_named_and_can_be_mended(name, content, message, mistake, own_text, tmp_path):
    command = ["pretrain", *own_text(tmp_path / name), "--run", tmp_path / "run"]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert message in mistake(*command) and not (tmp_path / "run" / "data").exists()
    if name == "empty.txt":
        (tmp_path / name).write_text(COUGH)
        assert main([str(word) for word in command]) == 0


def test_text_under_any_name_is_trained_on_and_the_rest_is_named(own_text, tmp_path, capsys):
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / os.fsdecode(b"caf\xe9.TXT")).write_text("A NUL \0 in a cough that lasts eight weeks. " * 20)
    (folder / os.fsdecode(b"\xff.jsonl")).write_text(json.dumps({"text": "A fever of three weeks. " * 20, "title": "Fever"}))
    (folder / os.fsdecode(b"\xfe.csv")).write_text("")
    assert main(["pretrain", *own_text(folder), "--run", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().err
    assert f"{folder}: left out: 1 .csv.\n" in said and f"{folder}: columns not read: title.\n" in said
    [shards] = open_prepared(tmp_path / "run" / "data", load_model(tmp_path / "run").tokenizer).train
    assert shards.num_documents == 1, "the other one is held out"


def test_a_dry_run_looks_at_what_the_run_will_read(mistake, own_text, tiny, runs, tmp_path):
    dry = ("--run", tmp_path / "run", "--dry-run")
    gone = tmp_path / "gone"
    assert f"no file or folder {gone}; set data.path" in mistake("pretrain", *own_text(gone), *dry)
    assert "data.path is empty" in mistake("pretrain", "text-10min", *dry)
    sft = ["sft", tiny.sft, f"init_from={runs.pretrain}"]
    assert f"no file or folder {gone}; set data.path" in mistake(*sft, f"data.path={gone}", *dry)
    assert "or data.type=turns for questions with answers" in mistake("pretrain", *own_text(tiny.turns), *dry)
    assert "Set data.thinking_field=NAME to the column" in mistake(*sft, "data.thinking_field=thinking", *dry)
    assert "gone is no folder" in mistake("sft", tiny.sft, f"init_from={gone}", *dry)
    assert "gone" in mistake("pretrain", tiny.pretrain, f"tokenizer.path={gone}", *dry)
    assert not (tmp_path / "run").exists()


def test_an_exam_file_that_is_missing_is_told_by_its_key_before_anything_is_loaded(mistake, tiny, runs, tmp_path):
    gone = tmp_path / "gone.jsonl"
    start = ["grpo", tiny.grpo, f"init_from={runs.sft}", "--run", tmp_path / "run"]
    train = f"tasks=[{{task: {{type: clinic}}}}, {{task: {{type: medqa, path: {gone}}}}}]"
    for dry in ([], ["--dry-run"]):
        assert f"no file or folder {gone}; set tasks[1].task.path" in mistake(*start, train, *dry)
        text = mistake(*start, "eval_task.type=medqa", f"eval_task.path={gone}", *dry)
        assert f"no file or folder {gone}; set eval_task.path" in text
    assert "gone is no folder" in mistake("grpo", tiny.grpo, f"init_from={tmp_path / 'gone'}", "--dry-run")
    text = mistake("eval", tmp_path / "no-model", "task.type=medqa", f"task.path={gone}")
    assert f"no file or folder {gone}; set task.path" in text


def test_documents_of_any_length(own_text, osler, tmp_path):
    """One document far longer than a row, and one word: both train."""
    for name, text, more in (("long", "Sepsis is a race against the clock. " * 400, []), ("short", "Fever.", ["packing=whole"])):
        (tmp_path / f"{name}.txt").write_text(text)
        assert osler("pretrain", *own_text(tmp_path / f"{name}.txt"), *more, "--run", tmp_path / name) == 0


# -- the run folder ----------------------------------------------------------------------------------------------------


def test_no_good_checkpoint_is_an_error_and_not_a_fresh_start(stopped, tiny, mistake):
    for folder in (stopped / "checkpoints").glob("step-*"):
        flip(folder / "model.safetensors")
    metrics = (stopped / "metrics.jsonl").read_bytes()
    text = mistake("pretrain", tiny.pretrain, "--run", stopped)
    assert f"No checkpoint in {stopped / 'checkpoints'} is good" in text
    assert "step-000000009 is damaged" in text and "step-000000008 is damaged" in text and "start its run over" in text
    assert (stopped / "metrics.jsonl").read_bytes() == metrics
    for kind in ("sft", "grpo"):
        text = mistake(kind, getattr(tiny, kind), f"init_from={stopped}", "--run", stopped.parent / kind)
        assert "No checkpoint in" in text and "is damaged" in text


def test_a_tokenizer_that_was_exchanged_in_the_run_folder_is_not_used(stopped, tiny):
    other = Tokenizer.train(["other words for another tokenizer"] * 9, 300)
    (stopped / "tokenizer.json").write_bytes(other.to_bytes())
    assert main(["pretrain", tiny.pretrain, "--run", str(stopped)]) == 0
    assert load_model(stopped).tokenizer.fingerprint == Tokenizer.load(tiny.tokenizer).fingerprint


def test_a_folder_holds_one_run(stopped, tiny, mistake):
    for more in ([], ["--dry-run"]):
        text = mistake("pretrain", tiny.pretrain, "seed=1", "optim.lr=1e-4", "--run", stopped, *more)
        assert "holds another run: optim.lr is 0.0001 here and 0.0025 there, seed is 1 here and 0 there. " in text
        assert f"`osler pretrain --run {stopped} --resume`" in text and f"`osler pretrain --branch {stopped} --run" in text
        assert f"init_from={stopped}" in text
    text = mistake("sft", tiny.sft, f"init_from={stopped}", "--run", stopped)
    assert "holds another run" in text and "kind" in text
    words = "description=the same run in other words"
    assert main(["pretrain", tiny.pretrain, words, "--run", str(stopped), "--dry-run"]) == 0


def test_a_folder_of_an_earlier_version_is_the_same_run(stopped, launch):
    """A field that the config gained since has its default there."""
    config = load_yaml((stopped / "config.yaml").read_text(), "config.yaml")
    del config["checkpoint"]["keep_last"]
    (stopped / "config.yaml").write_text(dump_yaml(config))
    assert launch("pretrain", stopped) == 0


def test_resume_needs_a_run_and_nothing_else(stopped, mistake, tmp_path):
    assert "--resume needs --run" in mistake("pretrain", "--resume")
    assert "holds no run to resume" in mistake("pretrain", "--resume", "--run", tmp_path / "nothing")
    assert "leave out seed=1" in mistake("pretrain", "seed=1", "--resume", "--run", stopped)
    whole = (stopped / "config.yaml").read_bytes()
    for torn in (b"", whole[:200] + b"\n  x: [", b"\xff" + whole, b"- no mapping"):
        (stopped / "config.yaml").write_bytes(torn)
        told = mistake("pretrain", "--resume", "--run", stopped)
        assert f"cp {at(stopped, 9) / 'config.yaml'} {stopped / 'config.yaml'}" in told
    assert (at(stopped, 9) / "config.yaml").read_bytes() == whole  # so the advice is good
