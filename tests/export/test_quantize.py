"""A quantised checkpoint: smaller, read by everything that reads a model, and never trained or gone on with."""

import json
import math
from pathlib import Path

import pytest
import torch

from osler import api
from osler.checkpoint import store
from osler.checkpoint.store import read_tensors
from osler.cli.main import main
from osler.inference.load import load_model
from osler.model.quantization import dequantize_weights, quantize_weights
from osler.report.read import read_run
from osler.runtime.faults import InjectedError


@pytest.fixture(scope="module")
def quantized(runs, tmp_path_factory):
    """Run folders of the fine-tuned model by format."""
    root, made = tmp_path_factory.mktemp("quantized"), {}
    for to in ("int8", "int4", "bf16"):
        assert main(["quantize", str(runs.sft), "--to", to, "--group-size", "32", "--out", str(root / to)]) == 0
        made[to] = root / to
    return made


def model_bytes(folder: Path) -> int:
    return next(folder.glob("checkpoints/step-*/model.safetensors")).stat().st_size


def test_the_file_is_smaller_and_the_model_is_that_of_the_rounded_weights(runs, quantized):
    original = load_model(runs.sft)
    weights = original.model.state_dict()
    for to, share in (("int8", 0.3), ("int4", 0.18), ("bf16", 0.52)):
        loaded = load_model(quantized[to])
        assert model_bytes(quantized[to]) < share * model_bytes(original.path.parents[1])
        expected = {name: weight.bfloat16().float() for name, weight in weights.items()}
        if to != "bf16":
            stored = quantize_weights(weights, int(to[3:]), 32)
            expected = dequantize_weights(stored, weights, 32)
        assert all(torch.equal(weight, expected[name]) for name, weight in loaded.model.state_dict().items())
        assert (loaded.kind, loaded.reasons, loaded.training) == (original.kind, original.reasons, original.training)
        assert loaded.model.trained_seq_len == original.model.trained_seq_len


def test_every_command_that_reads_a_model_takes_it(quantized, runs, tmp_path, capsys):
    int8 = str(quantized["int8"])
    assert main(["generate", int8, "--prompt", "The", "--max-new-tokens", "4"]) == 0
    for run in (int8, str(runs.sft)):
        assert main(["eval", run, "task=clinic:new_findings", "subset=6", "method=likelihood"]) == 0
    capsys.readouterr()
    assert main(["compare", str(runs.sft), int8, "--out", str(tmp_path / "compare.html")]) == 0
    told = capsys.readouterr()
    assert f"{runs.sft.name} → int8" in told.out and not (tmp_path / "compare.html").exists()
    assert "No page is written: it would show the curves of training" in told.err and f"none in {int8}." in told.err
    assert main(["report", int8, "--out", str(tmp_path / "report.html")]) == 0
    assert main(["export", int8, "--to", "safetensors", "--out", str(tmp_path / "int8.safetensors")]) == 0
    assert "int8 weights are written out" in capsys.readouterr().err
    exported = read_tensors(tmp_path / "int8.safetensors")
    assert all(torch.equal(exported[name], weight) for name, weight in load_model(int8).model.state_dict().items())
    assert main(["checkpoint", "list", int8]) == 0 and main(["checkpoint", "verify", int8]) == 0
    assert "quantised to int8" in api.load(int8, device="cpu").describe()


def test_card_report_and_exports_say_what_the_weights_are_in(quantized, tmp_path):
    for to, dtype in (("int8", torch.float32), ("bf16", torch.bfloat16)):
        source, out = quantized[to], tmp_path / to
        assert main(["export", str(source), "--to", "hf", "--out", str(out)]) == 0
        made = f"`osler quantize` of {next(source.glob('checkpoints/step-*')).name}, weights in {to}"
        card = (out / "README.md").read_text()
        assert made in card and card.count("\nmodel:") == 1  # the fine-tuned run took its model from the pretrained one
        assert made in read_run(source).notes[0]
        assert {tensor.dtype for tensor in read_tensors(out / "model.safetensors").values()} == {dtype}


@pytest.mark.parametrize(
    ("words", "message"),
    (
        (["sft", "{tiny.sft}", "init_from={int8}", "--run", "{new}"], "can be used but not trained"),
        (["sft", "{tiny.sft}", "init_from={int8}", "--run", "{new}", "--dry-run"], "can be used but not trained"),
        (["grpo", "{tiny.grpo}", "init_from={int8}", "--run", "{new}"], "can be used but not trained"),
        (["sft", "--run", "{int8}", "--resume"], "made by `osler quantize`"),
        (["sft", "--branch", "{int8}", "--run", "{new}"], "made by `osler quantize`"),
        (["sft", "--branch", "{bf16}", "--run", "{new}"], "made by `osler quantize`"),
        (["quantize", "{int8}", "--to", "int4", "--out", "{new}"], "quantised again"),
        (["quantize", "{runs.sft}", "--to", "int4", "--out", "{int8}"], "is there already"),
        (["quantize", "{new}", "--to", "int4", "--out", "{new}"], "is no folder"),
    ),
)
def test_what_it_cannot_be_used_for_is_refused_with_the_way_out(words, message, quantized, runs, tiny, tmp_path, capsys):
    places = {"new": tmp_path / "new", "runs": runs, "tiny": tiny, **quantized}
    assert main([word.format(**places) for word in words]) == 2
    error = capsys.readouterr().err
    assert message in error
    if "not trained" in message:
        assert str(runs.sft) in error  # the checkpoint to take instead
    assert not (tmp_path / "new").exists() or not any((tmp_path / "new").glob("checkpoints/*"))


def test_a_bf16_checkpoint_is_trained_like_any_other(quantized, tiny, tmp_path):
    start, folder = f"init_from={quantized['bf16']}", tmp_path / "new"
    assert main(["sft", tiny.sft, start, "total_tokens=1024", "checkpoint.every_tokens=1024", "--run", str(folder)]) == 0
    assert "made_by" not in json.loads(next(folder.glob("checkpoints/step-*/state.json")).read_text())


@pytest.mark.parametrize(("value", "message"), [(math.nan, "NaN or infinite"), (1e30, "too large for the scales of int8")])
def test_weights_that_would_become_zeros_are_refused(value, message, runs, tmp_path, capsys):
    loaded = store.load(store.resolve(runs.sft), names=["model"])
    weights = {name: weight.clone() for name, weight in loaded.tensors["model"].items()}
    weights["layers.0.mlp.up_proj.weight"][0, 0] = value
    path = store.save(tmp_path / "run" / "checkpoints", 1, tensors={"model": weights}, state=loaded.state, files=loaded.files)
    others = [["export", "--to", "gguf"], ["prune", "--layers", "1"]] if math.isnan(value) else []
    for command in (["quantize", "--to", "int8"], *others):
        assert main([*command, str(path), "--out", str(tmp_path / "out")]) == 2
        assert message in (said := capsys.readouterr().err) and "layers.0.mlp.up_proj.weight" in said
    assert not (tmp_path / "out").exists()


def test_a_kill_or_a_full_disk_leaves_no_half_folder(runs, tmp_path, osler):
    out = tmp_path / "int8"
    command = ["quantize", runs.sft, "--to", "int8", "--out", out]
    assert osler(*command, fault="save-manifest:enospc") == 2
    with pytest.raises(InjectedError):
        osler(*command, fault="write-atomic:crash:2")
    assert not out.exists()
    assert osler(*command) == 0 and load_model(out).quantized == "int8"
    assert [path.name for path in tmp_path.iterdir()] == ["int8"]
