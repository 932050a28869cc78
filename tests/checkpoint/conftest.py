"""What the checkpoint tests share: checkpoints to save and to damage, and faults to strike in between."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from osler.checkpoint.folders import folder_name, mark_best, rotate
from osler.checkpoint.store import save


def tensors_of(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of a step's checkpoint."""
    generator = torch.Generator().manual_seed(step)
    model = {"weight": torch.randn(300, 100, generator=generator), "bias": torch.randn(7, generator=generator)}
    return {"model": model, "optimizer": {"weight/exp_avg": model["weight"] / 3, "weight/step": torch.tensor(float(step))}}


def put(root: Path, step: int, *, keep_last: int = 3, best: bool = False, **options) -> Path:
    """Save a checkpoint and rotate, as a run does."""
    path = save(
        root,
        step,
        tensors=tensors_of(step),
        state={"step": step, "tokens": 4096 * step},
        files={"tokenizer.json": b'{"vocab": {}}' * 20, "config.yaml": b"seed: 1\n"},
        **options,
    )
    if best:
        mark_best(path, "eval/loss", 0.5)
    rotate(root, path, keep_last)
    return path


def folder(root: Path, step: int) -> Path:
    return root / folder_name(step)


def steps(root: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in root.glob("step-*"))


def flip(path: Path, index: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[index] ^= 0x41
    path.write_bytes(data)


def rot_silently(path: Path) -> None:
    """Change a byte under unchanged names and times, as a disk does."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    flip(path)
    os.utime(path, ns=times)
