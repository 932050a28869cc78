"""Named tensors in the safetensors format, hashed as they are written.

The format (https://huggingface.co/docs/safetensors) is eight bytes with the length of the header, a JSON header, then the raw
bytes. A checkpoint needs three things that the library's ``save_file`` does not give: a hash of the tensors and not of what was
read back, only one tensor at a time off the device, and an ordinary OSError when the disk is full. Tensors that share memory are
written once per name. The library reads the files. Values are exact.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osler.runtime.errors import UserError
from osler.runtime.faults import fault
from osler.runtime.files import no_pause, open_durable

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

_BLOCK_BYTES = 16 << 20


def write_tensors(path: Path, tensors: Mapping[str, Tensor], pause: Callable[[], None] = no_pause) -> tuple[int, str]:
    """Write one safetensors file, durably, and return its size in bytes and hex SHA-256; ``pause`` is called after each block.

    Raises OSError when the disk refuses, and TypeError for a tensor that is sparse or of a dtype without a name in the format.
    """
    # Wide types first, so that every tensor is aligned to the size of its elements without holes.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header = _header(ordered)
    with open_durable(path) as file:
        digest = hashlib.sha256()
        size = 0
        for block in _blocks(header, (tensor for _, tensor in ordered)):
            file.write(block)
            digest.update(block)
            size += len(block)
            pause()
    return size, digest.hexdigest()


def _header(ordered: Iterable[tuple[str, Tensor]]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in ordered:
        if tensor.layout != torch.strided or tensor.dtype not in DTYPE_NAMES:
            raise TypeError(f"Tensor {name!r} ({tensor.dtype}, {tensor.layout}) has no safetensors form.")
        end = start + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _blocks(header: bytes, tensors: Iterable[Tensor]) -> Iterator[bytes | memoryview]:
    yield header
    fault("save-tensors")
    for tensor in tensors:
        if tensor.numel() == 0:
            continue
        flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
        if sys.byteorder == "big":
            flat = flat.reshape(-1, tensor.element_size())[:, ::-1].copy().reshape(-1)
        view = flat.data
        for start in range(0, len(view), _BLOCK_BYTES):
            yield view[start : start + _BLOCK_BYTES]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file to CPU memory; raises UserError naming the file when it is not one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}.") from error
