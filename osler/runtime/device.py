"""The abilities of this machine: its device, fastest number format, peak speed and memory. It also has the clocks for timing.

Whether bf16 pays is tried, not looked up: it is timed against fp32, once in a process. A run stores what it resolved, because
two trials on a busy machine may disagree, and a resumed run must not change its arithmetic.
"""

import ctypes
import functools
import mmap
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osler.runtime.errors import UserError
from osler.runtime.machine import peak_process_bytes, physical_memory_bytes, processor

# The dtype of the activations; parallel/parallelize.py applies the rest of a precision.
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32, "pure-bf16": torch.bfloat16, "fp8": torch.bfloat16}

MOST_HUGE_BYTES = 1 << 35  # of addresses, on machines with much memory
TRIM_THRESHOLD, KEPT_BYTES = -1, 1 << 17  # glibc's number of this option, and its own default

# What errors say that are no ``torch.OutOfMemoryError`` when torch's allocator for CPUs, C++, cuBLAS or the driver has no memory.
ALLOCATORS_WORDS = ("can't allocate memory", "bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")

_BF16_TRIAL_SECONDS = 0.6  # long enough to find quiet moments on a busy machine
_BF16_GAIN = 1.2  # a smaller gain is lost to the cast of the weights, which the trial leaves out


def pick_device(name: str) -> torch.device:
    """Return the device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; raises UserError for others, and when it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if name != "cpu" and (kind != "cuda" or (":" in name and not index.isdigit())):
        raise UserError(f"Unknown device {name!r}: use auto, cpu, cuda or cuda:N.")
    if kind == "cuda":
        if not torch.cuda.is_available():
            reason = "finds no usable GPU" if torch.version.cuda else "was built without CUDA"
            raise UserError(f"Device {name!r} was asked for, but this PyTorch ({torch.__version__}) {reason}: use cpu.")
        if index and int(index) >= torch.cuda.device_count():
            raise UserError(f"Device {name!r} was asked for, but the last GPU here is cuda:{torch.cuda.device_count() - 1}.")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in for a precision; ``auto`` is bf16 where ``bf16_pays``, fp32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if bf16_pays(device) else torch.float32
    return PRECISIONS[name]


@functools.cache
def bf16_pays(device: torch.device) -> bool:
    """Return whether a training step's matrix products are clearly faster in bf16 than in fp32. The first call takes a second."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return False
    trials = [_linear_trial(device, dtype) for dtype in (torch.float32, torch.bfloat16)]
    fp32, bf16 = fastest(trials, device, _BF16_TRIAL_SECONDS)
    return fp32 > _BF16_GAIN * bf16


