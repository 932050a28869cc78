"""``metrics.jsonl``: what a run measured, one JSON object per line, appended as it trains.

    {"step": 30, "tokens": 122880, "time": 1767225600.123, "train/loss": 3.25, "train/grad_norm": null}

``time`` is in unix seconds; null stands for a value that was not finite. The file is the run's memory of itself, so it must
survive the run: a line reaches the operating system as soon as it is complete, a kill can tear the last line only, and opening
heals that. A disk that refuses a line costs that line and not the run. Resume is exact: the file is cut to the step of the
checkpoint, so a run that is killed and resumed logs each step once.
"""

from __future__ import annotations

import logging
import math
import time as clock
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TextIO

from osler.records import jsonl
from osler.records.values import as_number
from osler.runtime.errors import UserError

logger = logging.getLogger(__name__)

OWN_FIELDS = frozenset(("step", "tokens", "time"))


@dataclass
class MetricsLine:
    """One line: the step, the tokens seen, the time in unix seconds, and the metrics by name; NaN for what was not finite."""

    step: int
    tokens: float
    time: float
    values: dict[str, float]

    @classmethod
    def parse(cls, line: bytes) -> MetricsLine | None:
        """Return a line of the file, None when it is torn or names no step; fields that are no numbers are left out."""
        fields = jsonl.parse(line)
        step = jsonl.step_of(fields)
        if fields is None or step is None:
            return None
        values = {
            name: raw if type(raw) is float and math.isfinite(raw) else as_number(raw)
            for name, raw in fields.items()
            if (raw is None or isinstance(raw, (int, float))) and name not in OWN_FIELDS
        }
        return cls(step, as_number(fields.get("tokens")), as_number(fields.get("time")), values)


def read_metrics(path: Path, having: str = "") -> Iterator[MetricsLine]:
    """Return the whole lines of a file one by one; none when there is no file.

    With ``having`` only the lines with that metric, and no others are parsed. Raises UserError when the file cannot be read.
    """
    wanted = f'"{having}"'.encode() if having else b""
    parsed = (MetricsLine.parse(line) for line in jsonl.read_lines(path) if wanted in line)
    return (line for line in parsed if line is not None and (not having or having in line.values))


class MetricsFile:
    """Appends to ``metrics.jsonl``; after a kill it goes on where the checkpoint left off."""

    def __init__(self, path: str | Path, *, last_step: float = math.inf) -> None:
        """Open ``path`` for appending, without a torn last line and without the lines after ``last_step``.

        ``last_step`` is that of the checkpoint that training continues from; -1 drops every line.
        """
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._last_step = last_step  # until the file has been healed
        self._file: TextIO | None = None
        self._warned = False
        try:
            self._healed()
        except OSError as error:
            self._give_up(error)

    def _healed(self) -> TextIO:
        """Return the open file, without what must not stand in it; one that was given up may end in a torn line."""
        if self._file is None:
            jsonl.heal(self.path, self._last_step)
            self._last_step = math.inf
            self._file = self.path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
        return self._file

    def _give_up(self, error: Exception) -> None:
        self.close()
        if not self._warned:
            self._warned = True
            logger.warning(f"metrics cannot be written to {self.path} ({error}); the run goes on without them until they can.")

    def write(self, step: int, tokens: int, metrics: Mapping[str, float], *, time: float | None = None) -> None:
        """Append one line; ``time`` is now unless it is given.

        Raises ValueError when a metric has the name of one of the line's own fields.
        """
        if taken := OWN_FIELDS & metrics.keys():
            raise ValueError(f"a metric cannot be called {min(taken)!r}: the line itself has a field of that name")
        now = round(clock.time() if time is None else time, 3)
        fields: dict[str, float | None] = {"step": int(step), "tokens": int(tokens), "time": now}
        for name, value in metrics.items():
            number = value if isinstance(value, int) else float(value)
            fields[name] = number if math.isfinite(number) else None
        text = jsonl.to_line(fields)
        try:
            self._healed().write(text)
        except (OSError, UserError) as error:
            self._give_up(error)

    def rewind(self, step: int) -> None:
        """Drop the lines after ``step``: a run that has gone back makes those steps again."""
        self.close()
        self._last_step = step
        try:
            self._healed()
        except (OSError, UserError) as error:
            self._give_up(error)

    def close(self) -> None:
        """Close the file; closing twice is fine, and a line that the disk has refused does not come up again."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.close()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
