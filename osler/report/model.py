"""Which model a run trained: what its checkpoints say, else its configuration.

A run with `init_from` trains the model it started from, so the section `model` of its `config.yaml` says nothing.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from osler.config.decode import decode
from osler.model.config import MODEL_FILE, ModelConfig
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder, read_json


def checkpoint_model(folder: Path) -> dict[str, Any]:
    """Return the model that a run folder's newest readable checkpoint describes, {} without one; all hold the same."""
    for path in sorted(RunFolder(folder).checkpoints.glob(f"step-*/{MODEL_FILE}"), reverse=True):
        try:
            found = find_model(read_json(path))
        except UserError:
            continue
        if found:
            return found
    return {}


def find_model(config: object) -> dict[str, Any]:
    """Return the first mapping inside a configuration that describes its model (`num_layers`, `hidden_size`), or {}."""
    if isinstance(config, dict) and not config.get("init_from"):
        if "num_layers" in config and "hidden_size" in config:
            return config
        return next((found for child in config.values() if (found := find_model(child))), {})
    return {}


def count_parameters(model: dict[str, Any]) -> int | None:
    """Return the number of parameters, None when the description is not that of a model or leaves something open."""
    known = {f.name for f in dataclasses.fields(ModelConfig)}
    try:
        return decode(ModelConfig, {k: v for k, v in model.items() if k in known}).num_parameters
    except UserError:
        return None  # for example a vocabulary size that the tokenizer has yet to decide
