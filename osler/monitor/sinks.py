"""Where metrics go: `metrics.jsonl`, one JSON object per line, appended as training runs.

The file is the run's memory of itself, so it must survive the run: a line reaches the operating system as soon as it
is complete, a kill can tear the last line only, and opening heals that. A disk that refuses a line costs that line and not
the run. Resume is exact: the trainer names the step
of the checkpoint it starts from and the sink drops the lines after it, so a killed and resumed run logs each step once.
"""

from __future__ import annotations

import json
import logging
import math
import time as clock
from collections.abc import Mapping
from contextlib import suppress
from itertools import compress
from pathlib import Path
from types import TracebackType
from typing import TextIO

from osler.errors import UserError
from osler.runtime.files import write_atomic

logger = logging.getLogger(__name__)

RESERVED = ("step", "tokens", "time", "stage")


class JsonlSink:
    """Appends metrics to a JSON-lines file; after a kill it goes on where the checkpoint left off."""

    def __init__(self, path: str | Path, *, resume_step: int | None = None, stage: str | None = None) -> None:
        """Open `path` for appending, healing a torn last line.

        resume_step: step of the checkpoint that training continues from; lines of later steps are dropped. -1 drops
        every line (start over in the same folder), None keeps every whole line. stage: written on each line.
        """
        self.path = Path(path)
        self.stage = stage
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._drop_after = resume_step  # until the file has been healed
        self._file: TextIO | None = None
        self._warned = False
        try:
            self._healed()
        except OSError as error:
            self._give_up(error)

    def _healed(self) -> TextIO:
        """The open file, without what must not stand in it; one that was given up may end in a piece of a line."""
        if self._file is None:
            _heal(self.path, self._drop_after)
            self._drop_after = None
            self._file = self.path.open("a", encoding="utf-8", buffering=1)
        return self._file

    def _give_up(self, error: Exception) -> None:
        self.close()
        if not self._warned:
            self._warned = True
            logger.warning(f"metrics cannot be written to {self.path} ({error}); the run goes on without them until they can.")

    def write(self, step: int, tokens: int, metrics: Mapping[str, float], *, time: float | None = None) -> None:
        """Append one line: step, tokens seen, unix seconds (now by default), and the metrics.

        A value that is not finite is written as null, which the report shows as a gap. Raises ValueError when a
        metric takes the name of one of the line's own fields.
        """
        line: dict[str, object] = {"step": int(step), "tokens": int(tokens)}
        line["time"] = round(clock.time() if time is None else time, 3)
        if self.stage is not None:
            line["stage"] = self.stage
        for name, value in metrics.items():
            if name in RESERVED:
                raise ValueError(f"a metric cannot be called {name!r}: the line itself has a field of that name")
            number = value if isinstance(value, int) else float(value)
            line[name] = number if math.isfinite(number) else None
        text = json.dumps(line, allow_nan=False) + "\n"
        try:
            self._healed().write(text)
        except (OSError, UserError) as error:
            self._give_up(error)

    def rewind(self, step: int) -> None:
        """Drop the lines after ``step``: a run that has gone back makes those steps again."""
        self.close()
        self._drop_after = step
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

    def __enter__(self) -> JsonlSink:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _heal(path: Path, resume_step: int | None) -> None:
    """Rewrite the file without torn lines and without steps after `resume_step`; leave a good file untouched.

    A long log is read line by line: it may be larger than what the machine has left beside a model.
    """
    is_whole, is_kept = True, bytearray()
    try:
        with path.open("rb") as file:  # a binary file ends lines at the newline byte alone, as JSON does
            for line in file:
                is_whole = line.endswith(b"\n")
                is_kept.append(_keeps(line, resume_step))
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"Cannot read the metrics of this run at {path}: {error.strerror}.") from error
    if is_whole and all(is_kept):
        return
    with path.open("rb") as file:
        write_atomic(path, (line if line.endswith(b"\n") else line + b"\n" for line in compress(file, is_kept)))


def _keeps(line: bytes, resume_step: int | None) -> bool:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return False
    return isinstance(step, int) and (resume_step is None or step <= resume_step)
