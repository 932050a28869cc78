"""From a checkpoint on disk to a model with its tokenizer, for evaluation, chat, GRPO and export."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from osler.checkpoint import store
from osler.config.decode import decode
from osler.config.schema import encode
from osler.model.config import MODEL_FILE, ModelConfig
from osler.model.transformer import Transformer
from osler.runtime.errors import UserError
from osler.tokenizer.bpe import Tokenizer

TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class LoadedModel:
    """A model with the tokenizer it was trained with; ``state`` is what the trainer recorded (step, tokens, kind ...)."""

    path: Path
    model: Transformer
    tokenizer: Tokenizer
    state: dict[str, Any]


def describing_files(model: ModelConfig, tokenizer: Tokenizer) -> dict[str, bytes]:
    """Return the files that make a checkpoint describe itself; every trainer puts them beside the weights."""
    return {MODEL_FILE: json.dumps(encode(model), indent=2).encode(), TOKENIZER_FILE: tokenizer.to_bytes()}


def load_model(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype = torch.float32,
    which: str = "newest",
) -> LoadedModel:
    """Load the model of a checkpoint, a checkpoints folder or a run folder (its newest good or best checkpoint).

    Raises UserError when there is none, when it is damaged, or when it does not say what model it holds.
    """
    loaded = store.load(store.resolve(path, which), names=["model"])
    config = described_model(loaded)
    tokenizer = tokenizer_of(loaded)
    model = Transformer(config, compute_dtype=compute_dtype)
    model.load_state_dict(loaded.tensors["model"])
    return LoadedModel(loaded.path, model.to(device).eval(), tokenizer, loaded.state)


def read_model_config(path: str | Path) -> tuple[Path, ModelConfig]:
    """Return the checkpoint that ``load_model`` would take and the shape of its model, without reading the weights.

    Raises UserError where ``load_model`` does.
    """
    loaded = store.load(store.resolve(path), names=[])
    return loaded.path, described_model(loaded)


def tokenizer_of(loaded: store.Loaded) -> Tokenizer:
    """Return the tokenizer in a checkpoint that describes itself."""
    return Tokenizer.from_bytes(loaded.files[TOKENIZER_FILE], name=str(loaded.path / TOKENIZER_FILE))


def described_model(loaded: store.Loaded) -> ModelConfig:
    """Return the shape of the model in a checkpoint. Raises UserError when the checkpoint does not describe itself."""
    missing = [name for name in (MODEL_FILE, TOKENIZER_FILE) if name not in loaded.files]
    if missing:
        raise UserError(f"Checkpoint {loaded.path} lacks {' and '.join(missing)}, so it does not say what model it holds.")
    return decode(ModelConfig, json.loads(loaded.files[MODEL_FILE]), source=str(loaded.path / MODEL_FILE))
