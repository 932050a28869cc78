"""What happened to a run, from its events: alike ones as one group, the newest first.

Events are only ever appended, so a step that was made twice may have an event twice; it counts once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from osler.records.jsonl import END, FAILED, FINISHED, START, Event
from osler.report import format as fmt

GRAVE = ("incident", "rollback", "alert")  # what deserves attention, the gravest first; other kinds are only listed
STEPS_NAMED = 6


@dataclass(frozen=True)
class EventGroup:
    """Events of one kind and name: the steps at which they came, and the time and words of the newest."""

    kind: str
    name: str
    steps: tuple[int, ...]
    time: float
    message: str

    @property
    def weight(self) -> str:
        """How much it matters, as a css class: a failure as much as an incident."""
        if (self.kind, self.name) == (END, FAILED):
            return "incident"
        return self.kind if self.kind in GRAVE else "other"

    @property
    def title(self) -> str:
        kind, name = (re.sub("[_-]", " ", text) for text in (self.kind, self.name))
        kind = kind[:1].upper() + kind[1:]
        return f"{kind}: {name}" if name and name.lower() != kind.lower() else kind

    @property
    def when(self) -> str:
        """`step 120`, or `3 times, at steps 120, 130 and 840`."""
        if len(self.steps) == 1:
            return f"step {self.steps[0]:,}"
        named = [f"{step:,}" for step in self.steps]
        if len(named) > STEPS_NAMED:
            named = [*named[:2], "…", *named[-2:]]
        return f"{fmt.count(len(self.steps))} times, at steps {', '.join(named[:-1])} and {named[-1]}"

    @property
    def clock(self) -> str:
        known = math.isfinite(self.time)
        return datetime.fromtimestamp(self.time).astimezone().strftime("%Y-%m-%d %H:%M") if known else ""

    @property
    def in_words(self) -> str:
        return f"{self.title}, {self.when}: {self.message}"


def grouped(events: Sequence[Event]) -> list[EventGroup]:
    """Return events, oldest first, as groups, the newest first."""
    found: dict[tuple[str, str], list[Event]] = {}
    for event in reversed(events):
        found.setdefault((event.kind, event.name), []).append(event)
    return [
        EventGroup(*key, tuple(sorted({event.step for event in alike})), alike[0].time, alike[0].message)
        for key, alike in found.items()
    ]


def marks_of(events: Sequence[Event]) -> list[tuple[float, str, str]]:
    """Return each step of each group as a mark (step, css class, words) for a chart, which shows start and end by itself."""
    return [
        (step, group.weight, f"{group.title} at step {step:,}")
        for group in grouped(events)
        if (group.kind, group.name) not in ((START, "begun"), (END, FINISHED))
        for step in group.steps
    ]


def grave_in_words(events: Sequence[Event]) -> list[str]:
    """Return a sentence for every group of alerts, incidents, rollbacks and failures, the gravest first."""
    grave = sorted((group for group in grouped(events) if group.weight in GRAVE), key=lambda group: GRAVE.index(group.weight))
    return [group.in_words for group in grave]
