"""A model in the form of Hugging Face's Qwen3, which has the same mathematics: what vLLM, verl and ``transformers`` load.

A norm without weights gets ones, a factorized embedding becomes one matrix, and padding rows of the vocabulary are left out.
Fields that changed their name in ``transformers`` 5 are written under both names, because an older release takes a default where
it does not find the old name. Sparse attention can be written only for rows in which it sees all tokens; a window is a field.
Shapes: V vocabulary, D hidden, R rank of a factorized embedding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osler.checkpoint.folders import CONFIG_JSON
from osler.checkpoint.store import write_tensors
from osler.config.schema import PositiveInt, config, encode
from osler.export.card import card_files
from osler.inference.load import TOKENIZER_FILE, LoadedModel
from osler.model.config import DenseAttentionConfig, ModelConfig
from osler.model.init import is_of_indexer
from osler.runtime.errors import UserError
from osler.tokenizer.bpe import ANSWER, EOS, QUESTION, THINKING

WEIGHTS_FILE = "model.safetensors"
ABOUT = "osler"  # the name of the section ``About``
FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of a layer in config.json
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHAT_TEMPLATE = (
    "{% macro text(message) %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% elif message['content'] %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}{{ raise_exception('This model reads text alone') }}{% endif %}"
    "{% endfor %}{% elif message['role'] == 'user' %}{{ raise_exception('A message of the user has no content') }}{% endif %}"
    "{% if message['tool_calls'] %}{{ raise_exception('This model calls no tools') }}{% endif %}{% endmacro %}"
    "{% for message in messages %}"
    f"{{% if message['role'] == 'user' %}}{QUESTION}{{{{ text(message) }}}}"
    "{% elif message['role'] == 'assistant' %}"
    f"{{% if message['reasoning_content'] %}}{THINKING}{{{{ message['reasoning_content'] }}}}{{% endif %}}"
    f"{ANSWER}{{{{ text(message) }}}}{EOS}"
    "{% else %}{{ raise_exception('This model was taught questions and answers alone, no ' + message['role'] + ' messages') }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}"
)


@config
class About:
    """What Qwen3's fields cannot say of a model: a section of config.json that only ``osler import`` reads."""

    kind: str = ""  # of its training: pretrain, sft or grpo; "": not known
    reasons: bool | None = None  # whether it learned to think before it answers; null: not known
    trained_seq_len: PositiveInt | None = None  # tokens of the longest rows that it learned; null: as many as it reads


@dataclass(frozen=True)
class Export:
    """What to write: the loaded model, its config with dense attention, and a type of weights, as ``--dtype`` names it."""

    loaded: LoadedModel
    config: ModelConfig
    dtype: str

    @property
    def chat_template(self) -> str:
        """The template of ``tokenizer/chat.py`` in Jinja. Its variable ``reasoning`` (a bool) overrides the model's habit."""
        first, other, unless = (THINKING, ANSWER, "not reasoning") if self.loaded.reasons else (ANSWER, THINKING, "reasoning")
        return CHAT_TEMPLATE + f"{{{{ '{other}' if reasoning is defined and {unless} else '{first}' }}}}{{% endif %}}"

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights under Qwen3's names, in fp32."""
        return qwen3_weights(self.config, self.loaded.model.state_dict())


def write(export: Export, folder: Path) -> str:
    """Write model, tokenizer and model card as a new folder, and return the name of its form."""
    folder.mkdir()
    weights = {name: weight.to(DTYPES[export.dtype]) for name, weight in export.weights.items()}
    write_tensors(folder / WEIGHTS_FILE, weights)
    for name, content in {**companion_files(export), **card_files(export.loaded, export.config)}.items():
        (folder / name).write_bytes(content)
    return "Qwen3ForCausalLM"


