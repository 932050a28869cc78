"""Loads a model with its tokenizer from a checkpoint, and finds out what it was trained to do.

A model that never saw the question-and-answer template can only continue text, so evaluation and chat ask the ``config.yaml`` in
the checkpoint. Without that file, as in an imported model, the model counts as trained on text alone.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from osler.checkpoint import store
from osler.config.recipe import load_yaml
from osler.config.schema import decode, encode
from osler.model.config import MODEL_FILE, ModelConfig
from osler.model.quantization import dequantize_weights
from osler.model.transformer import Transformer
from osler.runtime.device import pick_device, pick_dtype
from osler.runtime.errors import UserError
from osler.runtime.files import DATA_MANIFEST, RunFolder, read_json
from osler.tasks.needle import Context
from osler.tokenizer.bpe import Tokenizer

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "config.yaml"
# Keys of a checkpoint's state
REASONS = "reasons"  # in an imported one, which has no config: whether the model thinks before it answers
MADE_BY = "made_by"  # in one without optimizer: the command that made it, and what it was made from
QUANTIZED = "quantized"  # in a quantised one: bits and group_size


def teaches_reasoning(training: Mapping[str, Any]) -> bool:
    """Return whether a run with this config, as plain values, teaches a model to think before it answers."""
    data, tasks = training.get("data") or {}, training.get("tasks") or []
    if data.get("type") == "turns":
        return data.get("thinking_field") is not None
    return bool(tasks[0]["reasoning"] if tasks else data.get("reasoning", True))


def types_of(data: Mapping[str, Any]) -> set[str]:
    """Return the type of a run's data; of shards, those of what they were made of, where that is known."""
    if data.get("type") != "prepared" or not (manifest := Path(data["path"], DATA_MANIFEST)).is_file():
        return {data.get("type", "")}
    sources = read_json(manifest).get("sources", {}).values()
    return {source["about"].get("config", {}).get("type", "") for source in sources}


@dataclass(frozen=True)
class LoadedModel:
    """A model with the tokenizer it was trained with; ``state`` is what the trainer recorded (step, tokens, kind ...).

    ``training`` is the config of the run that wrote the checkpoint, empty when that is not known.
    """

    path: Path
    model: Transformer
    tokenizer: Tokenizer
    state: dict[str, Any]
    training: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)  # in the checkpoint, beside tensors and state

    @property
    def _data(self) -> Mapping[str, Any]:
        return self.training.get("data") or {}

    @property
    def kind(self) -> str:
        """The kind of training: pretrain, sft, grpo, or "" when the checkpoint does not say."""
        return str(self.state.get("kind", ""))

    @property
    def quantized(self) -> str:
        """What the weights are kept in, int8 or int4, or "" for weights in full."""
        return quantized_in(self.state)

    @property
    def answers_questions(self) -> bool:
        """Whether the model was trained on the template of question, thinking and answer."""
        data_type, examples = self._data.get("type"), self._data.get("examples", 0)
        return self.kind in ("sft", "grpo") or data_type == "turns" or (data_type == "clinic" and examples > 0)

    @property
    def reasons(self) -> bool:
        """Whether the model learned to think before it answers; a model that did not would write nonsense."""
        return bool(self.state.get(REASONS, teaches_reasoning(self.training)))

    @property
    def knows_clinic(self) -> bool:
        """Whether the run that wrote the checkpoint trained on the clinic's world, perhaps from shards of the clinic alone."""
        tasks = self.training.get("tasks") or []
        return types_of(self._data) == {"clinic"} or any(entry["task"].get("type") == "clinic" for entry in tasks)

    @property
    def run(self) -> RunFolder | None:
        """The run folder that the checkpoint is in, if any."""
        path = self.path if self.path.parent.parent.name else self.path.resolve()
        folder = RunFolder(path.parent.parent)
        return folder if path.parent == folder.checkpoints and folder.config.is_file() else None

    @property
    def shards(self) -> Path | None:
        """The folder with the shards that the model was trained on; None where that is not known."""
        in_run = None if self.run is None else self.run.root / "data"
        return Path(self._data["path"]) if self._data.get("type") == "prepared" else in_run

    def context(self, new_tokens: int = 0, *, template: bool = True) -> Context:
        """Return the room that the model has for a prompt and ``new_tokens`` after it, and the tokenizer that counts them."""
        return Context(self.tokenizer, self.model.config.max_seq_len, new_tokens, template)

    def describe(self) -> str:
        """Return one line: where the model is, how large it is and how it was trained."""
        trained = {"": "", "pretrain": ", pretrained", "sft": ", fine-tuned (sft)"}.get(self.kind, f", trained by {self.kind}")
        kept = f", quantised to {self.quantized}" if self.quantized else ""
        return f"{self.path}: {self.model.config.num_parameters:,} parameters{trained}{kept}"


