"""The probes give answers that hold on any machine; mapped files are no memory that the process holds."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from osler.config.devices import peak_flops_of
from osler.runtime.device import (
    bf16_pays,
    describe_machine,
    peak_bytes,
    pick_device,
    pick_dtype,
    resident_bytes,
)
from osler.runtime.errors import UserError

CPU = torch.device("cpu")


def test_the_device_and_the_dtype_are_those_that_are_asked_for():
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:x", "cuda:", "cpu:1", ""):
        with pytest.raises(UserError, match="Unknown device"):
            pick_device(name)
    assert pick_dtype("bf16", CPU) == torch.bfloat16
    assert pick_dtype("fp32", CPU) == torch.float32
    assert pick_dtype("auto", CPU) == (torch.bfloat16 if bf16_pays(CPU) else torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU that the test must not find")
def test_a_missing_gpu_is_said():
    with pytest.raises(UserError, match="use cpu"):
        pick_device("cuda")


GPUS = {
    "H100 80GB HBM3": 989e12, "H100 PCIe": 756e12, "H200": 989e12, "A100-SXM4-80GB": 312e12, "A10G": 70e12, "A10": 125e12,
    "L4": 121e12, "L40S": 362e12, "GeForce RTX 4090": 165.2e12, "Tesla T4": 65e12, "T400": None, "Some Card": None,
}  # fmt: skip


@pytest.mark.parametrize(("name", "flops"), GPUS.items())
def test_peak_flops_by_name(name, flops):
    assert peak_flops_of(f"NVIDIA {name}") == flops


def test_a_machine_is_described_by_its_processor_and_threads(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    machine = describe_machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and "model name" in info.read_text():
        assert machine["processor"] and f": {machine['processor']}\n" in info.read_text()
    assert 1 <= machine["cores"] <= os.cpu_count() and machine["threads"] == torch.get_num_threads()
    assert machine["torch"] == torch.__version__ and "OMP_WAIT_POLICY=passive" in machine["thread_variables"]
    assert machine["memory_bytes"] is None or machine["memory_bytes"] > 1 << 27


MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not tell")
def test_a_mapped_file_is_not_held_and_an_array_is(tmp_path):
    path = tmp_path / "shard.bin"
    path.write_bytes(bytes(64 * MIB))
    before = resident_bytes()
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    assert int(mapped.sum()) == 0
    read = resident_bytes()
    held = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # new, whatever freed memory the process keeps
    for _ in range(64):
        held.write(bytes(MIB))
    after = resident_bytes()
    assert before and read and after
    assert read - before < 32 * MIB < after - read < 96 * MIB
    peak = peak_bytes(torch.device("cpu"))
    assert peak is not None and peak >= after


def test_the_peak_of_a_process_is_not_that_of_the_process_that_started_it():
    code = "from osler.runtime.machine import peak_process_bytes; print(peak_process_bytes())"
    held = bytearray(256 * MIB)
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert MIB < int(child.stdout) < len(held) // 2


HUGE_PAGES = """
import re
from pathlib import Path
import torch
from osler.runtime.device import keep_freed_memory, resident_bytes

keep_freed_memory()
tensor, held = torch.empty(1 << 26), resident_bytes()
keep_freed_memory()
assert resident_bytes() - held < 1 << 28, "the heap that is asked for is touched"
for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)[1:]:
    first, last = (int(address, 16) for address in mapping.split()[0].split("-"))
    if first < tensor.data_ptr() + tensor.nbytes <= last:  # the beginning may lie where the heap was before
        assert " hg" in mapping[mapping.index("VmFlags:") :], mapping
        break
else:
    raise AssertionError("the tensor is in no mapping")
"""


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages")
def test_tensors_may_lie_on_huge_pages():
    """In a process of its own: where a tensor lies depends on all that a process has allocated before."""
    done = subprocess.run([sys.executable, "-c", HUGE_PAGES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
