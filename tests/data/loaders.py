"""What the tests of batches share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from osler.data.curriculum import lay_out
from osler.data.loader import Batch, Loader
from osler.data.mixture import Mixture
from osler.data.packing import MixedPacking, StreamPacking, WholePacking


def loader_of(packing: StreamPacking | WholePacking | MixedPacking, rows: int, *, rank: int = 0, world_size: int = 1,
              workers: int = 0) -> Loader:  # fmt: skip
    """Return the loader of a run without a curriculum."""
    mixed = packing if isinstance(packing, MixedPacking) else MixedPacking({"notes": packing}, Mixture([1]))
    timeline = lay_out([], seq_len=packing.seq_len, batch_tokens=rows * packing.seq_len)
    return Loader(timeline, [mixed], rank, world_size, workers)


def same(left: Batch, right: Batch) -> bool:
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in ("ids", "labels", "document_ids"))


def joined(parts: Sequence[Batch]) -> Batch:
    return Batch(*(torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "labels", "document_ids")))
