"""Validation sets: each is measured by itself, in training and alone, and they belong to the data of a run."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from run_folders import logged

from osler.checkpoint.folders import best_checkpoint
from osler.cli.main import main
from osler.clinic.textbook import textbook
from osler.data.config import ONLY_TO_LEARN_FROM, ClinicData
from osler.data.shard_set import ShardSet
from osler.data.shards import ShardWriter
from osler.monitor.metrics import declared_name
from osler.records.jsonl import read_metrics
from osler.report.page import build_report
from osler.runtime import format as fmt
from osler.runtime.files import read_json
from osler.train.config import TrainConfig
from osler.train.evaluation import heads

NAMES = ("medicine", "general")


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """Overrides for a run on text with two validation sets; one text of the general set is also in the training data."""
    root = tmp_path_factory.mktemp("sets")
    general = [f"The ferry number {number} leaves the harbour at noon and returns at dusk. " * 3 for number in range(12)]
    medicine = write(root / "medicine.jsonl", [{"text": text} for text in textbook(1, 30)])
    learned = write(root / "book.jsonl", [{"text": text} for text in [*textbook(0, 60), general[3]]])
    sets = [
        {"name": "medicine", "type": "files", "path": medicine},
        {"name": "general", "type": "files", "path": write(root / "general.jsonl", [{"text": text} for text in general])},
    ]
    return ["data.type=files", f"data.path={learned}", f"validation={json.dumps(sets)}"]


@pytest.fixture(scope="module")
def run(tiny, words, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["pretrain", str(tiny.pretrain), *words, "--run", str(folder)]) == 0
    return folder


def test_each_set_is_measured_and_all_together_choose_the_best_checkpoint(run):
    lines = [line for line in logged(run) if "eval/loss" in line]
    assert len(lines) > 1
    for line in lines:
        for name in NAMES:
            assert {"loss", "bits_per_byte", "token_accuracy"} == {key.split("/")[2] for key in line if f"eval/{name}/" in key}
            assert 0 < line[f"eval/{name}/bits_per_byte"] < 16 and 0 <= line[f"eval/{name}/token_accuracy"] <= 1
        assert all(declared_name(key) for key in line if key.startswith("eval/"))
        losses = sorted(line[f"eval/{name}/loss"] for name in NAMES)
        assert losses[0] < line["eval/loss"] < losses[1]
    assert best_checkpoint(run / "checkpoints").value == min(line["eval/loss"] for line in lines)
    page = build_report(run).read_text(encoding="utf-8")
    assert "<h4>Validation sets</h4>" in page and all(f'data-label="{name}"' in page for name in NAMES)
    for name in NAMES:
        values = [(line[f"eval/{name}/bits_per_byte"], line[f"eval/{name}/token_accuracy"]) for line in lines]
        told = [f"{fmt.number(bits)}, {fmt.percent(right)}" for bits, right in values]
        assert re.findall(f'data-label="{name}">([^<]*)<', page) == told


def test_with_a_window_whole_contexts_are_read_in_training_and_alone(tiny, words, tmp_path, capsys, caplog):
    run, window = tmp_path / "run", "model.attention={type: dense, window: 8}"
    assert main(["pretrain", str(tiny.pretrain), *words, window, "--run", str(run)]) == 0
    last = [line for line in logged(run) if "eval/loss" in line][-1]
    [medicine, _] = json.loads(words[-1].removeprefix("validation="))
    found = []
    for given in ([], ["seq_len=64"]):
        assert main(["eval", str(run), f"text={medicine['path']}", *given, "--json", str(tmp_path / "scores.json")]) == 0
        found += [score["bits_per_byte"] for score in json.loads((tmp_path / "scores.json").read_text())["texts"].values()]
    assert found[0] == pytest.approx(last["eval/medicine/bits_per_byte"], rel=1e-6) != found[1]
    assert "256 tokens at a time" in capsys.readouterr().out and "trained on rows of at most" not in caplog.text


def test_nothing_is_held_out_of_the_data_but_copies_of_validation_texts(run):
    manifest = json.loads((run / "data" / "manifest.json").read_text())
    [source] = manifest["sources"].values()
    assert source["dropped_copies"] == 1 and set(source["splits"]) == {"train"} and set(manifest["validation"]) == set(NAMES)


@pytest.mark.parametrize("step", [6, 12])
def test_a_checkpoint_is_measured_alone_as_in_training_and_nothing_else_changes(run, step, capsys):
    def others() -> dict[str, bytes]:
        skipped = ("evaluations.json", "report.html")
        return {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name not in skipped}

    before = others()
    capsys.readouterr()
    assert main(["pretrain", "--run", str(run), "--eval-only", "--from-step", str(step)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == [f"step-{step:09d}", *NAMES, "all"]
    assert others() == before
    found = json.loads((run / "evaluations.json").read_text())[f"step-{step:09d}"]
    [line] = [line for line in logged(run) if line["step"] == step and "eval/loss" in line]
    for place, values in {"eval": found["together"], **{f"eval/{name}": of for name, of in found["sets"].items()}}.items():
        for name in ("loss", "bits_per_byte", "token_accuracy"):
            assert values[name] == line[f"{place}/{name}"], "to the bit"


def test_the_newest_checkpoint_is_measured_where_no_step_is_given(run, capsys):
    assert main(["pretrain", "--run", str(run), "--eval-only"]) == 0
    assert "step-000000012 " in capsys.readouterr().out
    for command in (["pretrain", "--eval-only"], ["pretrain", "text-10min", "--run", str(run), "--eval-only"]):
        assert main(command) == 2
        assert "--eval-only measures a checkpoint of --run FOLDER" in capsys.readouterr().err


def test_prepared_shards_bring_their_validation_sets(tiny, words, run, tmp_path, capsys):
    shards = tmp_path / "shards"
    assert main(["data", "prepare", *words, f"tokenizer.path={tiny.tokenizer}", "--out", str(shards)]) == 0
    assert main(["data", "inspect", str(shards)]) == 0
    assert "validation.medicine: every file is as it was written" in capsys.readouterr().out
    recipe = json.loads(Path(tiny.pretrain).read_text())
    del recipe["data"], recipe["tokenizer"]
    bare = tmp_path / "bare.yaml"
    bare.write_text(json.dumps(recipe))
    on_shards = ["data.type=prepared", f"data.path={shards}"]
    assert main(["pretrain", str(bare), *on_shards, "--run", str(tmp_path / "run")]) == 0
    ours, theirs = ([line for line in logged(folder) if "eval/loss" in line] for folder in (tmp_path / "run", run))
    names = [key for key in theirs[0] if key.startswith("eval/") and key != "eval/seconds"]
    assert [[line[name] for name in names] for line in ours] == [[line[name] for name in names] for line in theirs]
    assert main(["eval", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert all(f"{name}: {theirs[-1][f'eval/{name}/bits_per_byte']:.4f} bits per byte" in shown for name in NAMES)
    assert main(["pretrain", str(bare), *on_shards, words[-1], "--run", str(tmp_path / "other")]) == 2
    assert "has its validation sets; give others to `osler data prepare`" in capsys.readouterr().err


def test_sets_may_move_and_may_not_change(run, words, tmp_path, capsys):
    sets = json.loads(words[-1].partition("=")[2])
    moved = [{**each, "path": shutil.copy(each["path"], tmp_path)} for each in sets]
    assert main(["pretrain", "--resume", f"validation={json.dumps(moved)}", "--run", str(run)]) == 0
    told = capsys.readouterr().err
    assert "have moved: validation[0].path is" in told
    write(Path(moved[0]["path"]), [{"text": "Something else."}])
    assert main(["pretrain", "--resume", f"validation={json.dumps(moved)}", "--run", str(run)]) == 2
    assert "was prepared with another content" in capsys.readouterr().err
    assert main(["pretrain", "--resume", f"validation={json.dumps(moved[:1])}", "--run", str(run)]) == 2
    assert "holds another run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("total_tokens", "num_sets", "interval", "tokens_of_each"),
    [
        (8_192_000, 1, 2_048_000, 409_600),  # the defaults: four evaluations
        (8_192_000, 4, 2_730_667, 136_533),
        (1_000_000, 2, 1_000_000, 131_072),  # one at the end, of a shard of each
        (10**9, 1, 20 * 10**6, 1 << 20),  # fifty
        (10**9, 20, 111_111_112, 1 << 20),
    ],
)
def test_how_often_and_how_much_is_evaluated_follows_the_length_of_the_run(total_tokens, num_sets, interval, tokens_of_each):
    sets = tuple(ClinicData(name=f"set-{number}") for number in range(num_sets))
    config = TrainConfig(total_tokens=total_tokens, validation=sets)
    assert (config.evaluation_tokens, config.evaluated_tokens(num_sets)) == (interval, tokens_of_each)
    assert f"every {interval:,} tokens" in config.numbers()["evaluations"]
    assert replace(config, eval_every_tokens=100).evaluation_tokens == 100


def test_an_evaluation_reads_the_first_shards(tiny, words, tmp_path, monkeypatch):
    for place in ("train.config", "data.writing"):
        monkeypatch.setattr(f"osler.{place}.FIRST_SHARD_TOKENS", 250)
    run = tmp_path / "run"
    assert main(["pretrain", str(tiny.pretrain), *words, "--run", str(run)]) == 0
    assert main(["pretrain", "--run", str(run), "--eval-only"]) == 0
    [found] = json.loads((run / "evaluations.json").read_text()).values()
    sets = json.loads((run / "data" / "manifest.json").read_text())["validation"]
    for name in NAMES:
        assert 0 < found["sets"][name]["tokens"] <= 250 < sets[name]["splits"]["validation"]["tokens"]


def test_a_set_that_turns_out_to_be_empty_counts_for_nobody(tmp_path, monkeypatch):
    """A rank that opens the data later does not open such a set, and must read as much of the others."""
    monkeypatch.setattr("osler.train.config.FIRST_SHARD_TOKENS", 250)
    (tmp_path / "manifest.json").write_text('{"complete": true}')
    writer = ShardWriter(tmp_path / "full" / "validation", vocab_size=9, shard_tokens=1000)
    for _ in range(100):
        writer.add([1] * 100, None, 100)
    writer.close()
    paths = {name: tmp_path / name / "validation" for name in ("full", "empty")}
    described = {"vocab_size": 9, "tokenizer_fingerprint": "", "eos_id": 0}
    sets = {name: ShardSet(path, **described, growing=name == "empty") for name, path in paths.items()}
    config = TrainConfig(total_tokens=30_720, eval_every_tokens=30_720)
    found = [heads(config, part) for part in (sets, {"full": sets["full"]})]
    assert [{name: shards.num_tokens for name, shards in of.items()} for of in found] == [{"full": 6000}] * 2


def test_sets_show_no_fields_that_only_data_to_learn_from_have(words, capsys):
    assert main(["show", "pretrain", "--explain", words[-1]]) == 0
    explained = capsys.readouterr().out.split("\nvalidation:")[1].split("\npacking:")[0]
    assert main(["pretrain", "--dry-run", *words]) == 0
    planned = capsys.readouterr().out.split("\nvalidation:")[1].split("\npacking:")[0]
    for shown in (explained, planned):
        assert shown.count("path:") == 2 and shown.count("field:") == 2
        assert not any(f"{name}:" in shown for name in ONLY_TO_LEARN_FROM)


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        ([{"type": "clinic"}, {"type": "clinic", "seed": 1}], "two validation sets are named clinic"),
        ([{"type": "clinic", "weight": 2}], "the validation set clinic has no weight"),
        ([{"type": "clinic", "clean": {}}], "the validation set clinic has no clean"),
        ([{"type": "files", "path": "gone.txt"}], "no file or folder gone.txt; set validation[0].path"),
    ],
)
def test_sets_that_cannot_be_measured_are_refused(sets, told, tiny, tmp_path, capsys):
    words = [f"validation={json.dumps(sets)}", "--run", str(tmp_path / "run")]
    assert main(["pretrain", str(tiny.pretrain), *words]) == 2
    assert told in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "run" / "config.yaml").exists()


def test_without_sets_what_is_held_out_is_measured_by_source(tiny, runs, tmp_path, capsys):
    """In fine-tuning without bits per byte, because the bytes of the answers alone are not known."""
    turns = tiny.turns.read_text().splitlines()
    parts = {"even": map(json.loads, turns[::2]), "odd": map(json.loads, turns[1::2])}
    paths = [write(tmp_path / f"{name}.jsonl", [*rows]) for name, rows in parts.items()]
    sources = [{"type": "turns", "path": path, "thinking_field": "why"} for path in paths]
    data = f"data={json.dumps({'type': 'mixture', 'sources': sources})}"
    command = ["sft", str(tiny.sft), f"init_from={runs.pretrain}", data, "--run", str(tmp_path / "run")]
    assert main(command) == 0
    line = [line for line in logged(tmp_path / "run") if "eval/loss" in line][-1]
    assert {key for key in line if key.count("/") == 2 and key.startswith("eval/")} == {
        f"eval/{name}/{what}" for name in ("even", "odd") for what in ("loss", "token_accuracy")
    }
    assert "eval/bits_per_byte" not in line and math.isfinite(line["eval/token_accuracy"])
    said = capsys.readouterr().err
    assert f"held-out loss {line['eval/loss']:.4f}, " in said
    assert all(f", {name} loss {line[f'eval/{name}/loss']:.4f}" in said for name in ("even", "odd"))


def test_an_exam_of_ones_own_is_sat_on_the_way(tiny, tmp_path):
    """By likelihood, since a model of plain text cannot answer; the last score is that of `osler eval`."""
    options = dict(zip("ABCD", ("iron", "zinc", "gold", "tin"), strict=True))
    rows = [{"question": f"What helps on day {n}?", "options": options, "answer_idx": "ABCD"[n % 4]} for n in range(8)]
    file = tmp_path / "medqa.jsonl"
    file.write_text("".join(json.dumps({**row, "answer": options[row["answer_idx"]]}) + "\n" for row in rows))
    probe = f"exam={{every_tokens: 1536, tasks: [{{type: medqa, path: {file}, split: dev}}]}}"
    run = tmp_path / "run"
    assert main(["pretrain", tiny.pretrain, probe, "--run", str(run)]) == 0
    found = [line.values["eval/medqa_dev_accuracy"] for line in read_metrics(run / "metrics.jsonl", "eval/medqa_dev_accuracy")]
    assert len(found) == 2
    asked = ["device=cpu", "method=cloze", "prompt=plain", f"task.path={file}", "task.type=medqa"]
    assert main(["eval", str(run), *asked, "--json", str(tmp_path / "scores.json")]) == 0
    assert read_json(tmp_path / "scores.json")["scores"][0]["accuracy"] == found[-1]
