"""Fault injection: break the program on purpose at a named place, to test that no work is lost.

``OSLER_FAULT=stage:kind[:count]`` makes the ``count``-th visit (first by default) of ``fault(stage)`` in this process
fail, once. Kinds: ``kill`` (SIGKILL to itself: no cleanup runs), ``sigterm`` (the polite signal, as a scheduler sends
it), ``enospc`` (the error of a full disk), ``ioerror`` (the error of a failing one). Without the variable a visit
costs one dictionary look-up and nothing else is read.

Stages: ``write-atomic`` (runtime/files.py) and ``save-tensors``, ``save-state``, ``save-files``, ``save-manifest``,
``save-rename``, ``save-verify``, ``save-best``, ``rotate`` (checkpoint/). Other modules name their own.
"""

from __future__ import annotations

import errno
import os
import signal

VARIABLE = "OSLER_FAULT"
KINDS = ("kill", "sigterm", "enospc", "ioerror")

_visits: dict[tuple[str, str], int] = {}


def fault(stage: str) -> None:
    """Fail here if ``OSLER_FAULT`` names this stage; raises OSError for ``enospc`` and ``ioerror``."""
    spec = os.environ.get(VARIABLE)
    if spec is None:
        return
    wanted, kind, count = parse(spec)
    if stage != wanted:
        return
    visit = _visits[spec, stage] = _visits.get((spec, stage), 0) + 1
    if visit != count:
        return
    if kind == "kill":
        if hasattr(signal, "SIGKILL"):
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(137)
    if kind == "sigterm":
        os.kill(os.getpid(), signal.SIGTERM)
        return
    code = errno.ENOSPC if kind == "enospc" else errno.EIO
    raise OSError(code, f"{os.strerror(code)} (injected by {VARIABLE})")


def parse(spec: str) -> tuple[str, str, int]:
    """Split ``stage:kind[:count]``; raises ValueError on anything else."""
    stage, _, rest = spec.partition(":")
    kind, _, count = rest.partition(":")
    if not stage or kind not in KINDS or not (count or "1").isdigit() or int(count or "1") < 1:
        raise ValueError(f"{VARIABLE}={spec!r} is not stage:kind[:count] with kind one of {', '.join(KINDS)}")
    return stage, kind, int(count or "1")


def reset() -> None:
    """Forget all visits, so that the same fault can strike again in this process."""
    _visits.clear()
