"""A checkpoint opened for a person to use: the device and precision it computes on, and what its training taught it.

Evaluation and chat treat a model by how it was trained: one that never saw the question-and-answer template can only continue
text. What a checkpoint was trained on is read from the ``config.yaml`` in it; a checkpoint without one, such as an imported
model, counts as trained on text alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from osler.config.yaml12 import load_yaml
from osler.inference.load import LoadedModel, load_model
from osler.runtime.device import pick_device, pick_dtype
from osler.runtime.files import RunFolder

CONFIG_FILE = "config.yaml"
TAUGHT = ("sft", "grpo")  # kinds of training that are all questions and answers


@dataclass(frozen=True)
class ReadyModel(LoadedModel):
    """A loaded model; ``training`` is the config of the run that wrote its checkpoint, empty when that is not known."""

    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The kind of training: pretrain, sft, grpo, or "" when the checkpoint does not say."""
        return str(self.state.get("kind", ""))

    @property
    def answers_questions(self) -> bool:
        """Whether the model was trained on the template of question, thinking and answer."""
        data = self._data
        in_text = data.get("type") == "turns" or (data.get("type") == "clinic" and data.get("examples", 0) > 0)
        return self.kind in TAUGHT or in_text

    @property
    def reasons(self) -> bool:
        """Whether it learned to think before it answers; asked for what it never saw, it writes nonsense."""
        if self._data.get("type") == "turns":
            return self._data.get("thinking_field") is not None
        tasks = self.training.get("tasks") or []
        return bool(tasks[0]["reasoning"]) if tasks else True

    @property
    def knows_clinic(self) -> bool:
        """Whether the run that wrote the checkpoint trained on the clinic's world."""
        tasks = self.training.get("tasks") or []
        return self._data.get("type") == "clinic" or any(entry["task"]["type"] == "clinic" for entry in tasks)

    @property
    def seq_len(self) -> int:
        """The length in tokens of the rows it was trained on; the longest that it allows when that is not known."""
        longest = self.model.config.max_seq_len
        return min(int(self.training.get("seq_len", longest)), longest)

    @property
    def run(self) -> RunFolder | None:
        """The run folder that the checkpoint is in, if any."""
        path = self.path if self.path.parent.parent.name else self.path.resolve()
        folder = RunFolder(path.parent.parent)
        return folder if path.parent == folder.checkpoints and folder.config.is_file() else None

    @property
    def shards(self) -> Path | None:
        """The folder with the shards that it was trained on, where that is known."""
        if self._data.get("type") == "prepared":
            return Path(str(self._data["path"]))
        return self.run.root / "data" if self.run is not None else None

    @property
    def _data(self) -> Mapping[str, Any]:
        data = self.training.get("data")
        return data if isinstance(data, Mapping) else {}

    def describe(self) -> str:
        """Return one line: where it is, how large it is and how it was trained."""
        trained = {"": "", "pretrain": ", pretrained", "sft": ", fine-tuned (sft)"}.get(self.kind, f", trained by {self.kind}")
        return f"{self.path}: {self.model.config.num_parameters:,} parameters{trained}"


def open_model(checkpoint: str | Path, *, device: str = "auto", which: str = "newest") -> ReadyModel:
    """Load a run folder's newest (or best) checkpoint, or the one given, for sampling and scoring.

    It computes in fp32 on a CPU, where eager bf16 is far slower, and in bf16 on a GPU where that is faster. Raises UserError
    when there is no good checkpoint; for a folder with several runs the message names them.
    """
    chosen = pick_device(device)
    dtype = torch.float32 if chosen.type == "cpu" else pick_dtype("auto", chosen)
    loaded = load_model(checkpoint, device=chosen, compute_dtype=dtype, which=which)
    config = loaded.path / CONFIG_FILE
    training = load_yaml(config.read_text(encoding="utf-8"), str(config)) if config.is_file() else None
    return ReadyModel(**vars(loaded), training=training if isinstance(training, Mapping) else {})