def _linear_trial(device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """Return a function that computes the three products of one linear layer, forward and backward."""
    tokens, inputs, outputs = (8192, 1024, 4096) if device.type == "cuda" else (512, 256, 768)
    x = torch.full((tokens, inputs), 0.5, device=device, dtype=dtype)
    weight = torch.full((outputs, inputs), 0.5, device=device, dtype=dtype)
    grad = torch.full((tokens, outputs), 0.5, device=device, dtype=dtype)
    return lambda: (x @ weight.T, grad @ weight, grad.T @ x)


def fastest(works: Sequence[Callable[[], object]], device: torch.device, seconds: float) -> list[float]:
    """Return the seconds of each work's fastest call. The works take turns for ``seconds`` in all, and at least three times."""
    for work in works:
        work()  # the first call pays for kernels and memory
    times: list[list[float]] = [[] for _ in works]
    deadline = time.perf_counter() + seconds
    while len(times[-1]) < 3 or time.perf_counter() < deadline:
        for work, own in zip(works, times, strict=True):
            synchronize(device)
            start = time.perf_counter()
            work()
            synchronize(device)
            own.append(time.perf_counter() - start)
    return list(map(min, times))


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that memory could not be allocated, on a GPU or by torch or Python on a CPU."""
    told = isinstance(error, RuntimeError) and any(words in str(error) for words in ALLOCATORS_WORDS)
    return told or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def matmul_flops(device: torch.device, dtype: torch.dtype, sizes: Sequence[int], seconds: float) -> float:
    """Return the highest FLOP/s of square matmuls of these sizes; each is repeated for ``seconds`` and at least three times."""
    best = 0.0
    for size in sizes:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        best = max(best, 2 * size**3 / fastest([functools.partial(torch.matmul, left, right)], device, seconds)[0])
    return best


def gpu_name(device: torch.device) -> str:
    """Return the name of a GPU as the driver spells it, for example ``NVIDIA H100 80GB HBM3``; empty for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def describe_machine() -> dict[str, Any]:
    """Return the facts that times and roundings depend on, to keep beside a measurement: hardware, versions, threads."""
    gpu = {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count()} if torch.cuda.is_available() else {}
    thread_variables = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith(("OMP_", "MKL_")))
    return {
        "processor": processor()[0],
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": physical_memory_bytes(),
        **gpu,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "thread_variables": " ".join(thread_variables),
    }


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the host to the device. To a GPU it goes from pinned memory, so that the host need not wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory for reuse, and the kernel for huge pages under it; other C libraries are not asked.

    By default glibc maps new memory for each large tensor, so the kernel zeroes pages in every step; on virtual machines that
    can cost more than the arithmetic.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    mmap_threshold, never = -3, -1
    mapped_bytes = 1 << 30
    if libc.mallopt(mmap_threshold, mapped_bytes) != 1:  # older versions of glibc refuse thresholds above half a heap
        mapped_bytes = 32 << 20
        libc.mallopt(mmap_threshold, mapped_bytes)
    libc.mallopt(TRIM_THRESHOLD, never)
    _use_huge_pages(libc, mapped_bytes // 2)


def _use_huge_pages(libc: ctypes.CDLL, block_bytes: int) -> None:
    """Let the heap grow by a quarter of the machine's memory, which nothing touches yet, and ask for huge pages there.

    The tensors of a step lie on tens of thousands of small pages, more than a processor keeps the addresses of. A kernel
    without huge pages refuses. Where addresses are limited the heap does not grow: threads would have no place for their stacks.
    """
    import resource  # Windows has none

    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, libc.madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    count = min((physical_memory_bytes() or 0) // 4, MOST_HUGE_BYTES) // block_bytes
    blocks = [block for _ in range(count) if (block := libc.malloc(block_bytes)) is not None]
    for block in blocks:
        start = block // mmap.PAGESIZE * mmap.PAGESIZE
        libc.madvise(start, block + block_bytes - start, mmap.MADV_HUGEPAGE)
    for block in blocks:
        libc.free(block)


def give_back_freed_memory() -> None:
    """Give memory that the allocators keep for reuse back to the GPU and, where the C library is glibc, to the system.

    From here on glibc keeps little: what a step frees may be all there is for the stack of a new thread.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(TRIM_THRESHOLD, KEPT_BYTES)
        libc.malloc_trim(0)


class Stopwatch:
    """Adds up the seconds of each part of a step without waiting for the device: on CUDA every mark is an event."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._parts: list[tuple[str, Any, Any]] = []  # name, begin and end: seconds on a CPU, events on CUDA
        self.start()

    def start(self) -> None:
        """Begin the next part now; the time since the last mark is not counted."""
        self._last = self._now()

    def mark(self, name: str) -> None:
        """End the part ``name`` and begin the next."""
        now = self._now()
        self._parts.append((name, self._last, now))
        self._last = now

    def read(self) -> dict[str, float]:
        """Return the seconds of each part since the last ``read``. Only this method waits for the device."""
        if self._on_gpu and self._parts:
            self._parts[-1][2].synchronize()
        seconds: defaultdict[str, float] = defaultdict(float)
        for name, begin, end in self._parts:
            seconds[name] += begin.elapsed_time(end) / 1000 if self._on_gpu else end - begin
        self._parts.clear()
        return dict(seconds)

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def resident_bytes() -> int | None:
    """Return the process's resident memory without mapped files, which the system can drop; None where unknown."""
    try:
        _, resident, mapped, *_ = map(int, Path("/proc/self/statm").read_text().split())
        return (resident - mapped) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def peak_bytes(device: torch.device) -> int | None:
    """Return the peak memory of the GPU's allocator, or on a CPU that of the process, mapped files too; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_process_bytes()
