"""What happened to a run, out of its diary `events.jsonl`: alike events as one, the newest first.

The diary is only ever appended to, so a step that was made twice may stand in it twice; it counts once.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from osler.monitor.lifetime import END, FAILED, FINISHED, START
from osler.records.events import Event
from osler.report import format as fmt

GRAVE = ("incident", "rollback", "alert")  # what deserves attention, the gravest first; other kinds are only told
STEPS_NAMED = 6


@dataclass(frozen=True)
class Happening:
    """Events of one kind and name: the steps at which they came, and the newest one's time and words."""

    kind: str
    name: str
    steps: tuple[int, ...]
    time: float
    message: str


def happenings(events: Sequence[Event]) -> list[Happening]:
    """A diary's events, oldest first, as happenings, the newest first."""
    found: dict[tuple[str, str], list[Event]] = {}
    for event in reversed(events):
        found.setdefault((event.kind, event.name), []).append(event)
    return [
        Happening(*key, tuple(sorted({event.step for event in alike})), alike[0].time, alike[0].message)
        for key, alike in found.items()
    ]


def marks_of(events: Sequence[Event]) -> list[tuple[float, str, str]]:
    """Each happening's steps as marks for a chart, but for the edges that the chart itself shows: (step, css class, words)."""
    return [
        (step, _weight(happening), f"{_title(happening)} at step {step:,}")
        for happening in happenings(events)
        if (happening.kind, happening.name) not in ((START, "begun"), (END, FINISHED))
        for step in happening.steps
    ]


def grave_in_words(events: Sequence[Event]) -> list[str]:
    """A sentence for every alert, incident, rollback and failure, the gravest first."""
    grave = sorted((h for h in happenings(events) if _weight(h) in GRAVE), key=lambda h: GRAVE.index(_weight(h)))
    return [in_words(h) for h in grave]


def in_words(h: Happening) -> str:
    """A happening as a sentence."""
    return f"{_title(h)}, {_when(h)}: {h.message}"


def rows(events: Sequence[Event]) -> str:
    """The rows of a table of what happened: what, when, and the words of the newest."""
    out = ""
    for h in happenings(events):
        clock = datetime.fromtimestamp(h.time).astimezone().strftime("%Y-%m-%d %H:%M") if math.isfinite(h.time) else ""
        css = _weight(h)
        out += (
            f'<tr><th scope="row"><i class="event {css}"></i>{html.escape(_title(h))}</th>'
            f'<td data-label="When"><span>{_when(h)}<small>{clock}</small></span></td>'
            f'<td data-label="What"><span>{html.escape(h.message)}</span></td></tr>'
        )
    return out


def _weight(h: Happening) -> str:
    """How much a happening matters, as a css class: a failure as much as an incident."""
    if (h.kind, h.name) == (END, FAILED):
        return "incident"
    return h.kind if h.kind in GRAVE else "told"


def _title(h: Happening) -> str:
    kind, name = (re.sub("[_-]", " ", text) for text in (h.kind, h.name))
    kind = kind[:1].upper() + kind[1:]
    return f"{kind}: {name}" if name and name.lower() != kind.lower() else kind


def _when(h: Happening) -> str:
    """`step 120`, or `3 times, at steps 120, 130 and 840`."""
    if len(h.steps) == 1:
        return f"step {h.steps[0]:,}"
    named = [f"{step:,}" for step in h.steps]
    if len(named) > STEPS_NAMED:
        named = [*named[:2], "…", *named[-2:]]
    return f"{fmt.count(len(h.steps))} times, at steps {', '.join(named[:-1])} and {named[-1]}"
