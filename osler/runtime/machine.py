"""The cores, memory, processor and GPUs of this machine, found without torch. A container's limits count."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import sys
from pathlib import Path


def usable_cores() -> int:
    """Return the number of cores that this process may use, by its CPU affinity and by the container's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = [*_cgroup("cpu.max").split(), "max", "1"][:2]
    return allowed if quota == "max" else min(allowed, max(1, int(quota) // int(period)))


def memory_limit_bytes() -> int | None:
    """Return how many bytes a process may take here: the machine's memory, or the container's lower limit; None if unknown.""" 
    total = physical_memory_bytes()
    limit = _cgroup("memory.max")
    return min(total, int(limit)) if total is not None and limit.isdigit() else total


def physical_memory_bytes() -> int | None:
    """Return the memory of the machine in bytes; None if unknown."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def peak_process_bytes() -> int | None:
    """Return the peak resident memory of this process, mapped files too; None where unknown."""
    # Linux keeps in ``ru_maxrss`` the peak of the process that started this one, so its own mark is read first.
    with contextlib.suppress(OSError):
        if found := re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE):
            return int(found[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def processor() -> tuple[str, frozenset[str]]:
    """Return the name of the processor and, on Linux, its flags, such as ``avx512f`` or ``amx_bf16``."""
    name, flags = platform.processor() or platform.machine(), ""
    with contextlib.suppress(OSError):
        cpus = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"^model name\s*:\s*(.*)", cpus, re.MULTILINE):
            name = found[1].strip()
        if found := re.search(r"^flags\s*:\s*(.*)", cpus, re.MULTILINE):
            flags = found[1]
    return name, frozenset(flags.split())


def gpu_names() -> list[str]:
    """Return the names of the NVIDIA GPUs that the driver lists; none on a system without ``/proc``."""
    files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    found = (re.search(r"^Model:\s*(.*)", file.read_text(errors="replace"), re.MULTILINE) for file in files)
    return [match[1].strip() for match in found if match]


def _cgroup(name: str) -> str:
    try:
        return (Path("/sys/fs/cgroup") / name).read_text().strip()
    except OSError:
        return ""