def standard_form(config: ModelConfig, max_tokens: int, *, windows: bool = False) -> ModelConfig:
    """Return the config of the same model for rows of ``max_tokens``, in which every token attends to all before it.

    In rows of at most ``top_k`` tokens sparse attention does that, and attention with a window in rows that are no longer. A form
    with ``windows`` holds a window in longer rows, too: ``transformers`` has them, llama.cpp and ONNX's operator do not. Raises
    UserError for longer rows, and for value embeddings and a copy head, which Qwen3 cannot hold.
    """
    if config.beyond_qwen3:
        raise UserError(
            f"The model has {' and '.join(config.beyond_qwen3)}, which Qwen3's form cannot hold. Train a model with "
            f"{' '.join(config.beyond_qwen3.values())} to export it; `--to safetensors` writes this one as it is."
        )
    if (tokens := config.attention.keys(config.max_seq_len)) < min(max_tokens, config.max_seq_len):
        if windows and config.window is not None:
            return replace(config, max_seq_len=max_tokens)
        raise UserError(
            f"The model attends to {tokens} of at most {max_tokens:,} tokens, which this form cannot hold. In rows of at most "
            f"{tokens} tokens it attends to all of them: `--max-tokens {tokens}` writes that model, an index is left out. "
            f"`--to {'safetensors' if config.window is None else 'hf'}` writes the model as it is."
        )
    return replace(config, max_seq_len=max_tokens, attention=DenseAttentionConfig())


def qwen3_config(config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Return the shape of a model as the fields of Qwen3's ``config.json``, without token ids."""
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
        "use_sliding_window": config.window is not None,
        **({} if config.window is None else {"sliding_window": config.window, "max_window_layers": 0}),
        "layer_types": [FULL if config.window is None else SLIDING] * config.num_layers,
        **dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch.")),
    }


def qwen3_weights(config: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's state dict under Qwen3's names, on its device; raises UserError as ``standard_form`` does."""
    config = standard_form(config, config.max_seq_len, windows=True)
    named = {name: weight for name, weight in weights.items() if not is_of_indexer(name)}
    embed_VD = named["embed_tokens.weight"]
    if config.embed_rank is not None:
        embed_VD = embed_VD @ named.pop("embed_proj.weight").T  # [V, R] and [R, D]
    named["embed_tokens.weight"] = embed_VD
    ones_D, ones_H = (torch.ones(size, device=embed_VD.device) for size in (config.hidden_size, config.head_dim))
    for layer in range(config.num_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            named.setdefault(f"layers.{layer}.{norm}.weight", ones_D)
        for norm in ("q_norm", "k_norm"):
            named.setdefault(f"layers.{layer}.self_attn.{norm}.weight", ones_H)
    named.setdefault("norm.weight", ones_D)
    for name in ("embed_tokens.weight", "lm_head.weight"):
        if name in named:
            named[name] = named[name][: config.vocab_size]
    return {name if name.startswith("lm_head") else f"model.{name}": tensor for name, tensor in named.items()}


def companion_files(export: Export) -> dict[str, bytes]:
    """Return the files that go beside the weights: config, special tokens, tokenizer and chat template."""
    config, loaded = export.config, export.loaded
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), loaded.tokenizer.eos_id)
    trained = min(loaded.model.trained_seq_len, config.max_seq_len)
    about = {ABOUT: encode(About(kind=loaded.kind, reasons=loaded.reasons, trained_seq_len=trained))}
    contents: dict[str, dict[str, Any]] = {
        CONFIG_JSON: qwen3_config(config, DTYPES.get(export.dtype, torch.float32)) | ends | about,
        "generation_config.json": ends,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **dict.fromkeys(("bos_token", "eos_token", "pad_token"), EOS),
            "model_max_length": config.max_seq_len,
            "clean_up_tokenization_spaces": False,
            "chat_template": export.chat_template,
        },
    }
    contents[TOKENIZER_FILE] = json.loads(loaded.tokenizer.to_bytes())
    for token in contents[TOKENIZER_FILE]["added_tokens"]:
        token["special"] = token["content"] == EOS  # markers stay in decoded text, where rewards look for them
    files = {name: json.dumps(content, indent=2, ensure_ascii=False).encode() for name, content in contents.items()}
    return {**files, "chat_template.jinja": export.chat_template.encode()}
