"""``osler doctor`` finds out what this machine can do by trying it, rather than from version numbers.

What is missing leads to advice, not to an error: Osler trains on two CPU cores with nothing but its own requirements.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from osler.runtime.format import table
from osler.runtime.machine import memory_limit_bytes, usable_cores
from osler.runtime.neighbours import busy_elsewhere, read_cpus

GIB = 2**30
MIN_MEMORY_BYTES = 4 * GIB
MIN_DISK_BYTES = 5 * GIB
_DISK_TRIAL_BYTES = 16 * 2**20
_MATMUL_TRIAL_SECONDS = 0.2
_NEIGHBOUR_SECONDS = 0.5
_BUSY_CPUS = 0.25  # a desktop at rest stays below this

Found = tuple[str, str]  # what a check found, and advice; the advice is empty when nothing could be better


class Check(NamedTuple):
    """One line of the table; the advice is empty when nothing could be better."""

    name: str
    status: Literal["ok", "slow", "missing"]
    finding: str
    advice: str


def run(*, as_json: bool = False, folder: str | Path = ".") -> int:
    """Examine the machine, print the table or one JSON object, and return 0 whatever was found."""
    checks = examine(Path(folder))
    print(json.dumps({"checks": [check._asdict() for check in checks]}, indent=2) if as_json else render(checks))
    return 0


def examine(folder: Path) -> list[Check]:
    """Run every check, which takes about fifteen seconds, and return the results; ``folder`` is where runs will be written."""
    checks = []
    for name, (check, remedy) in CHECKS.items():
        try:
            finding, advice = check(folder)
            checks.append(Check(name, "slow" if advice else "ok", finding, advice))
        except (ImportError, OSError, RuntimeError) as error:  # a missing or broken library of torch is an OSError, too
            checks.append(Check(name, "missing", next(iter(str(error).splitlines()), ""), remedy))
    return checks


def render(checks: Sequence[Check]) -> str:
    """Return the checks as a table, with the advice below it."""
    advice = [f"- {check.name}: {check.advice}" for check in checks if check.advice]
    lines = table([(check.status, check.name, check.finding) for check in checks], left=3)
    return "\n".join([lines, "", *(["Advice:", *advice] if advice else ["Nothing to improve."])])


def find_python(folder: Path) -> Found:
    """Return the versions of the interpreter and of Osler."""
    return f"{platform.python_version()} on {platform.system()} {platform.machine()}, Osler {osler_version()}", ""


def find_cores(folder: Path) -> Found:
    """Count the cores that this process may use, by its CPU affinity and by the container's quota."""
    # os.cpu_count() alone would start one thread per core of the host and let them fight over a small quota.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    usable = usable_cores()
    advice = f"The container's quota is {usable}: set OMP_NUM_THREADS={usable}" if usable < allowed else ""
    return f"{usable} usable of {os.cpu_count()}", advice


def find_other_work(folder: Path) -> Found:
    """Measure for half a second how many CPUs other processes keep busy."""
    before = read_cpus()
    time.sleep(_NEIGHBOUR_SECONDS)
    after = read_cpus()
    if before is None or after is None:
        return "unknown on this system", ""
    busy = busy_elsewhere(before, after)
    advice = "Training shares the CPUs with it and is slower; `top` shows what it is" if busy > _BUSY_CPUS else ""
    return f"other processes keep {busy:.1f} CPUs busy", advice


def find_memory(folder: Path) -> Found:
    """Return how much memory a process may take here: the machine's, or the container's limit if that is lower."""
    total = memory_limit_bytes()
    if total is None:
        return "unknown on this system", ""
    return f"{total / GIB:.1f} GiB", "Below 4 GiB only the smallest models fit" if total < MIN_MEMORY_BYTES else ""


def find_disk(folder: Path) -> Found:
    """Measure the free space in ``folder``, and the speed at which 16 MiB are written and synced; raises OSError."""
    data = os.urandom(_DISK_TRIAL_BYTES)
    free = shutil.disk_usage(folder).free
    with tempfile.TemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        seconds = time.perf_counter() - start
    advice = "Checkpoints of a real run need more than 5 GiB" if free < MIN_DISK_BYTES else ""
    return f"{free / GIB:.1f} GiB free, {len(data) / seconds / 2**20:.0f} MiB/s written and synced", advice


def find_device(folder: Path) -> Found:
    """Name torch and the device that training would use; advise where there is a GPU that this torch cannot use."""
    import torch

    if torch.cuda.is_available():
        properties, count = torch.cuda.get_device_properties(0), torch.cuda.device_count()
        free, total = torch.cuda.mem_get_info()
        memory = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free, compute capability {properties.major}.{properties.minor}"
        many = f"; all: torchrun --nproc-per-node {count} -m osler.cli pretrain RECIPE parallel.type=ddp" if count > 1 else ""
        return f"torch {torch.__version__}, {count} x {properties.name}, {memory}{many}", ""
    has_driver = Path("/proc/driver/nvidia/version").exists()
    advice = "The NVIDIA driver is there, but this torch sees no GPU: install the CUDA build that fits the driver"
    return f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads", advice if has_driver else ""


def find_bf16(folder: Path) -> Found:
    """Time matrix products in fp32 and bf16, and say which ``precision: auto`` uses; on a CPU, bf16 only in compiled runs."""
    import torch

    from osler.runtime.device import bf16_pays, matmul_flops, pick_device

    device = pick_device("auto")
    sizes = [8192 if device.type == "cuda" else 512]
    fp32, bf16 = (matmul_flops(device, dtype, sizes, _MATMUL_TRIAL_SECONDS) / 1e9 for dtype in (torch.float32, torch.bfloat16))
    uses = "bf16" if bf16_pays(device) else "fp32"
    return f"fp32 {fp32:,.0f} GFLOP/s, bf16 {bf16:,.0f} GFLOP/s: runs use {uses}", ""


def find_compile(folder: Path) -> Found:
    """Compile a small function and run it; raises RuntimeError."""
    from osler.parallel.compile import compile_works
    from osler.runtime.device import pick_device

    start = time.perf_counter()
    works, reason = compile_works(pick_device("auto"))
    if not works:
        raise RuntimeError(reason)
    return f"compiled and ran in {time.perf_counter() - start:.1f} s", ""


CHECKS = {  # each with the advice for when it fails
    "python": (find_python, ""),
    "cores": (find_cores, ""),
    "other work": (find_other_work, ""),
    "memory": (find_memory, ""),
    "disk": (find_disk, "Choose a folder you own: --run DIR"),
    "device": (find_device, "Install torch again"),
    "bf16": (find_bf16, "Runs use fp32"),
    "compile": (find_compile, "Training works without it, more slowly"),
}


def osler_version() -> str:
    """Return Osler's version, or where it comes from."""
    try:
        return importlib.metadata.version("osler")
    except importlib.metadata.PackageNotFoundError:
        return "from a source tree that is not installed"
