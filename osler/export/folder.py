"""A run folder that a command wrote instead of a run: one checkpoint without optimizer, which every reader of models takes.

Its ``state.json`` says under ``made_by`` which command made it, and from what. A run may start from its weights (``init_from``);
``osler/runs/resume.py`` refuses to go on in it, because it has no optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from osler.checkpoint import store
from osler.config.recipe import dump_yaml
from osler.inference.load import CONFIG_FILE, MADE_BY, REASONS, describing_files
from osler.model.config import MODEL_FILE, ModelConfig
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder, appearing, write_atomic, write_json
from osler.tokenizer.bpe import Tokenizer

CARRIED = ("kind", "step", "tokens", "trained_seq_len", REASONS)  # keys of a state that a checkpoint made from it keeps


def write_run(
    folder: Path,
    weights: Mapping[str, Tensor],
    model: ModelConfig,
    tokenizer: Tokenizer,
    state: Mapping[str, Any],
    files: Mapping[str, bytes],
) -> Path:
    """Write the folder, complete or not at all, and return its checkpoint.

    ``state`` needs ``made_by``; ``files`` go into the checkpoint beside the model's config and the tokenizer.
    """
    assert MADE_BY in state
    files = {**files, **describing_files(model, tokenizer)}
    with appearing(folder) as place:
        run = RunFolder.create(place)
        try:
            store.save(run.checkpoints, state.get("step", 0), tensors={"model": weights}, state=state, files=files)
        except store.CheckpointSaveError as error:
            raise UserError(f"{error} Free some of the disk, or name another place.") from error
        write_json(run.notes, [f"Made by {made_in_words(state[MADE_BY])}."])
        write_atomic(run.model, files[MODEL_FILE])
        # Without a config of its training, as in an imported model, it says this much: a run folder has a config.yaml.
        write_atomic(run.config, files.get(CONFIG_FILE) or dump_yaml({MADE_BY: made_in_words(state[MADE_BY])}))
    return store.resolve(folder)


def check_finite(weights: Mapping[str, Tensor], source: object) -> None:
    """Raise UserError for weights that are NaN or infinite: whatever is made of them would write nonsense without a word."""
    for name, weight in weights.items():
        if not bool(weight.isfinite().all()):
            raise UserError(f"{name} of {source} has numbers that are NaN or infinite: take an earlier checkpoint.")


def made_in_words(made_by: Mapping[str, Any]) -> str:
    """Return, for model card and report, which command made a checkpoint, from what, and what it changed."""
    done = [f"weights in {made_by['to']}"] if "to" in made_by else []
    if removed := made_by.get("removed_layers"):
        done.append(f"without layer{'s' * (len(removed) > 1)} {', '.join(map(str, sorted(removed)))} (counted from 0)")
    if "intermediate_size" in made_by:
        done.append(f"with {made_by['intermediate_size']:,} neurons in every feed-forward layer")
    return f"`osler {made_by['command']}` of {Path(made_by['of']).name}" + "".join(f", {each}" for each in done)


def carried(loaded_state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a checkpoint's state that a checkpoint made from it keeps: what it says about the training."""
    return {key: loaded_state[key] for key in CARRIED if key in loaded_state}
