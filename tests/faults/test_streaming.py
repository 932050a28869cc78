"""Runs that train while their data are being prepared: the same run as on prepared data, whatever is killed."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from run_folders import STOPPED, logged

from osler.checkpoint import store
from osler.config.recipe import load_yaml
from osler.records.jsonl import read_events
from osler.runtime.files import is_locked

WORDS = ["fever", "cough", "pain", "rash", "aspirin", "heart", "lung", "liver", "doses", "daily", "relieves", "causes", "treats"]


def texts(count: int, seed: int) -> str:
    rng = random.Random(seed)
    lines = ({"text": " ".join(rng.choices(WORDS, k=rng.randint(20, 120)))} for _ in range(count))
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def recipe(tiny, tmp_path):
    """Twelve steps over about 550,000 tokens, and over a small source that they read several times."""
    (tmp_path / "large.jsonl").write_text(texts(2500, 0))
    (tmp_path / "small.jsonl").write_text(texts(60, 1))
    (tmp_path / "held.jsonl").write_text(texts(40, 2))
    weights = {"large": 6, "small": 1}
    sources = [{"type": "files", "path": str(tmp_path / f"{name}.jsonl"), "weight": weights[name]} for name in weights]
    given = load_yaml(Path(tiny.pretrain).read_text(), "")
    given |= {"data": {"type": "mixture", "sources": sources}, "batch_tokens": 16384}
    tokens = 12 * 16384
    given |= {"total_tokens": tokens, "checkpoint": {"every_tokens": tokens // 3}, "eval_every_tokens": tokens // 2}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(given))
    return path


def test_a_streamed_run_is_the_prepared_one(osler, recipe, tmp_path):
    small = ["data.sources=[{type: files, path: " + str(tmp_path / "small.jsonl") + "}]", "batch_tokens=256", "total_tokens=3072"]
    for name, streaming in (("streamed", "true"), ("prepared", "false")):
        assert osler("pretrain", recipe, *small, f"data.streaming={streaming}", "--run", tmp_path / name) == 0
    streamed, prepared = (
        [line.get("train/loss", line.get("eval/loss")) for line in logged(tmp_path / name)] for name in ("streamed", "prepared")
    )
    assert streamed == prepared and len(streamed) > 3
    assert not is_locked(tmp_path / "streamed" / "data"), "the preparation outlived the run"


def test_a_streamed_run_goes_on_with_other_data_where_that_is_allowed(osler, recipe, tmp_path):
    """Whether they are others is known when as many shards are prepared as there were when the run was stopped."""
    run, recorded = tmp_path / "run", "0123456789abcdef@1"
    command = ["pretrain", recipe, "batch_tokens=256", "total_tokens=3072", "data.streaming=true", "--run", run]
    sources = ["data.sources=[{type: files, path: " + str(tmp_path / f"{name}.jsonl") + "}]" for name in ("small", "large")]
    assert osler(*command, sources[0], fault="train-step:sigterm:4") == STOPPED
    saved = store.load(store.resolve(run))
    fingerprints = {**saved.state["fingerprints"], "data": recorded}
    state = {**saved.state, "fingerprints": fingerprints}
    store.save(run / "checkpoints", saved.step, tensors=saved.tensors, state=state, files=saved.files)
    shutil.rmtree(run / "data")
    assert osler(*command, sources[1], "allow_data_change=true", fault="write-shard:slow:1-") == 0
    [change] = [event for event in read_events(run / "events.jsonl") if event.kind == "data-change"]
    assert change.details["before"] == recorded and logged(run)[-1]["step"] == 12


@pytest.mark.slow
def test_streamed_runs(run_cases, recipe, tmp_path):
    assert run_cases("faults/streamed_runs.py", recipe, tmp_path, "all") == 8


@pytest.fixture
def longer(recipe, tmp_path):
    """48 steps over a part of about 500,000 tokens in 16 files; a checkpoint after each is enough to go on from."""
    (tmp_path / "large").mkdir()
    for number in range(16):
        (tmp_path / "large" / f"{number}.jsonl").write_text(texts(140, number))
    given = json.loads(recipe.read_text())
    given["data"]["sources"] = [{"type": "files", "path": str(tmp_path / "large")}]
    given["validation"] = [{"type": "files", "path": str(tmp_path / "held.jsonl")}]
    given |= {"batch_tokens": 4096, "recovery": {"max_rollbacks": 0}, "eval_every_tokens": 24 * 4096}
    given["checkpoint"] = {"every_tokens": 2 * 4096, "keep_last": 1}
    recipe.write_text(json.dumps(given | {"total_tokens": 48 * 4096}))
    return recipe


@pytest.mark.slow
def test_a_disk_budget_is_kept(run_cases, longer, tmp_path, monkeypatch):
    """With shards so small that the data are a hundred of them, from the shared constants of all processes."""
    small = str(Path(__file__).parent / "small_shards")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [small, os.environ.get("PYTHONPATH")])))
    assert run_cases("faults/streamed_runs.py", longer, tmp_path, "budget") == 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["data.sources=[{type: files, path: a.txt, streaming: true}]"], "are of the mixture and not of one of its sources"),
        (["data.disk_budget_gb=1"], "needs data.streaming=true"),
        (["data.streaming=true", "data.disk_budget_gb=1", "packing=whole"], "needs packing=stream"),
        (["data.streaming=true", "data.disk_budget_gb=0.0001"], "takes up to 0.101 GB"),
        (["data.streaming=true", "data.disk_budget_gb=0.0001", "validation=[{type: clinic}]"], "takes up to 0.0224 GB"),
    ],
)
def test_a_stream_that_cannot_work_is_refused_at_the_start(mistake, recipe, tmp_path, given, said):
    assert said in mistake("pretrain", recipe, *given, "--run", tmp_path / "run")
