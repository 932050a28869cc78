"""What the process holds is told, and files that it maps are not of it."""

from __future__ import annotations

import mmap
import sys

import numpy as np
import pytest
import torch

from osler.runtime.memory import peak_bytes, resident_bytes

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
