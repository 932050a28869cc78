"""Fault injection: break the program on purpose at a named point, to test that no work is lost.

``OSLER_FAULT=point:kind[:visits]`` makes calls of ``fault(point)`` in this process fail: the first by default, the third with
``3``, the third to fifth with ``3-5``, the third and all after it with ``3-``. Commas separate several faults. Kinds: ``kill``
(SIGKILL to itself: no cleanup runs), ``sigterm``, ``enospc`` and ``ioerror`` (the errors of a full and of a failing disk),
``crash`` (a bug in the program), ``slow`` (a fifth of a second passes), ``nan`` (where the code asks ``poisoned(point)``, numbers
become NaN). Without the variable a call costs one dictionary look-up.

Points: ``write-atomic`` (runtime/files.py); ``save-tensors``, ``save-state``, ``save-files``, ``save-manifest``, ``save-rename``,
``save-verify``, ``save-best``, ``rotate`` (checkpoint/); ``load-batch`` (data/loader.py); ``train-loss`` (model/transformer.py,
for ``nan`` alone); ``train-step``, ``evaluate``, ``rollback`` (runs/loop.py); ``prepare-part``, ``prepare-chunk``,
``prepare-journal``, ``prepare-manifest``, ``prepare-complete``, ``write-shard``, ``write-index`` (data/).
"""

import errno
import os
import re
import signal
import time
from collections import Counter

VARIABLE = "OSLER_FAULT"
ERRORS = {"enospc": errno.ENOSPC, "ioerror": errno.EIO}
KINDS = ("kill", "sigterm", *ERRORS, "crash", "slow", "nan")
SLOW_SECONDS = 0.2
_FAULT = re.compile(rf"([^:,]+):({'|'.join(KINDS)})(?::([1-9]\d*)(-(?:[1-9]\d*)?)?)?")

visits: Counter[tuple[str, str]] = Counter()  # keys: the variable's value and the point


class InjectedError(RuntimeError):
    """The bug that ``crash`` stands for."""


def fault(point: str) -> None:
    """Fail here if ``OSLER_FAULT`` names this point: OSError for ``enospc`` and ``ioerror``, InjectedError for ``crash``."""
    spec = os.environ.get(VARIABLE)
    if spec is None:
        return
    for kind in _due(spec, point):
        if kind == "kill":
            if hasattr(signal, "SIGKILL"):
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(137)
        if kind == "sigterm":
            os.kill(os.getpid(), signal.SIGTERM)
        if kind in ERRORS:
            raise OSError(ERRORS[kind], f"{os.strerror(ERRORS[kind])} (injected by {VARIABLE})")
        if kind == "slow":
            time.sleep(SLOW_SECONDS)
        if kind == "crash":
            raise InjectedError(f"injected by {VARIABLE} at {point}")


def poisoned(point: str) -> bool:
    """Return whether ``OSLER_FAULT`` turns the numbers of this visit into NaN."""
    spec = os.environ.get(VARIABLE)
    return spec is not None and "nan" in _due(spec, point)


def _due(spec: str, point: str) -> list[str]:
    """Count a visit of the point and return the kinds of fault due in it; raises ValueError if the variable is malformed."""
    visits[spec, point] += 1
    kinds = []
    for part in spec.split(","):
        match = _FAULT.fullmatch(part)
        if match is None:
            raise ValueError(
                f"{VARIABLE}={spec!r} is not point:kind[:visits] with kind one of {', '.join(KINDS)} and visits as 3, 3-5 or 3-"
            )
        named, kind, first, rest = match.groups()
        start = int(first or 1)
        last = start if rest is None else float("inf") if rest == "-" else int(rest[1:])
        if named == point and start <= visits[spec, point] <= last:
            kinds.append(kind)
    return kinds
