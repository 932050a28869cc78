"""``osler doctor``: what this machine can do, found out by trying it rather than from version numbers.

A missing thing leads to advice and not to an error: Osler trains on two CPU cores with nothing but its own requirements.
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
from typing import TYPE_CHECKING, Literal, NamedTuple

from osler.runtime.neighbours import busy_elsewhere, read_cpus

if TYPE_CHECKING:
    import torch

GIB = 2**30
MIN_MEMORY_BYTES = 4 * GIB
MIN_DISK_BYTES = 5 * GIB
_DISK_TRIAL_BYTES = 16 * 2**20
_MATMUL_TRIAL_SECONDS = 0.2
_NEIGHBOUR_SECONDS = 0.5
_BUSY_CPUS = 0.25  # a desktop at rest stays below this


class Check(NamedTuple):
    """One line of the examination; ``advice`` says what would make it better and is empty when nothing would."""

    name: str
    status: Literal["ok", "slow", "missing"]
    finding: str
    advice: str = ""


def run(*, as_json: bool = False, folder: str | Path = ".") -> int:
    """Examine the machine, print the table or one JSON object, and return 0 whatever was found."""
    checks = examine(Path(folder))
    print(json.dumps({"checks": [check._asdict() for check in checks]}, indent=2) if as_json else render(checks))
    return 0


def examine(folder: Path) -> list[Check]:
    """Return the result of every check, in about fifteen seconds; ``folder`` is where runs will be written."""
    checks = [check_python(), check_cores(), check_neighbours(), check_memory(), check_disk(folder)]
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that torch loads is missing or broken
        checks.append(Check("torch", "missing", f"cannot be imported: {error}", "Install torch anew"))
    else:
        from osler.runtime.device import pick_device

        device = pick_device("auto")
        checks += [Check("torch", "ok", torch.__version__), check_device(device)]
        for name, probe, advice in (("bf16", check_bf16, "Runs use fp32"), ("attention", check_attention, "Install torch anew")):
            try:
                checks.append(probe(device))
            except RuntimeError as error:
                checks.append(Check(name, "missing", f"does not run: {str(error).splitlines()[0]}", advice))
        checks.append(check_compile(device))
    return checks


def render(checks: Sequence[Check]) -> str:
    """Lay the checks out as a table, the advice below it."""
    width = max(len(check.name) for check in checks)
    lines = [f"{check.status:<8} {check.name:<{width}}  {check.finding}" for check in checks]
    advice = [f"- {check.name}: {check.advice}" for check in checks if check.advice]
    return "\n".join([*lines, "", *(["Advice:", *advice] if advice else ["Nothing to improve."])])


def graded(name: str, finding: str, advice: str = "") -> Check:
    """Return a check of something that works; where there is advice, it could be faster."""
    return Check(name, "slow" if advice else "ok", finding, advice)


def check_python() -> Check:
    """Return the versions of the interpreter and of Osler."""
    system = f"{platform.system()} {platform.machine()}"
    return Check("python", "ok", f"{platform.python_version()} on {system}, Osler {osler_version()}")


def check_cores() -> Check:
    """Count the cores this process may use: the machine's, less what affinity and a container's quota take away."""
    # os.cpu_count() alone would start one thread per core of the host and let them fight over a small quota.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = [*_cgroup("cpu.max").split(), "max", "1"][:2]
    usable = allowed if quota == "max" else min(allowed, max(1, int(quota) // int(period)))
    advice = f"The container's quota is {usable}: set OMP_NUM_THREADS={usable}" if usable < allowed else ""
    return graded("cores", f"{usable} usable of {os.cpu_count()}", advice)


def check_neighbours() -> Check:
    """Measure for half a second how many CPUs other processes keep busy."""
    before = read_cpus()
    time.sleep(_NEIGHBOUR_SECONDS)
    after = read_cpus()
    if before is None or after is None:
        return Check("other work", "ok", "unknown on this system")
    busy = busy_elsewhere(before, after)
    advice = "Training shares the CPUs with it and is slower; `top` shows what it is" if busy > _BUSY_CPUS else ""
    return graded("other work", f"other processes keep {busy:.1f} CPUs busy", advice)


def check_memory() -> Check:
    """Return how much memory a process may take here, a container's limit included."""
    if not hasattr(os, "sysconf"):
        return Check("memory", "ok", "unknown on this system")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _cgroup("memory.max")
    total = min(total, int(limit)) if limit.isdigit() else total
    advice = "Below 4 GiB only the smallest models fit" if total < MIN_MEMORY_BYTES else ""
    return graded("memory", f"{total / GIB:.1f} GiB", advice)


