"""What devices can do and what an hour of them costs: the GPUs in ``devices.yaml``, and this machine. Torch-free.

Peaks come from data sheets, and prices were seen on some day. A plan begins with them; a run may find other ones.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal

from osler.config.recipe import load_yaml
from osler.config.schema import PositiveFloat, config, decode, nearest
from osler.runtime.errors import UserError
from osler.runtime.format import plural
from osler.runtime.machine import gpu_names, memory_limit_bytes, processor, usable_cores

DEVICES = Path(__file__).with_name("devices.yaml")
GIB = 2**30
HERE = "cpu"  # the name of this machine's processor among the devices
# GFLOP/s of matrix products on a core, by the instructions of the processor: in bf16 with AMX, else in fp32. The rates of AMX and
# AVX-512 were measured on one Intel Xeon (`osler bench`); the others are those of one multiply-add unit at 2.5 GHz.
GFLOPS_OF_CORE = (("avx512f", 80.0), ("avx2", 40.0))
AMX_GFLOPS_OF_CORE, LEAST_GFLOPS_OF_CORE = 500.0, 20.0
CPU_BANDWIDTH_GB = 20.0
FP32_OF_BF16 = 0.1  # fp32 rate over bf16 rate of a GPU whose fp32 rate is not in the table
UNKNOWN_MEMORY_GIB = 4.0


@config
class Device:
    """What a plan knows of a GPU, or of a machine without one."""

    title: str  # as a person writes it
    kind: Literal["gpu", "cpu"] = "gpu"
    driver: str = ""  # words in the name that the driver gives such a card
    tflops: PositiveFloat  # dense TFLOP/s in bf16
    fp8_tflops: PositiveFloat | None = None  # the same in FP8; null: it has none
    fp32_tflops: PositiveFloat | None = None  # TFLOP/s of matrix products in fp32; null: a tenth of bf16
    memory_gib: PositiveFloat  # memory that a program finds on a card; for a machine, what a process may take
    bandwidth_gb: PositiveFloat  # GB/s of that memory
    bf16: bool = True  # whether it computes in bf16; false: recipes with precision=auto use fp32 there
    usd: tuple[float, float] | None = None  # lowest and highest price of an hour; null: unknown
    seen: str = ""  # the day of the prices
    source: str = "of the data sheet"  # where the peak comes from

    def __post_init__(self) -> None:
        if self.usd is not None and not 0 < self.usd[0] <= self.usd[1]:
            raise ValueError(f"usd {list(self.usd)} should be the lowest and the highest price of an hour, such as [2.4, 4.3]")

    @property
    def flops(self) -> float:
        """Dense bf16 FLOP/s."""
        return self.tflops * 1e12

    @property
    def fp32_flops(self) -> float:
        """FLOP/s of matrix products in fp32."""
        return self.flops * FP32_OF_BF16 if self.fp32_tflops is None else self.fp32_tflops * 1e12

    @property
    def memory_bytes(self) -> float:
        return self.memory_gib * GIB


@functools.cache
def devices() -> dict[str, Device]:
    """Return the devices of the table by name, in its order."""
    table = load_yaml(DEVICES.read_text(encoding="utf-8"), str(DEVICES))
    return {name: decode(Device, entry, source=f"{DEVICES.name}: {name}") for name, entry in table.items()}


def find_device(text: str) -> Device:
    """Return a device: by a name of the table, by a GPU's name as the driver writes it, ``cpu``, or from a YAML file.

    Raises UserError for an unknown name, with the nearest one, and for a file that is not there or describes no device.
    """
    path = Path(text).expanduser()
    if path.suffix in (".yaml", ".yml"):
        return _read(path)
    if text == HERE:
        return this_machine()
    found = devices().get(text.lower()) or device_of_gpu(text)
    if found is None:
        raise UserError(
            f"there is no device `{text}`{nearest(text.lower(), [*devices(), HERE])} (`osler plan --table devices` lists them; "
            "one of your own is a YAML file with the same fields)"
        )
    return found


def _read(path: Path) -> Device:
    try:
        content: Any = load_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); a device of your own is a YAML file") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a device is a mapping such as `title: My card`, `tflops: 100` and so on, given {content!r}")
    if len(content) == 1 and isinstance(entry := next(iter(content.values())), dict):
        content = entry  # with its name, as in the table
    return decode(Device, {"source": f"of {path.name}", **content}, source=str(path))


def device_of_gpu(gpu_name: str) -> Device | None:
    """Return the device of a GPU named as the driver spells it, such as ``NVIDIA H100 80GB HBM3``; None if it is not listed."""
    words = f" {gpu_name.replace('-', ' ').replace('_', ' ')} "
    return next((device for device in devices().values() if f" {device.driver} " in words), None)


def peak_flops_of(gpu_name: str) -> float | None:
    """Return the dense bf16 FLOP/s of a GPU by its data sheet; None for a card that is not in the table."""
    device = device_of_gpu(gpu_name)
    return None if device is None else device.flops


def this_machine() -> Device:
    """Return the processor of this machine; the speed of a core is assumed from its instructions."""
    name, flags = processor()
    cores = usable_cores()
    fp32 = next((gflops for flag, gflops in GFLOPS_OF_CORE if flag in flags), LEAST_GFLOPS_OF_CORE)
    bf16 = "amx_bf16" in flags
    gflops = AMX_GFLOPS_OF_CORE if bf16 else fp32
    memory = memory_limit_bytes()
    return Device(
        title=f"{plural(cores, 'core')} of {name}",
        kind="cpu",
        tflops=cores * gflops / 1000,
        fp32_tflops=cores * fp32 / 1000,
        bf16=bf16,
        memory_gib=UNKNOWN_MEMORY_GIB if memory is None else memory / GIB,
        bandwidth_gb=CPU_BANDWIDTH_GB,
        usd=None,
        source=f"assumed: {gflops:g} GFLOP/s of matrix products on each of {cores} cores, {fp32:g} in fp32",
    )


def here() -> Device:
    """Return the first GPU of this machine if the driver lists one that is in the table, else its processor."""
    return next(filter(None, map(device_of_gpu, gpu_names())), None) or this_machine()
