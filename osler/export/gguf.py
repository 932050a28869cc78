"""A model as one GGUF file, for llama.cpp and what is built on it (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

llama.cpp splits text into pieces by regular expressions of its own, each with a name, and merges bytes within the pieces. It
has those of GPT-2 and of Qwen 2, but not Osler's. A tokenizer of Osler's is therefore written with GPT-2's, and the pieces that
GPT-2 would split in two (letters of options, runs of line breaks) become tokens that llama.cpp looks for first
(``USER_DEFINED``). The other pieces that differ hold no merge, so their tokens are the same, except in two cases, which
``write`` reports: letters with combining marks, and letters of options, after a space as in questions, that are no single
token. A tokenizer with other pieces is refused. SuperBPE's is too: its tokens reach across words, which llama.cpp splits apart.

Vectors stay in fp32. For q8_0 and q4_0, a matrix whose rows are no multiple of 32 becomes fp16. With q4_0, embedding and head
become Q8_0. llama.cpp's own ``llama-quantize`` makes K-quants from the fp16 file.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from string import ascii_uppercase
from types import ModuleType
from typing import Any, NamedTuple

import torch

from osler.export.huggingface import Export
from osler.runtime.errors import UserError
from osler.runtime.log import say
from osler.tokenizer.bpe import EOS, PIECES, Tokenizer
from osler.tokenizer.memory import GPT2_PIECES, pieces_of

DTYPES = ("f16", "f32", "bf16", "q8_0", "q4_0")
BLOCK = 32  # weights of Q8_0 and Q4_0 that share a scale
QWEN2_PIECES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS = {GPT2_PIECES: "gpt-2", PIECES: "gpt-2", QWEN2_PIECES: "qwen2"}  # the name of the expression that llama.cpp uses
WHOLE = re.compile(r" ?\([A-Z]\)|\s*[\r\n]+")  # Osler's pieces that GPT-2's expression splits


class Vocabulary(NamedTuple):
    """A tokenizer as llama.cpp has it: ``cut`` names its expression, ``remarks`` say where its tokens differ from training's."""

    cut: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    remarks: list[str]


