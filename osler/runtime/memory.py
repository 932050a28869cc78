"""How much memory this process holds, on its GPU or on the host. Nothing here waits for the device."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch


def resident_bytes() -> int | None:
    """Return the process's resident memory without mapped files; None where the system does not tell, as outside of Linux.

    Mapped files, libraries and data, grow as they are read, and the system takes them out when memory is short.
    """
    try:
        _, resident, mapped, *_ = map(int, Path("/proc/self/statm").read_text().split())
        return (resident - mapped) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def peak_bytes(device: torch.device) -> int | None:
    """Return the most that the GPU's allocator has held, or on a CPU the process with mapped files; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