def describing_files(model: ModelConfig, tokenizer: Tokenizer) -> dict[str, bytes]:
    """Return the files that make a checkpoint describe itself; every trainer saves them next to the weights."""
    return {MODEL_FILE: json.dumps(encode(model), indent=2).encode(), TOKENIZER_FILE: tokenizer.to_bytes()}


def load_model(
    path: str | Path, *, device: torch.device | str = "cpu", compute_dtype: torch.dtype = torch.float32, which: str = "newest"
) -> LoadedModel:
    """Load the model of a checkpoint, or of a run's newest good or best checkpoint; raises UserError where that is impossible."""
    loaded = store.load(store.resolve(path, which), names=["model"])
    config, tokenizer = described_model(loaded), tokenizer_of(loaded)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"Checkpoint {loaded.path}: its tokenizer has {tokenizer.vocab_size:,} tokens and its model only "
            f"{config.vocab_size:,}, so they do not belong together: put back the {TOKENIZER_FILE} that it was trained with."
        )
    model = Transformer(config, compute_dtype=compute_dtype)
    weights = loaded.tensors["model"]
    if QUANTIZED in loaded.state:
        weights = dequantize_weights(weights, model.state_dict(), loaded.state[QUANTIZED]["group_size"])
    model.load_state_dict(weights)
    model.trained_seq_len = trained_seq_len_of(loaded)
    return LoadedModel(loaded.path, model.to(device).eval(), tokenizer, loaded.state, training_of(loaded), loaded.files)


def open_model(checkpoint: str | Path, *, device: str = "auto", which: str = "newest") -> LoadedModel:
    """Load a model for a person to use."""
    chosen, dtype = device_to_use(device)
    return load_model(checkpoint, device=chosen, compute_dtype=dtype, which=which)


def device_to_use(device: str) -> tuple[torch.device, torch.dtype]:
    """Return device and dtype of a model in use: bf16 on a GPU where that pays, fp32 on a CPU, where eager bf16 is far slower."""
    chosen = pick_device(device)
    return chosen, torch.float32 if chosen.type == "cpu" else pick_dtype("auto", chosen)


def load_start(path: str | Path, names: Collection[str] = ()) -> store.Loaded:
    """Load the checkpoint from whose weights something new is to be made, with the groups of tensors ``names``.

    Raises UserError for a quantised one: its weights are rounded, and steps of training would be lost in the rounding.
    """
    loaded = store.load(store.resolve(path), names=names)
    if kept := quantized_in(loaded.state):
        raise UserError(
            f"{loaded.path} has weights in {kept}, which can be used but not trained, pruned or quantised again. Take the "
            f"checkpoint that it was made of, {loaded.state[MADE_BY]['of']}, and quantise what comes of it."
        )
    return loaded


def quantized_in(state: Mapping[str, Any]) -> str:
    """Return what the weights of a checkpoint with this state are kept in, int8 or int4, or "" for weights in full."""
    return f"int{state[QUANTIZED]['bits']}" if QUANTIZED in state else ""


def tokenizer_of(loaded: store.Loaded) -> Tokenizer:
    """Return the tokenizer in a checkpoint that describes itself."""
    return Tokenizer.from_bytes(loaded.files[TOKENIZER_FILE], name=str(loaded.path / TOKENIZER_FILE))


def trained_seq_len_of(loaded: store.Loaded) -> int:
    """Return the tokens of the longest rows that the model of a checkpoint was trained on; where unknown, its ``max_seq_len``."""
    longest = described_model(loaded).max_seq_len  # a checkpoint without the number has that of its own run
    return int(loaded.state.get("trained_seq_len") or min(training_of(loaded).get("seq_len", longest), longest))


def training_of(loaded: store.Loaded) -> Mapping[str, Any]:
    """Return the config of the run that wrote a checkpoint, as plain values; empty where the checkpoint does not say."""
    return load_yaml(loaded.files.get(CONFIG_FILE, b"").decode(), str(loaded.path / CONFIG_FILE)) or {}


def described_model(loaded: store.Loaded) -> ModelConfig:
    """Return the shape of the model in a checkpoint. Raises UserError when the checkpoint does not describe itself."""
    missing = [name for name in (MODEL_FILE, TOKENIZER_FILE) if name not in loaded.files]
    if missing:
        raise UserError(f"Checkpoint {loaded.path} lacks {' and '.join(missing)}, so it does not say what model it holds.")
    return decode(ModelConfig, json.loads(loaded.files[MODEL_FILE]), source=str(loaded.path / MODEL_FILE))
