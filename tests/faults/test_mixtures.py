"""Runs on several sources: exact resume, weights that change with a stage, and mistakes about them."""

from __future__ import annotations

import json

import pytest
from run_folders import STOPPED

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


STAGES = [{"seq_len": 32, "until_tokens": 1536}, {"seq_len": 64, "weights": {"book": 1, "asked": 3}}]


@pytest.mark.parametrize("stages", [[], STAGES])
def test_a_run_on_two_sources_resumes_exactly_and_counts_them(sources, stages, launch, tmp_path, assert_same_run):
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
