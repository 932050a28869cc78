"""How much of the disk a run takes: its shards and its checkpoints. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from osler.data.config import AnySource, ClinicData, FilesData, HubData, PreparedData
from osler.model.config import ModelConfig
from osler.plan.estimate import Estimate, exact, total
from osler.plan.memory import state_bytes
from osler.train.config import TrainConfig

WIDE_VOCABULARY = 1 << 16  # in a larger vocabulary a token takes four bytes instead of two
CLINIC_TOKENS = Estimate(45, 65, 90, "computed: 45 to 90 tokens a document of the clinic")
BYTES_PER_TOKEN = Estimate(3.0, 4.5, 7.0, "assumed: 3 to 7 bytes of a file to a token")


def checkpoint_bytes(model: ModelConfig, optimizer: str, precision: str) -> int:
    """Return the bytes of a checkpoint: weights and moments."""
    weights, _, moments = state_bytes(model, optimizer, precision)
    return weights + moments


def disk_of(config: TrainConfig, model: ModelConfig, tokens: Estimate) -> dict[str, Estimate]:
    """Return the most bytes that shards and checkpoints take in the run folder at any moment."""
    size, keep = checkpoint_bytes(model, config.optim.type, config.precision), config.checkpoint
    saves = [keep.every_tokens, keep.keep_every_tokens, config.evaluation_tokens, config.exam.every_tokens]
    milestones = int(tokens.value // keep.keep_every_tokens) if keep.keep_every_tokens else 0
    return {
        "data": shard_bytes(config, model, tokens),
        "checkpoints": kept_bytes(size, int(tokens.value), saves, keep.keep_last, milestones),
    }


def kept_bytes(size: int, length: int, saves: Sequence[int], keep_last: int, milestones: int) -> Estimate:
    """Return the most bytes of checkpoints of one size in a run of some length.

    ``saves`` are the distances between two checkpoints of each cause (0: none), an evaluation or exam among them. Distances are
    mostly multiples of one another, so the smallest tells how many checkpoints are saved.
    """
    saved = max(1, length // min(filter(None, saves)))
    kept = min(saved, keep_last) + milestones
    source = f"computed: {keep_last} newest, the best and a good one, and one that is being written"
    return Estimate(kept * size, (kept + (saved > keep_last)) * size, (kept + 3) * size, source)


def shard_bytes(config: TrainConfig, model: ModelConfig, tokens: Estimate) -> Estimate:
    """Return the bytes of the shards in the run folder."""
    if isinstance(config.data, PreparedData):
        return exact(0.0, "the shards lie where they are")
    wide = 4 if model.vocab_size > WIDE_VOCABULARY else 2
    everything = total(tokens_of(source).times(wide + has_masks(source)) for source in config.sources.values())
    if config.text is not None and config.text.disk_budget_gb is not None:
        return everything.at_most(config.text.disk_budget_gb * 1e9)
    if config.text is not None and config.text.streaming:
        everything = replace(everything, source=f"{everything.source}; all of it is prepared, also what the run does not reach")
    return everything


def has_masks(source: AnySource) -> bool:
    """Return whether the shards of a source have a loss mask, a byte for each token: questions with answers do, text does not."""
    if isinstance(source, HubData):
        from osler.data.named import SOURCES, conversations, exam, questions, synth

        documents = getattr(SOURCES.get(source.name), "documents", None)
        return getattr(documents, "func", documents) in (conversations, exam, questions, synth)
    return not isinstance(source, FilesData)


def tokens_of(source: AnySource) -> Estimate:
    """Return how many tokens a source has."""
    if isinstance(source, ClinicData):
        return CLINIC_TOKENS.times(source.passages + source.examples + source.cards + source.drills)
    if isinstance(source, HubData) and not Path(source.place).exists():
        from osler.data.named import SOURCES

        known = SOURCES.get(source.name)
        if known is not None and not source.subset:
            size = known.tokens * 1e6
            return Estimate(0.7 * size, size, 1.4 * size, "of the data sets' cards, about")
        if sample := re.search(r"(\d+)BT$", source.subset):
            return exact(float(sample[1]) * 1e9, "of the name of the sample")
        return Estimate(0, 0, 0, f"unknown: how large {source.title} is")
    files = files_bytes(Path(source.place))
    return exact(files).over(BYTES_PER_TOKEN, BYTES_PER_TOKEN.source)


def files_bytes(path: Path) -> float:
    """Return the bytes of a file, or of all files in a folder; 0 where there is none."""
    files = [path] if path.is_file() else path.rglob("*") if path.is_dir() else []
    return float(sum(file.stat().st_size for file in files if file.is_file()))