def write(export: Export, path: Path) -> str:
    """Write model, tokenizer and chat template as one file, and return what it is. Needs the extra ``export``."""
    gguf, config = library(), export.config
    vocabulary = llama_vocabulary(gguf, export.loaded.tokenizer, config.vocab_size)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.QWEN3])
    writer.add_name(f"Osler {config.num_parameters:,}")
    writer.add_description("A research model, not medical advice.")
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    if (yarn := config.rope_scaling) is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(yarn.factor)
        writer.add_rope_scaling_orig_ctx_len(yarn.original_max_seq_len)
        writer.add_rope_scaling_yarn_beta_fast(yarn.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(yarn.beta_slow)
    names = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
    writer.add_file_type(gguf.LlamaFileType[names[export.dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.cut)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add(export.loaded.tokenizer.eos_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(export.chat_template)
    kept = []
    for name, kind, data in tensors(gguf, export):
        writer.add_tensor(name, data, raw_dtype=kind)
        if kind == gguf.GGMLQuantizationType.F16 and export.dtype != "f16":
            kept.append(name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    try:
        writer.write_tensors_to_file()
    except OSError as error:
        if error.errno is None:  # numpy tells how much it could write, not why no more
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise
    writer.close()
    if kept:
        say(f"{len(kept)} matrices, such as {kept[0]}, stay in f16, because their rows are no multiple of {BLOCK}.")
    for remark in vocabulary.remarks:
        say(remark)
    return "GGUF for llama.cpp"


def tensors(gguf: ModuleType, export: Export) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name, type and content of each tensor in llama.cpp's terms; raises UserError for what fp16 cannot hold."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, export.config.num_layers)
    types = gguf.GGMLQuantizationType
    for name, weight in export.weights.items():
        kind = types[export.dtype.upper()]
        if weight.dim() == 1:
            kind = types.F32
        elif kind in (types.Q8_0, types.Q4_0) and weight.shape[1] % BLOCK:
            kind = types.F16
        elif kind == types.Q4_0 and name in ("model.embed_tokens.weight", "lm_head.weight"):
            kind = types.Q8_0
        if kind not in (types.F32, types.BF16) and weight.abs().max() > torch.finfo(torch.float16).max:  # scales are in f16
            raise UserError(f"{name} holds numbers that f16 cannot: use --dtype bf16.")
        data = gguf.quants.quantize(weight.contiguous().numpy(), kind)
        yield names.get_name(name, try_suffixes=(".weight",)), kind, data


def llama_vocabulary(gguf: ModuleType, tokenizer: Tokenizer, vocab_size: int) -> Vocabulary:
    """Return a tokenizer as llama.cpp has it; raises UserError where llama.cpp cannot split text as it does."""
    content, kinds = json.loads(tokenizer.to_bytes()), gguf.TokenType
    pieces = pieces_of(content["pre_tokenizer"] or {})
    normalizer = (content["normalizer"] or {}).get("type")
    if content["model"]["type"] != "BPE" or pieces not in CUTS or normalizer not in (None, "NFC"):
        raise UserError(
            "llama.cpp cannot cut text as this tokenizer does. It knows the cuts of GPT-2 and Qwen 2, and by way of them that of "
            "Osler's BPE, but not that of SuperBPE: `--to hf` and `--to onnx` keep any tokenizer."
        )
    tokens, types = [f"[PAD{number}]" for number in range(vocab_size)], [int(kinds.UNUSED)] * vocab_size
    for token, number in content["model"]["vocab"].items():
        text = tokenizer.decode([number])
        is_whole = pieces == PIECES and len(text) > 1 and WHOLE.fullmatch(text) is not None
        tokens[number], types[number] = (text, int(kinds.USER_DEFINED)) if is_whole else (token, int(kinds.NORMAL))
    for token in content["added_tokens"]:
        # llama.cpp leaves control tokens out of its output, which needs the markers to tell thinking from answer.
        kind = kinds.CONTROL if token["content"] == EOS else kinds.USER_DEFINED
        tokens[token["id"]], types[token["id"]] = token["content"], int(kind)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    remarks = []
    if pieces == PIECES:
        remarks.append(
            "In llama.cpp letters with combining marks (as in Hindi, or an accent that stands by itself) may become other tokens "
            "than in training."
        )
        letters = [f" ({letter})" for letter in ascii_uppercase]  # as questions and answers have them: ``render_option``
        broken = [repr(text) for text in letters if any(len(_gpt2_cut(token)) > 1 for token in _written(tokenizer, text))]
        if broken:
            remarks.append(
                f"There these letters of options are cut into more tokens than in training: {', '.join(broken)}. The model may "
                "answer questions with them worse there; `--to hf` and `--to onnx` cut text as in training."
            )
    if normalizer:
        remarks.append("llama.cpp does not normalise text (NFC) as this tokenizer does.")
    return Vocabulary(CUTS[pieces], tokens, types, merges, remarks)


def _written(tokenizer: Tokenizer, text: str) -> list[str]:
    """Return the text of each token of ``text``; empty where it is one token, which llama.cpp looks for before it splits."""
    ids = tokenizer.encode(text)
    return [tokenizer.decode([number]) for number in ids] if len(ids) > 1 else []


def _gpt2_cut(token: str) -> list[str]:
    """Return the pieces of GPT-2 for a part of `` (A)``, which has brackets apart from the letter."""
    return re.findall(r" ?\(|[A-Z]|\)", token)


def library() -> ModuleType:
    """Return the package ``gguf``; raises UserError where the extra ``export`` is not installed."""
    try:
        import gguf
    except ImportError as error:
        remedy = "pip install -e '.[export]' in Osler's source tree"
        raise UserError(f"GGUF needs a package that is not here ({error}): {remedy}.") from None
    return gguf
