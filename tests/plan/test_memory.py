"""The estimated memory of a step against the measured one, and how it follows from the pass."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from osler.config.recipe import load_recipe
from osler.config.schema import decode
from osler.model.config import DenseAttentionConfig, ModelConfig, SparseAttentionConfig
from osler.plan import memory
from osler.plan.estimate import exact, total
from osler.plan.memory import MODES, MOST_ROWS, Pass, mask_bytes, memory_of, most_rows, parameters_of, state_bytes
from osler.plan.speed import Arithmetic

MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "bench_recompute.json"
EAGER, COMPILED = Arithmetic("fp32", compiled=False, recompute="off"), Arithmetic("bf16", compiled=True, recompute="off")
OF_STEP = ("gradients", "weight copies", "activations", "loss head")
SMALL = ModelConfig(num_layers=4, max_seq_len=16_384)


def model_of(name: str) -> ModelConfig:
    return decode(ModelConfig, load_recipe(name)["model"])


@pytest.mark.parametrize("mode", MODES)
def test_a_step_takes_about_what_was_measured(mode) -> None:
    measured = json.loads(MEASURED.read_text())
    shape = measured["shape"]
    one = Pass(model_of(shape["recipe"]), shape["rows"], shape["seq_len"], EAGER, on_cpu=True)
    parts = memory_of(one, mode)
    step = sum(parts[name].value for name in OF_STEP if name in parts)
    assert step == pytest.approx(measured["median"][mode]["step_bytes"], rel=0.15)
    assert total(parts.values()).value == pytest.approx(measured["median"][mode]["process_bytes"], rel=0.15)


@pytest.mark.parametrize("values", ["none", "alternate"])
@pytest.mark.parametrize("name", ["pure-tiny", "factorized-177m", "superbpe-270m", "synth-small"])
def test_parameters_are_those_of_the_model(name, values) -> None:
    import torch

    from osler.model.transformer import Transformer

    model = replace(model_of(name), value_embeddings=values, copy_head_dim=None if values == "none" else 32)
    with torch.device("meta"):
        built = Transformer(model)
    parameters = sum(parameter.numel() for parameter in built.parameters())
    assert sum(parameters_of(model)) == parameters
    assert state_bytes(model, "adamw", "bf16") == (4 * parameters, 4 * parameters, 8 * parameters)
    assert sum(state_bytes(model, "adamw", "pure-bf16")) == 8 * parameters
    assert state_bytes(model, "muon", "bf16")[2] < 8 * parameters


def test_the_mask_of_documents_is_kept_in_every_layer_on_a_gpu() -> None:
    one = Pass(SMALL, 1, 16_384, COMPILED, document_mask=True)
    assert mask_bytes(one, "full") == 3 * 2**28, "a byte for the model, two for the kernel's copy"
    assert mask_bytes(one, "off") == 9 * 2**28, "and one copy in every layer"
    assert mask_bytes(replace(one, on_cpu=True), "off") == 2**28


def test_sparse_attention_keeps_the_chosen_keys_and_no_mask() -> None:
    model = replace(SMALL, attention=SparseAttentionConfig(top_k=2048))
    one = Pass(model, 1, 16_384, COMPILED, document_mask=True)
    assert mask_bytes(one, "selective") == 4 * mask_bytes(one, "full") == 2**29
    assert mask_bytes(replace(one, seq_len=2048), "full") == 2048**2 * 3, "dense, because all keys are chosen"


def test_more_recomputation_takes_less_and_allows_more_rows() -> None:
    one, limit = Pass(model_of("pure-small"), 4, 2048, COMPILED), 24 * 2.0**30
    sizes = [total(memory_of(one, mode).values()).value for mode in MODES]
    rows = [most_rows(one, mode, limit) for mode in MODES]
    assert sizes == sorted(sizes, reverse=True) and rows == sorted(rows) and rows[0] > 0
    for mode, most in zip(MODES, rows, strict=True):
        assert most_rows(one, mode, 1e15) == MOST_ROWS
        fits, one_more = (total(memory_of(replace(one, rows=count), mode).values()).high for count in (most, most + 1))
        assert fits <= limit < one_more


def test_shards_share_the_state_and_a_checkpoint_copies_it() -> None:
    one = Pass(model_of("pure-small"), 1, 512, COMPILED)
    alone, shared, saving = (
        memory_of(one, "off"),
        memory_of(replace(one, shards=8), "off"),
        memory_of(replace(one, copies=True), "off"),
    )
    assert shared["optimizer"].value == alone["optimizer"].value / 8 and shared["weights"].value > alone["weights"].value / 8
    tables = (ModelConfig(value_embeddings=kind) for kind in ("none", "alternate", "all"))
    none, one_table, two_tables = (memory_of(Pass(model, 1, 512, COMPILED, shards=8), "off")["weights"].value for model in tables)
    of_table = 2048 * 64 * (2 + 4)
    assert one_table - none == of_table + 2 * 2048 * 64 * 4 / 8, "two layers lie whole in memory, and one of them has a table"
    assert two_tables - none == 2 * of_table + 4 * 2048 * 64 * 4 / 8
    assert saving["saving"].value == alone["weights"].value + alone["optimizer"].value and "saving" not in alone


def test_an_evaluation_on_a_cpu_comes_on_top_of_a_step() -> None:
    as_it_was = {"num_heads": 4, "intermediate_size": 704, "value_embeddings": "none", "copy_head_dim": None}
    measured = replace(model_of("text-10min"), attention=DenseAttentionConfig(), **as_it_was)
    one = Pass(measured, 16, 256, COMPILED, on_cpu=True)
    training, evaluating = (memory_of(each, "off") for each in (one, replace(one, evaluates=True)))
    grown = total(evaluating.values()).value - total(training.values()).value
    assert grown == pytest.approx(0.326e9, rel=0.2), "what a run of text-10min grew by at its first evaluation"
    assert total(training.values()).value == pytest.approx(1.013e9, rel=0.15), "and what it had before"


def test_the_scores_of_a_copy_head_grow_with_rows_and_are_most_of_what_it_keeps() -> None:
    import torch

    from osler.model.transformer import SummedLoss, Transformer

    shape, rows, length = ModelConfig(num_layers=1, vocab_size=64, copy_head_dim=16), 2, 512
    one = Pass(shape, rows, length, EAGER)
    planned = memory_of(one, "off")["copy head"].value
    assert memory_of(replace(one, seq_len=2 * length), "off")["copy head"].value == 4 * planned
    assert memory_of(replace(one, arithmetic=COMPILED), "off")["copy head"].value < planned
    assert "copy head" not in memory_of(replace(one, model=replace(shape, copy_head_dim=None)), "off")
    model, kept = Transformer(shape), {}
    model.init_weights(0)
    ids = torch.arange(length).remainder(64).expand(rows, -1)
    hidden = model(ids).detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x):
        SummedLoss(model).of_hidden(hidden, ids, ids, None)
    scores = [x for x in kept.values() if x.dim() == 3 and x.shape[1] == 128 <= x.shape[2]]
    assert len(scores) == 4 and planned / 4 < sum(x.nbytes for x in scores) < planned / 2, "and more while gradients are computed"


def test_chunks_of_logits_are_those_of_the_loss() -> None:
    from osler.ops import cross_entropy as ops

    assert (ops.TILE_WORDS, ops.CACHED_LOGITS["cpu"]) == (memory.TILE_WORDS, memory.CACHED_LOGITS)
    assert (ops.default_chunk_tokens(1), ops.CHUNK_BYTES) == memory.UNTILED
    assert (ops.WHOLE_CHUNK_TOKENS, ops.TILED_CHUNK_BYTES) == memory.WHOLE
    assert (ops.TILED_CHUNK_TOKENS, ops.TILED_CHUNK_BYTES) == memory.TILED


def test_what_a_probe_measured_decides_how_many_rows_fit() -> None:
    one = Pass(model_of("text-10min"), 8, 256, EAGER, on_cpu=True, evaluates=True)
    limit, computed = 6e9, total(memory_of(one, "off").values())
    assumed = {mode: most_rows(one, mode, limit) for mode in MODES}

    def with_probe(number: float) -> dict[str, int]:
        return {mode: most_rows(one, mode, limit, measured=exact(number)) for mode in MODES}

    assert with_probe(computed.high) == assumed
    for mode in MODES:
        assert 0 < with_probe(2 * computed.high)[mode] < assumed[mode] < with_probe(computed.low)[mode]
    assert most_rows(one, "off", computed.value, measured=exact(computed.value)) == one.rows, "it ran, so it fits"
