"""A model in the form of Hugging Face's Qwen3, which has the same mathematics: what vLLM, verl and ``transformers`` load.

Norms without a weight are written with ones, a factorized embedding as one matrix, and rows past the vocabulary are left out.
Fields that changed their name in ``transformers`` 5 are written under both names, because an older release takes a default where
it does not find the old name. A sparse model has this form in rows of at most ``top_k`` tokens only.
Shapes: V vocabulary, D hidden, R rank of a factorized embedding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osler.checkpoint.store import write_tensors
from osler.inference.load import TOKENIZER_FILE, load_model
from osler.model.config import DenseAttentionConfig, ModelConfig, SparseAttentionConfig
from osler.model.init import is_of_indexer
from osler.runtime.errors import UserError
from osler.runtime.files import write_atomic
from osler.runtime.log import say
from osler.tokenizer.bpe import ANSWER, EOS, QUESTION, THINKING, Tokenizer

WEIGHTS_FILE = "model.safetensors"
# The prompt of ``tokenizer/chat.py``; ``apply_chat_template(..., reasoning=False)`` leaves the thinking out.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{{% if message['role'] == 'assistant' %}}{{{{ message['content'] + '{EOS}' }}}}"
    f"{{% else %}}{{{{ '{QUESTION}' + message['content'] }}}}{{% endif %}}"
    "{% endfor %}{% if add_generation_prompt %}"
    f"{{{{ '{ANSWER}' if reasoning is defined and not reasoning else '{THINKING}' }}}}{{% endif %}}"
)


def write(checkpoint: str, out: str, max_tokens: int | None = None) -> int:
    """Write a checkpoint's model and tokenizer as a new folder: the command ``export hf``.

    ``max_tokens`` makes the context shorter, which a sparse model needs: see ``dense_form``.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: name a new folder with --out.")
    loaded = load_model(checkpoint)
    longest = loaded.model.config.max_seq_len
    if max_tokens is not None and not 2 <= max_tokens <= longest:
        raise UserError(f"--max-tokens {max_tokens} is not from 2 to {longest}, the context of {loaded.path} (max_seq_len).")
    config = dense_form(loaded.model.config, max_tokens or longest)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS_FILE, qwen3_weights(config, loaded.model.state_dict()))
    for name, content in describing_files(config, loaded.tokenizer).items():
        write_atomic(folder / name, content)
    say(f"{folder}: {config.num_parameters:,} parameters of {loaded.path}, as Qwen3ForCausalLM")
    return 0


def dense_form(config: ModelConfig, max_tokens: int) -> ModelConfig:
    """Return the config of the same model for rows of ``max_tokens``, with dense attention.

    Sparse attention is dense in rows of at most ``top_k`` tokens. Raises UserError for longer ones, which Qwen3 cannot hold.
    """
    if isinstance(config.attention, SparseAttentionConfig) and config.attention.top_k < max_tokens:
        top_k = config.attention.top_k
        raise UserError(
            f"The model has sparse attention, to {top_k} of at most {max_tokens:,} tokens, which Qwen3's form cannot hold. In "
            f"rows of at most {top_k} tokens it is dense attention: `osler export hf ... --max-tokens {top_k}` writes that "
            "model, without its index."
        )
    return replace(config, max_seq_len=max_tokens, attention=DenseAttentionConfig())


def qwen3_config(config: ModelConfig) -> dict[str, Any]:
    """Return the shape of a model as the fields of Qwen3's ``config.json``, without tokens."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if (yarn := config.rope_scaling) is not None:
        rope = {
            "rope_type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_max_seq_len,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
        }
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        **({} if yarn is None else {"rope_scaling": rope}),
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def qwen3_weights(config: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's state dict under Qwen3's names, on the device where it is; raises UserError as ``dense_form`` does."""
    config = dense_form(config, config.max_seq_len)
    named = {name: weight for name, weight in weights.items() if not is_of_indexer(name)}
    embed_VD = named["embed_tokens.weight"]
    if config.embed_rank is not None:
        embed_VD = embed_VD @ named.pop("embed_proj.weight").T  # [V, R] and [R, D]
    named["embed_tokens.weight"] = embed_VD
    ones = torch.ones(config.hidden_size, device=embed_VD.device), torch.ones(config.head_dim, device=embed_VD.device)
    for layer in range(config.num_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            named.setdefault(f"layers.{layer}.{norm}.weight", ones[0])
        for norm in ("q_norm", "k_norm"):
            named.setdefault(f"layers.{layer}.self_attn.{norm}.weight", ones[1])
    named.setdefault("norm.weight", ones[0])
    for name in ("embed_tokens.weight", "lm_head.weight"):
        if name in named:
            named[name] = named[name][: config.vocab_size]
    return {name if name.startswith("lm_head") else f"model.{name}": tensor for name, tensor in named.items()}


def describing_files(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, bytes]:
    """Return the files beside the weights: shape, tokens that end a text, tokenizer and chat template."""
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_id)
    contents: dict[str, dict[str, Any]] = {
        "config.json": qwen3_config(config) | ends,
        "generation_config.json": ends,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **dict.fromkeys(("bos_token", "eos_token", "pad_token"), EOS),
            "model_max_length": config.max_seq_len,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    }
    contents[TOKENIZER_FILE] = json.loads(tokenizer.to_bytes())
    for token in contents[TOKENIZER_FILE]["added_tokens"]:
        token["special"] = token["content"] == EOS  # markers stay in decoded text, where rewards look for them
    files = {name: json.dumps(content, indent=2, ensure_ascii=False).encode() for name, content in contents.items()}
    return {**files, "chat_template.jinja": CHAT_TEMPLATE.encode()}