def _cgroup(name: str) -> str:
    try:
        return (Path("/sys/fs/cgroup") / name).read_text().strip()
    except OSError:
        return ""


def check_disk(folder: Path) -> Check:
    """Measure the free space in ``folder``, and the speed at which 16 MiB are written and synced."""
    data = os.urandom(_DISK_TRIAL_BYTES)
    try:
        free = shutil.disk_usage(folder).free
        with tempfile.TemporaryFile(dir=folder) as file:
            start = time.perf_counter()
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - start
    except OSError as error:
        return Check("disk", "missing", f"{folder} cannot be written: {error}", "Choose a folder you own: --run DIR")
    advice = "Checkpoints of a real run need more than 5 GiB" if free < MIN_DISK_BYTES else ""
    return graded("disk", f"{free / GIB:.1f} GiB free, {len(data) / seconds / 2**20:.0f} MiB/s written and synced", advice)


def check_device(device: torch.device) -> Check:
    """Name the device that training picks, and find a GPU that this torch cannot use."""
    import torch

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        count = torch.cuda.device_count()
        finding = f"{count} x {properties.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        finding += f", compute capability {properties.major}.{properties.minor}"
        all_of_them = f"All of them: torchrun --nproc-per-node {count} -m osler.cli pretrain RECIPE parallel.type=ddp"
        return Check("device", "ok", finding, all_of_them if count > 1 else "")
    if Path("/proc/driver/nvidia/version").exists():
        advice = "The NVIDIA driver is there, but this torch sees no GPU: install the CUDA build that fits the driver"
        return Check("device", "slow", "CPU", advice)
    return Check("device", "ok", f"CPU, {torch.get_num_threads()} threads")


def check_bf16(device: torch.device) -> Check:
    """Time matrix products in fp32 and bf16, and find which of them a run with ``precision: auto`` uses."""
    import torch

    from osler.runtime.device import bf16_pays, matmul_flops

    sizes = [8192 if device.type == "cuda" else 512]
    fp32, bf16 = (matmul_flops(device, dtype, sizes, _MATMUL_TRIAL_SECONDS) / 1e9 for dtype in (torch.float32, torch.bfloat16))
    pays = bf16_pays(device)
    finding = f"fp32 {fp32:,.0f} GFLOP/s, bf16 {bf16:,.0f} GFLOP/s: runs use {'bf16' if pays else 'fp32'}"
    return Check("bf16", "ok" if pays else "slow", finding)


def check_attention(device: torch.device) -> Check:
    """Run attention once, as a model does."""
    import torch

    from osler.ops.attention import attention
    from osler.runtime.device import pick_dtype

    dtype = pick_dtype("auto", device)
    q = torch.ones(1, 4, 128, 64, device=device, dtype=dtype, requires_grad=True)
    kv = torch.ones(1, 2, 128, 64, device=device, dtype=dtype)
    attention(q, kv, kv).sum().backward()
    return Check("attention", "ok", f"grouped, with its gradient, in {str(dtype).removeprefix('torch.')}")


def check_compile(device: torch.device) -> Check:
    """Compile a small function and run it."""
    from osler.parallel.compile import compile_works

    start = time.perf_counter()
    works, reason = compile_works(device)
    if not works:
        return Check("compile", "missing", reason, "Training works without it, more slowly")
    return Check("compile", "ok", f"compiled and ran in {time.perf_counter() - start:.1f} s")


def osler_version() -> str:
    """Return Osler's version, or where it comes from."""
    try:
        return importlib.metadata.version("osler")
    except importlib.metadata.PackageNotFoundError:
        return "from a source tree that is not installed"
