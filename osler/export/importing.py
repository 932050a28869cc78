"""A published Qwen3 model as a run folder, to fine-tune, tune with GRPO and examine: the command ``import``.

Weights are taken over exactly: bf16 and fp16 become fp32, which holds every number of theirs. Norms whose weights are all one
become the norms without weights that ``huggingface.py`` writes as ones. A field that Osler's model cannot compute is refused by
name, because a model that nearly fits would give wrong answers without any error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from osler.checkpoint.folders import CONFIG_JSON, is_checkpoint
from osler.checkpoint.store import read_tensors
from osler.config.schema import decode
from osler.export.folder import check_finite, write_run
from osler.export.huggingface import ABOUT, FULL, SLIDING, WEIGHTS_FILE, About
from osler.inference.load import MADE_BY, REASONS, TOKENIZER_FILE, LoadedModel, device_to_use
from osler.model.config import ModelConfig
from osler.model.transformer import Transformer
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder, new_path, read_json
from osler.runtime.log import say
from osler.tokenizer.bpe import EOS, SPECIALS, Tokenizer

INDEX_FILE = f"{WEIGHTS_FILE}.index.json"  # says which file has each tensor, where there are several
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TAKEN = {  # fields of config.json that decide what a model computes, each with the values that Osler's model has
    "model_type": ("qwen3",),
    "attention_bias": (False, None),
    "hidden_act": ("silu",),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
}
SIZES = {  # fields of a ModelConfig, and their names in config.json
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}
YARN = {  # the same for a YarnConfig
    "factor": "factor",
    "original_max_seq_len": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
}


class Imported(NamedTuple):
    """A folder of Hugging Face's in Osler's form; ``remarks`` say what was changed in the tokenizer."""

    config: ModelConfig
    weights: dict[str, Tensor]
    tokenizer: Tokenizer
    state: dict[str, Any]
    remarks: list[str]


def run(folder: str, run_dir: str) -> int:
    """Write a folder of Hugging Face's as a run folder; raises UserError for what Osler's model cannot hold."""
    out = new_path(run_dir, "--run")
    config, weights, tokenizer, state, remarks = read_folder(Path(folder))
    write_run(out, weights, config, tokenizer, state, {})
    say("\n".join([f"{out}: {config.num_parameters:,} parameters of {folder}", *remarks]))
    if state["kind"] not in ("sft", "grpo"):
        say(f"It has not learned questions and answers in Osler's form: `osler sft init_from={out}` teaches them.")
    return 0


def open_folder(folder: str | Path, *, device: str = "auto") -> LoadedModel:
    """Load a folder of Hugging Face's to use it as it is; raises UserError for what Osler's model cannot hold."""
    config, weights, tokenizer, state, _ = read_folder(Path(folder))
    chosen, dtype = device_to_use(device)
    model = Transformer(config, compute_dtype=dtype)
    model.load_state_dict(weights)
    model.trained_seq_len = state["trained_seq_len"]
    return LoadedModel(Path(folder), model.to(chosen).eval(), tokenizer, state)


def read_folder(source: Path) -> Imported:
    """Read a folder of Hugging Face's; raises UserError for what Osler's model cannot hold."""
    if not (source / CONFIG_JSON).is_file():
        raise UserError(f"{source} {why_no_folder(source)}")
    described = read_object(source / CONFIG_JSON)
    config = model_config(described, str(source / CONFIG_JSON))
    tokenizer, remarks = fitting_tokenizer(source, described, config)
    config, weights = model_weights(config, read_weights(source))
    check_finite(weights, source)
    if tokenizer.vocab_size > config.vocab_size:
        config, weights = with_rows(config, weights, tokenizer.vocab_size)
    about = decode(About, described.get(ABOUT) or {}, source=f"{source / CONFIG_JSON}: {ABOUT}")
    state = {
        "kind": about.kind,
        **({} if about.reasons is None else {REASONS: about.reasons}),
        "trained_seq_len": min(about.trained_seq_len or config.max_seq_len, config.max_seq_len),
        MADE_BY: {"command": "import", "of": str(source.resolve())},
    }
    return Imported(config, weights, tokenizer, state, remarks)


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds a mapping; raises UserError for anything else."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object, so it is not what its name says: download it again.")
    return content


def section_of(described: Mapping[str, Any], name: str, source: str) -> dict[str, Any]:
    """Return a section of ``config.json``, empty where there is none; raises UserError for one that is no mapping."""
    section = described.get(name) or {}
    if not isinstance(section, dict):
        raise UserError(f"{source}: {name} should be a mapping, and is {section!r}.")
    return section


def why_no_folder(path: Path) -> str:
    """Return why a path is no folder of Hugging Face's and what to do; the words follow the path in a sentence."""
    if is_checkpoint(path) or RunFolder(path).checkpoints.is_dir():
        return "is Osler's own, which needs no import: every command takes it as it is, init_from= too."
    if path.is_file():
        return f"is a file, and a folder is needed, with {CONFIG_JSON} in it: `osler export RUN --to hf` writes one."
    if path.is_dir():
        return f"has no {CONFIG_JSON}, which says what model it holds: give the folder that has it beside the weights."
    return (
        "does not exist. A published model is downloaded first, such as by `hf download Qwen/Qwen3-0.6B-Base --local-dir "
        "Qwen3-0.6B-Base` (pip install huggingface_hub), and then the folder is given."
    )


