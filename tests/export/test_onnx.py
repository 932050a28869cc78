"""The graph against the model; ONNX Runtime against it too, which takes a while because torch traces the graph."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from osler.cli.main import main
from osler.export import onnx
from osler.export.huggingface import qwen3_weights
from osler.export.onnx import QwenGraph
from osler.inference.load import load_model
from osler.inference.recompute import generate_by_recompute
from osler.model.config import YarnConfig
from osler.ops.sampling_params import SamplingParams
from osler.tokenizer.chat import encode_prompt
from tests.export.conftest import SHAPES

EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_chat.py"
YARN = {"rope_scaling": YarnConfig(factor=4, original_max_seq_len=10, beta_fast=1.5, beta_slow=0.1)}


def in_two_parts(model, run, lengths=(20, 7, 1), more=3) -> tuple[np.ndarray, list[torch.Tensor]]:
    """Logits of rows padded on the left, read as prompts and then token by token by ``run``, and the model's own of each row."""
    config, width = model.config, max(lengths)
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, config.vocab_size, (length + more,), generator=draw) for length in lengths]
    ids, mask = (torch.zeros(len(rows), width + more, dtype=torch.int64) for _ in range(2))
    for row, content in enumerate(rows):
        ids[row, -len(content) :], mask[row, -len(content) :] = content, 1
    past = [torch.zeros(len(rows), config.num_kv_heads, 0, config.head_dim) for _ in range(2 * config.num_layers)]
    parts, start = [], 0
    for end in range(width, width + more + 1):
        logits, *past = run(ids[:, start:end], mask[:, :end], past)
        parts.append(np.asarray(logits))
        start = end
    with torch.inference_mode():
        own = [model.logits(model(content[None]))[0] for content in rows]
    return np.concatenate(parts, 1), own


def assert_close(logits: np.ndarray, own: list[torch.Tensor], atol: float) -> None:
    for row, expected in enumerate(own):
        np.testing.assert_allclose(logits[row, -len(expected) :], expected.numpy(), atol=atol, rtol=0)


@pytest.mark.parametrize("shape", [*SHAPES, "yarn"])
def test_graph_computes_the_model(shape, checkpoint):
    model = load_model(checkpoint(**(YARN if shape == "yarn" else SHAPES[shape]))).model
    graph = QwenGraph(model.config, qwen3_weights(model.config, model.state_dict()), "fp32")
    with torch.inference_mode():
        assert_close(*in_two_parts(model, graph), 1e-5)


def test_a_token_with_large_numbers_leaves_the_others_theirs_in_int8(checkpoint):
    model = load_model(checkpoint()).model
    weights = qwen3_weights(model.config, model.state_dict())
    embed = weights["model.embed_tokens.weight"].clone()
    embed[0] *= 1000
    graphs = (QwenGraph(model.config, weights | {"model.embed_tokens.weight": embed}, dtype) for dtype in ("int8", "fp32"))
    ids, past = torch.arange(1, 61)[None], [torch.zeros(1, model.config.num_kv_heads, 0, model.config.head_dim)] * 4
    with torch.inference_mode():
        rounded, whole = (graph(ids, torch.ones_like(ids), past)[0] for graph in graphs)
    torch.testing.assert_close(rounded, whole, atol=0.05, rtol=0)
    assert not torch.equal(rounded, whole)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "atol", "of_size"), [("fp32", 1e-4, 1.5), ("int8", 0.1, 0.6), ("int4", 3.0, 0.5)])
def test_onnx_runtime_computes_the_same_and_needs_no_torch(dtype, atol, of_size, runs, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    if dtype != "fp32":  # as a large model: weights in a file of their own
        monkeypatch.setattr(onnx, "INLINE_BYTES", 0)
    folder = tmp_path / "onnx"
    assert main(["export", str(runs.sft), "--to", "onnx", "--dtype", dtype, "--out", str(folder)]) == 0
    ours = load_model(runs.sft)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def run(*inputs):
        flat = [*inputs[:2], *inputs[2]]
        return session.run(None, {name: np.asarray(value) for name, value in zip(names, flat, strict=True)})

    assert_close(*in_two_parts(ours.model, run), atol)
    weights = 4 * sum(weight.numel() for weight in ours.model.parameters())
    size = sum(path.stat().st_size for path in folder.glob("*model.onnx*"))
    assert size < of_size * weights + 330_000  # the graph itself, and what aligns weights in their file
    if dtype != "fp32":
        return
    question = "Which drug helps: aspirin (A) or <|answer|> (B)?"
    program = f"import runpy, sys; runpy.run_path({str(EXAMPLE)!r}); assert 'torch' not in sys.modules"
    config = json.loads((folder / "config.json").read_text())
    for reasons in (True, False):
        (folder / "config.json").write_text(json.dumps({**config, "osler": {**config["osler"], "reasons": reasons}}))
        prompt = encode_prompt(ours.tokenizer, question, reasoning=reasons)
        sampling = SamplingParams(max_new_tokens=256 - len(prompt), temperature=0.0, stop_ids=(ours.tokenizer.eos_id,))
        (written,) = generate_by_recompute(ours.model, [prompt], sampling)
        lines = re.sub(r"<\|\w+\|>", "\n", ours.tokenizer.decode(written.ids)).strip()
        for words, typed in (([question], ""), ([], question)) if reasons else (([], question),):
            command = [sys.executable, "-c", program, str(folder), *words]
            done = subprocess.run(command, input=typed, capture_output=True, text=True, check=True)
            assert done.stdout.strip() == lines
    done = subprocess.run([sys.executable, str(EXAMPLE), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and "has no model.onnx" in done.stderr
