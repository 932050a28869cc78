"""The estimated memory of a step against the measured one, and where a person reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from osler.cli.show import show_recipe
from osler.config.recipe import load_recipe
from osler.config.schema import decode
from osler.model.config import ModelConfig, SparseAttentionConfig
from osler.train.memory import activation_bytes, choice_bytes, estimated, mask_bytes

MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "bench_recompute.json"


@pytest.mark.parametrize("mode", ["off", "selective"])
def test_activations_are_about_what_was_measured(mode) -> None:
    """In the third mode the gradients of the weights, which the estimate counts elsewhere, are larger than the activations."""
    measured = json.loads(MEASURED.read_text())
    shape = measured["shape"]
    model = decode(ModelConfig, load_recipe(shape["recipe"])["model"])
    estimate = activation_bytes(model, shape["rows"], shape["seq_len"], mode, width=4)
    assert estimate == pytest.approx(measured["median"][mode]["step_bytes"], rel=0.15)


def test_the_plan_says_what_long_rows_take() -> None:
    long = ["seq_len=16384", "model.max_seq_len=16384", "batch_tokens=16384"]
    told, masked = (show_recipe("pretrain", [*long, *more]) for more in ([], ["document_mask=true"]))
    assert "(an estimate)" in told and "1 x 16,384 tokens\n" in f"{told}\n"
    assert "1 x 16,384 tokens and their masks" in masked
    model = ModelConfig(num_layers=4)
    assert mask_bytes(model, 1, 16_384, "full", 2) == 3 * 2**28, "a byte for the model, two for the kernel's copy"
    assert mask_bytes(model, 1, 16_384, "off", 2) == 9 * 2**28, "and one copy in every layer"


def test_sparse_attention_keeps_the_chosen_keys_and_no_mask() -> None:
    model = ModelConfig(num_layers=4, max_seq_len=16_384, attention=SparseAttentionConfig(top_k=2048))
    assert choice_bytes(model, 1, 16_384, "selective") == 4 * choice_bytes(model, 1, 16_384, "full") == 2**29
    plain, masked = (
        estimated(model, rows=1, seq_len=16_384, precision="bf16", document_mask=document_mask) for document_mask in (False, True)
    )
    assert plain == masked and "and the chosen keys" in plain["of it"]
    short = estimated(model, rows=1, seq_len=2048, precision="bf16", document_mask=True)
    assert "and their masks" in short["of it"], "dense, because all keys are chosen"