def window_of(described: Mapping[str, Any], source: str) -> Any:
    """Return the window of all layers, or None; raises UserError where only some layers have one."""
    has_window = bool(described.get("use_sliding_window"))
    kind, layers = SLIDING if has_window else FULL, described.get("layer_types") or []
    if not isinstance(layers, list) or any(given != kind for given in layers):
        raise UserError(f"{source}: layer_types has more than {kind}; in Osler's model all layers or none have a window.")
    if not has_window:
        return None
    if not layers and described.get("max_window_layers") != 0:
        raise UserError(f"{source}: max_window_layers is not 0, so some layers have no window; Osler's model has it in all.")
    if described.get("sliding_window") is None:
        raise UserError(f"{source} lacks sliding_window, which use_sliding_window needs.")
    return described["sliding_window"]


def model_config(described: Mapping[str, Any], source: str) -> ModelConfig:
    """Return the shape of the model that a ``config.json`` describes; raises UserError that names the field."""
    for name, values in TAKEN.items():
        if (given := described.get(name)) not in values:
            raise UserError(
                f"{source}: {name} is {given!r}, and Osler's model has {values[0]!r}. It imports models of the class Qwen3 "
                "(Qwen3-0.6B to 32B and what is fine-tuned from them), and not quantised."
            )
    window = window_of(described, source)
    missing = [name for name in SIZES.values() if described.get(name) is None]
    if missing:
        raise UserError(f"{source} lacks {', '.join(missing)}: save the model again with transformers, which writes every field.")
    rope = rope_of(described, source)
    fields = {ours: described[theirs] for ours, theirs in SIZES.items()} | rope
    fields |= {"norm_weight": True, "qk_norm_weight": True, "tie_embeddings": bool(described.get("tie_word_embeddings"))}
    fields["attention"] = {"window": window}
    return decode(ModelConfig, fields | {"head_init": "normal", "residual_init": "scaled"}, source=source)


