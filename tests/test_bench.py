"""`osler bench`: what it prints holds together, its peers are the same model, and a result names the machine."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from osler.bench import build_learner, machine_of
from osler.cli.main import main
from osler.config.recipe import override
from osler.config.schema import decode
from osler.train.config import TrainConfig

SHAPE = {"num_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
TINY = [f"model.{name}={value}" for name, value in SHAPE.items()]
TINY += ["model.vocab_size=300", "model.max_seq_len=32", "tokenizer.vocab_size=300"]
TINY += ["seq_len=32", "batch_tokens=128", "micro_batch_tokens=64", "compile=never", "precision=fp32", "device=cpu"]


@pytest.fixture
def benchmark_module(monkeypatch):
    """A function that imports a module of ``benchmarks/``."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module


@pytest.mark.slow
def test_bench_times_a_recipe(capsys):
    assert main(["bench", *TINY, "--steps", "2"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["part_seconds"]) == {"data", "forward", "backward", "optimizer"} and result["machine"]["processor"]
    assert min(result["part_seconds"].values()) > 0 and result["peak_memory_bytes"] > 0
    flops = decode(TrainConfig, override({}, TINY)).model.flops_per_token(32)
    rate = result["tokens_per_second"] * flops / result["matmul_flops_per_second"]
    assert result["of_matmul_rate"] == pytest.approx(rate) and result["mfu"] is None and "PaLM" in result["flops_convention"]
    assert main(["bench", "quickstart"]) == 2
    assert "recipe of kind pipeline" in capsys.readouterr().err


def test_bench_refuses_an_attention_that_the_recipes_own_model_cannot_have(capsys):
    assert main(["bench", *TINY, "init_from=RUN", "model.attention={type: sparse, top_k: 64}"]) == 2
    assert "defaults: model.attention.top_k 64 exceeds max_seq_len 32" in capsys.readouterr().err


@pytest.mark.slow
def test_peers_take_turns_and_are_compared_round_by_round(benchmark_module):
    config = decode(TrainConfig, override({}, TINY))
    result = benchmark_module("beside_peers").compare(config, "tiny", peers=["hf"], rounds=1, steps=2)
    ours, theirs = result["osler"], result["hf"]
    assert sum(ours["step_share"].values()) == pytest.approx(1, abs=1e-3)
    assert result["osler_over_hf"]["median"] == pytest.approx(ours["tokens_per_second"] / theirs["tokens_per_second"])


@pytest.mark.slow
def test_the_peer_is_the_same_model_with_the_same_loss(benchmark_module):
    """With the same weights Hugging Face's model gives the same summed loss, so what is timed is the same work."""
    config = decode(TrainConfig, override({}, [*TINY, "model.norm_weight=false", "model.head_init=normal"]))
    ours = build_learner(config, machine_of(config))
    theirs, their_loss = benchmark_module("beside_peers").build_hf(config, torch.float32)
    state, vocab, padded = ours.model.state_dict(), config.model.vocab_size, config.model.padded_vocab_size
    weights = {name if name.startswith("lm_head") else f"model.{name}": value for name, value in state.items()}
    weights = {name: value[:vocab] if value.shape[0] == padded else value for name, value in weights.items()}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and all("norm" in name for name in missing)
    ids, labels = (torch.randint(vocab, (4, 32), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    torch.testing.assert_close(ours.engine.loss(ids, labels, None), their_loss(ids, labels, None), rtol=1e-4, atol=1e-3)


def test_a_result_names_its_machine(tmp_path, capsys, benchmark_module):
    benchmark_module("measuring").publish({"benchmark": "x", "threads": 7}, tmp_path / "x.json")
    machine = json.loads((tmp_path / "x.json").read_text())["machine"]
    assert machine["processor"] and machine["threads"] == 7, "the threads are those of the processes that were measured"
    assert {"cores", "memory_bytes", "torch", "python", "system", "thread_variables"} <= machine.keys()
    assert json.loads(capsys.readouterr().out)["machine"] == machine
