"""A model as ONNX, for ONNX Runtime in any language: one graph with a cache computes whole prompts and single tokens.

Inputs and outputs have the names that ``optimum`` gives them: ``input_ids`` [B, T], ``attention_mask`` [B, S] (1, or 0 for
padding on the left), ``past_key_values.N.key`` and ``.value`` [B, K, P, H]; ``logits`` [B, T, V], ``present.N.key`` and
``.value`` [B, K, S, H]. P, the number of past tokens, is 0 for a prompt. B, T and P are free. A token's position is the
number of ones before it in the mask.

The graph is traced from ``QwenGraph``, the model in plain operators, because those of training have backward passes of their own
and split the queries. Weights are kept as [in, out], because ONNX Runtime quantises the right side of a product only.
Shapes: B batch, T new tokens, P past tokens, S = P + T, D hidden, N query heads, K key/value heads, G = N / K, H head size.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osler.export.huggingface import Export, companion_files
from osler.inference.load import TOKENIZER_FILE
from osler.model.config import ModelConfig
from osler.model.quantization import quantize
from osler.model.rope import apply_rope, rope_tables
from osler.runtime.errors import UserError
from osler.runtime.log import say

MODEL_NAME = "model.onnx"
DTYPES = ("fp32", "int8", "int4")
OPSET = 20
BLOCK = 32  # weights of a matrix that share a scale and an offset
INLINE_BYTES = 1_500_000_000  # a larger model's weights go into a second file, because an ONNX file holds 2 GB at most


class QwenGraph(nn.Module):
    """The model of ``qwen3_weights`` in plain operators, with its embedding in int8 for the dtype ``int8``."""

    cos: Tensor
    sin: Tensor
    embed: Tensor
    scale_V1: Tensor | None
    head: Tensor | None
    norm: Tensor

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor], dtype: str) -> None:
        super().__init__()
        self.config = config
        cos, sin = rope_tables(config.max_seq_len, config.head_dim, config.rope_theta, config.rope_scaling)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)
        embed_VD = weights["model.embed_tokens.weight"]
        head_VD = weights.get("lm_head.weight", embed_VD)
        self.register_buffer("head", None if config.tie_embeddings and dtype == "fp32" else head_VD.T.contiguous())
        # ONNX Runtime's quantiser of 8 bits leaves an embedding as it is.
        embed_VD, scale_V1 = quantize(embed_VD, 8, config.hidden_size) if dtype == "int8" else (embed_VD, None)
        self.register_buffer("embed", embed_VD)
        self.register_buffer("scale_V1", None if scale_V1 is None else scale_V1.float())
        self.layers = nn.ModuleList(Layer(config, weights, f"model.layers.{index}.") for index in range(config.num_layers))
        self.register_buffer("norm", weights["model.norm.weight"])

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: Sequence[Tensor]) -> tuple[Tensor, ...]:
        new = input_ids.shape[1]
        counted_BS = attention_mask.cumsum(-1)
        position_BT = (counted_BS[:, -new:] - 1).clamp(min=0)
        rope = self.cos[position_BT][:, :, None], self.sin[position_BT][:, :, None]
        # Causal mask: a token sees itself and the tokens before it, but no padding.
        seen_BTS = (counted_BS[:, None, :] <= counted_BS[:, -new:, None]) & (attention_mask[:, None, :] > 0)
        bias_B11TS = torch.where(seen_BTS, 0.0, -1e9)[:, None, None]
        x_BTD = F.embedding(input_ids, self.embed)
        if self.scale_V1 is not None:
            x_BTD = x_BTD.float() * F.embedding(input_ids, self.scale_V1)
        present: list[Tensor] = []
        for layer, k, v in zip(self.layers, past[::2], past[1::2], strict=True):
            x_BTD, k, v = layer(x_BTD, rope, bias_B11TS, k, v)
            present += [k, v]
        x_BTD = rms_norm(x_BTD, self.norm, self.config.norm_eps)
        return x_BTD @ (self.embed.T if self.head is None else self.head), *present


class Layer(nn.Module):
    """A block: attention with its cache, then SwiGLU."""

    input_layernorm: Tensor
    q_proj: Tensor
    k_proj: Tensor
    v_proj: Tensor
    q_norm: Tensor
    k_norm: Tensor
    o_proj: Tensor
    post_attention_layernorm: Tensor
    gate_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor], prefix: str) -> None:
        super().__init__()
        self.config = config
        for name, weight in weights.items():
            if name.startswith(prefix):
                self.register_buffer(name.split(".")[-2], weight.t().contiguous())

    def forward(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], bias_B11TS: Tensor, past_k: Tensor, past_v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        config, eps = self.config, self.config.norm_eps
        normed_BTD = rms_norm(x_BTD, self.input_layernorm, eps)
        q, k, v = (
            (normed_BTD @ weight).unflatten(-1, (-1, config.head_dim)) for weight in (self.q_proj, self.k_proj, self.v_proj)
        )
        q = apply_rope(rms_norm(q, self.q_norm, eps), *rope).transpose(1, 2)
        k = torch.cat([past_k, apply_rope(rms_norm(k, self.k_norm, eps), *rope).transpose(1, 2)], dim=2)
        v = torch.cat([past_v, v.transpose(1, 2)], dim=2)
        q_BKGTH = q.unflatten(1, (config.num_kv_heads, -1))
        scores = q_BKGTH @ k[:, :, None].transpose(-1, -2) * config.head_dim**-0.5 + bias_B11TS
        out_BNTH = (scores.softmax(-1) @ v[:, :, None]).flatten(1, 2)
        x_BTD = x_BTD + out_BNTH.transpose(1, 2).flatten(2) @ self.o_proj
        normed_BTD = rms_norm(x_BTD, self.post_attention_layernorm, eps)
        return x_BTD + (F.silu(normed_BTD @ self.gate_proj) * (normed_BTD @ self.up_proj)) @ self.down_proj, k, v


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x scaled to unit root mean square, times a weight."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def write(export: Export, folder: Path) -> str:
    """Write the graph, tokenizer and config as a new folder, and return the name of its form. Needs the extra ``export``."""
    quantization = runtime()
    then = "" if export.dtype == "fp32" else f", then its matrices are put into {export.dtype}"
    say(f"The graph is being traced and written{then}; this can take a minute.")
    folder.mkdir()
    parts = folder / "parts"
    parts.mkdir()
    plain = folder / MODEL_NAME if export.dtype == "fp32" else parts / MODEL_NAME
    write_graph(export, plain)
    if export.dtype != "fp32":
        write_quantized(quantization, plain, folder / MODEL_NAME, export.dtype)
    shutil.rmtree(parts)
    files = companion_files(export)
    # Unlike in companion_files, its markers are special, so that text cannot forge them.
    files[TOKENIZER_FILE] = export.loaded.tokenizer.to_bytes()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return "ONNX with a KV cache"


def write_graph(export: Export, path: Path) -> None:
    """Trace the model and write it as one file; weights over ``INLINE_BYTES`` go into a second file beside it."""
    config = export.config
    graph = QwenGraph(config, export.weights, export.dtype).eval()
    free = torch.export.Dim.DYNAMIC
    # Every size of the example is different, so that the tracer takes no two for one size.
    past = [torch.zeros(2, config.num_kv_heads, 5, config.head_dim) for _ in range(2 * config.num_layers)]
    kinds = [f"{index}.{kind}" for index in range(config.num_layers) for kind in ("key", "value")]
    size = sum(buffer.nbytes for buffer in graph.buffers())
    with quiet():
        torch.onnx.export(
            graph,
            (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64), past),
            path,
            input_names=["input_ids", "attention_mask", *(f"past_key_values.{kind}" for kind in kinds)],
            output_names=["logits", *(f"present.{kind}" for kind in kinds)],
            dynamic_shapes=({0: free, 1: free}, {0: free, 1: free}, [{0: free, 2: free} for _ in past]),
            opset_version=OPSET,
            external_data=size > INLINE_BYTES,
            dynamo=True,
            verbose=False,
        )


def write_quantized(quantization: ModuleType, plain: Path, path: Path, dtype: str) -> None:
    """Write a copy of a graph with its matrices in 8 or 4 bits; norms and activations stay in fp32."""
    is_large = any(plain.parent.glob(f"{plain.name}.*"))
    bits, kinds = {"int8": (8, ("MatMul",)), "int4": (4, ("MatMul", "Gather"))}[dtype]
    with quiet():
        nbits = quantization.matmul_nbits_quantizer.MatMulNBitsQuantizer
        quantiser = nbits(str(plain), bits, BLOCK, op_types_to_quantize=kinds)
        quantiser.process()
        quantiser.model.save_model_to_file(str(path), is_large)


def runtime() -> ModuleType:
    """Return the part of ONNX Runtime that quantises; raises UserError where the extra ``export`` is not installed."""
    try:
        import onnxruntime.quantization.matmul_nbits_quantizer
        import onnxscript  # noqa: F401 - torch needs it to export
    except ImportError as error:
        remedy = "pip install -e '.[export]' in Osler's source tree"
        raise UserError(f"ONNX needs packages that are not here ({error}): {remedy}.") from None
    return onnxruntime.quantization


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what torch and ONNX Runtime print and log during an export, except errors."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
