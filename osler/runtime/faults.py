"""Fault injection: break the program on purpose at a named place, to test that no work is lost.

``OSLER_FAULT=stage:kind[:visits]`` makes visits of ``fault(stage)`` in this process fail: the first by default, the third with
``3``, the third to fifth with ``3-5``, the third and all after it with ``3-``. Several faults are joined by commas. Kinds:
``kill`` (SIGKILL to itself: no cleanup runs), ``sigterm`` and ``sigint`` (the polite signals, as a scheduler and a person send
them), ``enospc`` (the error of a full disk), ``ioerror`` (the error of a failing one), ``crash`` (an error in the program
itself), ``nan`` (at a place that asks ``poisoned(stage)``: its numbers become NaN). Without the variable a visit costs one
dictionary look-up and nothing else is read.

Stages: ``write-atomic`` (runtime/files.py); ``save-tensors``, ``save-state``, ``save-files``, ``save-manifest``, ``save-rename``,
``save-verify``, ``save-best``, ``rotate`` (checkpoint/); ``train-step``, ``train-loss``, ``evaluate``, ``rollback`` (train/ and
rl/).
"""

from __future__ import annotations

import errno
import os
import re
import signal
from typing import NamedTuple

VARIABLE = "OSLER_FAULT"
SIGNALS = {"sigterm": signal.SIGTERM, "sigint": signal.SIGINT}
ERRORS = {"enospc": errno.ENOSPC, "ioerror": errno.EIO}
KINDS = ("kill", *SIGNALS, *ERRORS, "crash", "nan")
_FAULT = re.compile(rf"([^:,]+):({'|'.join(KINDS)})(?::([1-9]\d*)(-(?:[1-9]\d*)?)?)?")

_visits: dict[tuple[str, str], int] = {}


class InjectedError(RuntimeError):
    """The bug that ``crash`` stands for."""


class Fault(NamedTuple):
    """One fault: where, what, and at which visits; ``last`` None is without end."""

    stage: str
    kind: str
    first: int
    last: int | None


def fault(stage: str) -> None:
    """Fail here if ``OSLER_FAULT`` names this stage: OSError for ``enospc`` and ``ioerror``, InjectedError for ``crash``."""
    spec = os.environ.get(VARIABLE)
    if spec is None:
        return
    for kind in _struck(spec, stage):
        if kind == "kill":
            if hasattr(signal, "SIGKILL"):
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(137)
        if kind in SIGNALS:
            os.kill(os.getpid(), SIGNALS[kind])
        if kind in ERRORS:
            raise OSError(ERRORS[kind], f"{os.strerror(ERRORS[kind])} (injected by {VARIABLE})")
        if kind == "crash":
            raise InjectedError(f"injected by {VARIABLE} at {stage}")


def poisoned(stage: str) -> bool:
    """Whether ``OSLER_FAULT`` wants the numbers of this visit to be NaN."""
    spec = os.environ.get(VARIABLE)
    return spec is not None and "nan" in _struck(spec, stage)


def _struck(spec: str, stage: str) -> list[str]:
    """Count one visit of the stage, and return the kinds of fault that fall on it."""
    here = [each for each in parse(spec) if each.stage == stage]
    if not here:
        return []
    visit = _visits[spec, stage] = _visits.get((spec, stage), 0) + 1
    return [each.kind for each in here if each.first <= visit and (each.last is None or visit <= each.last)]


def parse(spec: str) -> list[Fault]:
    """The faults of ``stage:kind[:visits]``, or several with commas between them; raises ValueError on anything else."""
    faults = []
    for part in spec.split(","):
        match = _FAULT.fullmatch(part)
        if match is None:
            raise ValueError(
                f"{VARIABLE}={spec!r} is not stage:kind[:visits] with kind one of {', '.join(KINDS)} and visits as 3, 3-5 or 3-"
            )
        stage, kind, first, rest = match.groups()
        start = int(first or 1)
        last = start if rest is None else None if rest == "-" else int(rest[1:])
        faults.append(Fault(stage, kind, start, last))
    return faults


def reset() -> None:
    """Forget all visits, so that the same fault can strike again in this process."""
    _visits.clear()
