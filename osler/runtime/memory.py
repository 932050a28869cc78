"""How much memory this process holds, on its GPU or else on the host. Nothing here waits for the device."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

_STATM = Path("/proc/self/statm")  # Linux only; elsewhere the peak alone is known


def resident_bytes() -> int | None:
    """What the process alone has resident now; None where the system does not tell.

    Without the files that it maps, libraries and data: they grow as they are read, and give way when memory is short.
    """
    try:
        _, resident, mapped, *_ = map(int, _STATM.read_text().split())
        return (resident - mapped) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def peak_bytes(device: torch.device) -> int | None:
    """The most that the GPU's allocator, or else the process with the files it maps, has held; None where it is not told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
