"""Runs on several sources: exact resume, weights that change with a stage, and mistakes about them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_folders import STOPPED, assert_same_run

from osler.clinic.textbook import textbook
from osler.records.jsonl import read_metrics


@pytest.fixture
def sources(tmp_path, tiny) -> list[str]:
    """Overrides that give a run two sources, three parts of text to one of questions."""
    text, turns = tmp_path / "book.jsonl", tmp_path / "asked.jsonl"
    text.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in textbook(0, 60)))
    turns.write_text(tiny.turns.read_text())
    both = [{"type": "files", "path": str(text), "weight": 3}, {"type": "turns", "path": str(turns)}]
    return [f"data={json.dumps({'type': 'mixture', 'sources': both})}"]


def test_of_a_source_that_is_gone_the_shards_are_used_and_the_others_are_checked(sources, launch, mistake, tmp_path, capsys):
    assert launch("pretrain", tmp_path / "run", *sources, fault="train-step:sigterm:3") == STOPPED
    (tmp_path / "asked.jsonl").unlink()
    book = tmp_path / "book.jsonl"
    before = book.read_text()
    book.write_text(before.replace(before[40:44], "####", 1))
    told = mistake("pretrain", "--resume", "--run", tmp_path / "run")
    assert "prepared with another content" in told and "book.jsonl has changed" in told
    book.write_text(before)
    assert launch("pretrain", tmp_path / "run", resume=True) == 0
    assert "There is nothing at " in capsys.readouterr().err


def test_a_run_on_prepared_shards_of_several_sources_is_one_on_the_sources(
    sources, tiny, osler, launch, tmp_path, capsys
):
    """Their weights are kept beside the shards; a curriculum may give others."""
    out, recipe = tmp_path / "shards", json.loads(Path(tiny.pretrain).read_text())
    recipe["data"] = json.loads(sources[0].removeprefix("data="))
    (tmp_path / "both.yaml").write_text(json.dumps(recipe))
    assert osler("data", "prepare", tmp_path / "both.yaml", "--out", out, "--workers", 1) == 0
    assert "asked/validation" in capsys.readouterr().out
    stages = f"curriculum={json.dumps(STAGES)}"
    assert launch("pretrain", tmp_path / "whole", *sources, stages) == 0
    del recipe["data"], recipe["tokenizer"]
    (tmp_path / "bare.yaml").write_text(json.dumps(recipe))
    command = ["pretrain", tmp_path / "bare.yaml", "data.type=prepared", f"data.path={out}", stages, "--run", tmp_path / "run"]
    assert osler(*command, fault="train-step:sigterm:7") == STOPPED
    assert osler(*command) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_mistake_in_a_mixture_names_its_source(sources, mistake, commands, tmp_path):
    other = sources[0].replace('"weight": 3', '"field": "body"')
    told = mistake(*commands["pretrain"], other, "--run", tmp_path / "run")
    assert "book.jsonl:1 has no field 'body'" in told and "Set data.sources[0].field=NAME" in told
    (tmp_path / "asked.jsonl").unlink()
    assert "set data.sources[1].path to one" in mistake(*commands["pretrain"], *sources, "--run", tmp_path / "run")


STAGES = [{"seq_len": 32, "until_tokens": 1536}, {"seq_len": 64, "weights": {"book": 1, "asked": 3}}]


@pytest.mark.parametrize("stages", [[], STAGES])
def test_a_run_on_two_sources_resumes_exactly_and_counts_them(sources, stages, launch, tmp_path):
    words = [*sources, f"curriculum={json.dumps(stages)}"]
    assert launch("pretrain", tmp_path / "whole", *words) == 0
    assert launch("pretrain", tmp_path / "run", *words, fault="train-step:sigterm:7") == STOPPED
    assert launch("pretrain", tmp_path / "run", resume=True) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    *_, line = read_metrics(tmp_path / "whole" / "metrics.jsonl", "data/tokens/book")
    last = line.values
    expected = {"book": 3 / 4 * 3072, "asked": 1 / 4 * 3072} if not stages else {"book": 1536, "asked": 1536}
    for name, tokens in expected.items():
        assert last[f"data/tokens/{name}"] == pytest.approx(tokens, abs=64)
        assert last[f"data/target_frac/{name}"] == (0.75 if (name == "book") != bool(stages) else 0.25)


def test_weights_of_other_sources_are_refused(sources, launch, mistake, commands, tmp_path):
    stages = json.dumps([{"seq_len": 32, "until_tokens": 1536}, {"seq_len": 64, "weights": {"book": 1}}])
    told = mistake(*commands["pretrain"], *sources, f"curriculum={stages}", "--run", tmp_path / "run")
    assert "curriculum, stage 2: its weights are of book, the sources are book, asked" in told


def test_a_branch_may_not_change_the_weights_of_what_it_has_seen(sources, launch, mistake, tmp_path):
    assert launch("pretrain", tmp_path / "run", *sources, fault="train-step:sigterm:9") == STOPPED
    changed = sources[0].replace('"weight": 3', '"weight": 1')
    checkpoint = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[0]
    told = mistake("pretrain", changed, "--branch", checkpoint, "--run", tmp_path / "other")
    assert "With other weights of the sources" in told and "a first stage with until_tokens=" in told
