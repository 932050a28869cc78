"""``samples.jsonl``: what a run's checkpoints answered to a few questions, one JSON object per line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from osler.records import jsonl
from osler.records.values import from_json


@dataclass(frozen=True)
class SampledAnswer:
    """One question and what one checkpoint answered to it."""

    id: str = ""  # of the question
    stage: str = ""  # label of the checkpoint
    question: str = ""
    options: list[str] = field(default_factory=list)
    thinking: str = ""
    answer: str = ""
    correct_answer: str = ""
    correct: bool | None = None  # None: nobody judged it


def read_samples(path: Path) -> tuple[list[SampledAnswer], int]:
    """Return the answers of a file, and how many of its lines before the last are unreadable."""
    rows, unreadable = jsonl.read(path)
    return [from_json(SampledAnswer, {**row, "id": row.get("id") or row.get("question")}) for row in rows], unreadable
