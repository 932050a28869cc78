"""``stages.json``: the finished stages of a pipeline of runs, as a quickstart has, in their order."""

from __future__ import annotations

from dataclasses import dataclass

from osler.records.values import NAN


@dataclass(frozen=True)
class FinishedStage:
    """A stage that is done: how long it took, and what it did."""

    name: str = ""
    seconds: float = NAN
    what: str = ""