def rope_of(described: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return ``rope_theta`` and ``rope_scaling`` of a model, which transformers 5 and older releases write differently."""
    newer, older = (section_of(described, name, source) for name in ("rope_parameters", "rope_scaling"))
    scaling = {name: value for name, value in (older or newer).items() if value is not None}
    thetas = [place["rope_theta"] for place in (described, newer, older) if place.get("rope_theta") is not None]
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    if not thetas:
        raise UserError(f"{source} names no rope_theta, neither by itself nor in rope_parameters.")
    if any(theta != thetas[0] for theta in thetas):
        raise UserError(f"{source} has rope_theta {' and '.join(map(str, thetas))}, and only one of them can be meant.")
    if kind not in ("default", "yarn"):
        raise UserError(f"{source}: RoPE of the type {kind!r} is none of Osler's, which are 'default' and 'yarn'.")
    known = ("rope_theta", "type", *(YARN.values() if kind == "yarn" else ()))
    same = (("truncate", True), ("partial_rotary_factor", 1.0))  # as Osler does
    strange = [f"{name}={value}" for name, value in scaling.items() if name not in known and (name, value) not in same]
    if strange:
        raise UserError(f"{source}: Osler's RoPE of the type {kind!r} has no {', '.join(strange)}, so it would differ.")
    found: dict[str, Any] = {"rope_theta": thetas[0], "rope_scaling": None}
    if kind == "yarn":
        scaling.setdefault("original_max_position_embeddings", described["max_position_embeddings"])
        found["rope_scaling"] = {"type": "yarn", **{ours: scaling[theirs] for ours, theirs in YARN.items() if theirs in scaling}}
    return found


def fitting_tokenizer(source: Path, described: Mapping[str, Any], config: ModelConfig) -> tuple[Tokenizer, list[str]]:
    """Return the folder's tokenizer with the special tokens of ``tokenizer/chat.py``, and remarks on what was changed in it."""
    path = source / TOKENIZER_FILE
    if not path.is_file():
        raise UserError(
            f"{source} has no {TOKENIZER_FILE}. Where there is another form of tokenizer, "
            "`transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)` writes it."
        )
    loaded = Tokenizer.load(path)
    if loaded.vocab_size > config.vocab_size:
        raise UserError(
            f"{path} has {loaded.vocab_size:,} tokens and the model only {config.vocab_size:,} (vocab_size), so they do not "
            "belong together: take both from the same place."
        )
    content, remarks = json.loads(loaded.to_bytes()), []  # has every field, and the ids that the library gives
    present = {token["content"]: token for token in content["added_tokens"]}
    ends = read_object(source / "generation_config.json") if (source / "generation_config.json").is_file() else {}
    end_ids = next((ids for place in (ends, described) if (ids := place.get("eos_token_id")) is not None), None)
    end_ids = end_ids if isinstance(end_ids, list) else [end_ids]
    if EOS not in present and EOS not in content["model"]["vocab"]:
        added = (token for token in content["added_tokens"] if token["content"] not in SPECIALS)
        own = next((token for token in added if token["id"] in end_ids), None)
        if own is None:
            raise UserError(
                f"{path} has no {EOS}, and no added token of it is the model's eos_token_id ({end_ids}), so nothing would end "
                "an answer: give eos_token_id in config.json."
            )
        remarks.append(f"{own['content']}, which ends its texts, is called {EOS} from here on.")
        if own["content"] in (vocab := content["model"]["vocab"]):
            vocab[EOS] = vocab.pop(own["content"])
        own["content"] = EOS
    tokenizer = Tokenizer.from_bytes(json.dumps(content).encode(), name=str(path)).with_specials()
    new = [f"{name} ({tokenizer.special_id(name)})" for name in SPECIALS if name not in present and name != EOS]
    if new:
        remarks.append(f"Special tokens that it did not have and has not learned: {', '.join(new)}.")
    return tokenizer, remarks


def read_weights(source: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the fp32 tensor of each weight in the safetensors files of a folder, one file at a time."""
    if (source / INDEX_FILE).is_file() and (source / WEIGHTS_FILE).is_file():
        raise UserError(f"{source} has both {WEIGHTS_FILE} and {INDEX_FILE}, of other weights perhaps: remove the older one.")
    if (source / INDEX_FILE).is_file():
        index = read_object(source / INDEX_FILE).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
            raise UserError(f"{source / INDEX_FILE} does not say which file has which weight (weight_map): download it again.")
        files = sorted(set(index.values()))
    elif (source / WEIGHTS_FILE).is_file():
        index, files = None, [WEIGHTS_FILE]
    else:
        raise UserError(
            f"{source} has neither {WEIGHTS_FILE} nor {INDEX_FILE}. Weights in another form (pytorch_model.bin, GGUF) become "
            "safetensors with `transformers.AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)`."
        )
    for name in files:
        if Path(name).name != name or not (source / name).is_file():
            raise UserError(f"{source / INDEX_FILE} names {name}, which is not there: download it too.")
        for tensor_name, tensor in read_tensors(source / name).items():
            if tensor.dtype not in FLOATS:
                raise UserError(f"{source / name}: {tensor_name} is {tensor.dtype}; Osler imports fp32, bf16 and fp16 weights.")
            if index is None or index.get(tensor_name) == name:
                yield tensor_name, tensor.float()


def model_weights(config: ModelConfig, found: Iterator[tuple[str, Tensor]]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the config and the state dict of a model with these weights; raises UserError where some are missing or unknown."""
    named: dict[str, Tensor] = {}
    for full_name, tensor in found:
        if (name := full_name.removeprefix("model.")) in named:
            raise UserError(f"{name} is there twice, with and without `model.` before it: remove the one that is not meant.")
        if not name.endswith("rotary_emb.inv_freq"):
            named[name] = tensor
    with torch.device("meta"):
        wanted = Transformer(config).state_dict()
    head = named.pop("lm_head.weight", None) if config.tie_embeddings else None
    if head is not None and not torch.equal(head, named.setdefault("embed_tokens.weight", head)):  # some keep the head alone
        raise UserError("tie_word_embeddings is true, and lm_head.weight is not model.embed_tokens.weight: set it to false.")
    if missing := sorted(wanted.keys() - named.keys()):
        raise UserError(f"{len(missing)} weights are missing, such as {missing[0]}: the model is not whole, or not a Qwen3.")
    if strange := sorted(named.keys() - wanted.keys()):
        raise UserError(f"{len(strange)} weights have no place in a Qwen3, such as {strange[0]}: merge adapters before.")
    for name, tensor in named.items():
        rows = (config.vocab_size,) if name in ("embed_tokens.weight", "lm_head.weight") else wanted[name].shape[:1]
        shape = (*rows, *wanted[name].shape[1:])
        if tensor.shape != shape:
            raise UserError(f"{name} is {tuple(tensor.shape)}, and by config.json it would be {shape}.")
    for name in ("embed_tokens.weight", "lm_head.weight"):
        if name in named:
            named[name] = padded(named[name], config)
    return without_ones(config, named)


def without_ones(config: ModelConfig, named: dict[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Leave out norm weights that are all one: those of QK-norm by themselves, those of all norms only together."""
    norms = [name for name in named if name.endswith("norm.weight")]
    of_qk = [name for name in norms if name.endswith(("q_norm.weight", "k_norm.weight"))]
    if all(bool((named[name] == 1).all()) for name in of_qk):
        config = replace(config, qk_norm_weight=False)
        if all(bool((named[name] == 1).all()) for name in norms):
            config = replace(config, norm_weight=False)
    dropped = {*([] if config.qk_norm_weight else of_qk), *([] if config.norm_weight else norms)}
    return config, {name: tensor for name, tensor in named.items() if name not in dropped}


def with_rows(config: ModelConfig, named: dict[str, Tensor], vocab_size: int) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Add rows up to ``vocab_size`` for new tokens: the mean of the other rows, which stands for no word in particular."""
    before, config = config.vocab_size, replace(config, vocab_size=vocab_size)
    for name in ("embed_tokens.weight", "lm_head.weight"):
        if name in named:
            rows = named[name][:before]
            named[name] = padded(torch.cat([rows, rows.mean(0, keepdim=True).expand(vocab_size - before, -1)]), config)
    return config, named


def padded(rows: Tensor, config: ModelConfig) -> Tensor:
    """Return the rows of the vocabulary followed by rows of zeros, up to ``padded_vocab_size``."""
    return torch.nn.functional.pad(rows, (0, 0, 0, config.padded_vocab_size - len(rows)))
