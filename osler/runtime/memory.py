"""How much memory this process holds, on its GPU or else on the host. Nothing here waits for the device."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

_STATM = Path("/proc/self/statm")  # Linux only; elsewhere the peak alone is known


def resident_bytes() -> int | None:
    """What the process has resident now, libraries included; None where the system does not tell."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return None


def peak_bytes(device: torch.device) -> int | None:
    """The most that the GPU's allocator, or else the process, has held; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
