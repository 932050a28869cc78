"""Batches for one rank: a pure function of (packing, step), with threads that only work ahead.

The global batch of step s is rows s * n ... (s + 1) * n of the packing, and rank r of w takes the r-th of w equal parts. So the
ranks need not communicate, their number may change between runs, and the state of a loader is the step. A curriculum has one
loader for each stage. This is the only module of the package that imports torch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import cast

import numpy as np
import torch

from osler.data.curriculum import Span, Timeline
from osler.data.packing import MixedPacking, Packing
from osler.runtime.errors import UserError
from osler.runtime.faults import fault

BATCHES_AHEAD = 2  # per worker


@dataclass(frozen=True)
class Batch:
    """int64 tensors of shape [rows, seq_len]: ids, labels (-100 is not learned), document numbers within each row."""

    ids: torch.Tensor
    labels: torch.Tensor
    document_ids: torch.Tensor

    def pinned(self) -> Batch:
        """Return a copy in pinned memory, from which copies to a GPU do not block."""
        return Batch(self.ids.pin_memory(), self.labels.pin_memory(), self.document_ids.pin_memory())

    @property
    def num_loss_tokens(self) -> int:
        """Return how many labels are learned."""
        return int((self.labels >= 0).sum())


@dataclass(frozen=True)
class Loader:
    """The batches of one rank. `rows_per_batch` counts the rows of all ranks; `workers` is the number of threads.

    `stage` is the number of the curriculum's stage, 0 without a curriculum. Raises UserError when the ranks cannot share the
    rows equally.
    """

    packing: Packing
    rows_per_batch: int
    rank: int = 0
    world_size: int = 1
    workers: int = 0
    stage: int = 0
    pin_memory: bool = False

    def __post_init__(self) -> None:
        check_shares(self.rows_per_batch, self.packing.seq_len, self.world_size, self.stage)

    def batch(self, step: int) -> Batch:
        """Return this rank's rows of the global batch of a step (0, 1, ...)."""
        fault("load-batch")
        rows = self.rows_per_batch // self.world_size
        first = step * self.rows_per_batch + self.rank * rows
        batch = make_batch(self.packing, range(first, first + rows))
        return batch.pinned() if self.pin_memory else batch

    def batches(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """Yield the batches from a step on, without end; they do not depend on the number of workers."""
        if self.workers == 0:
            while True:
                yield self.batch(start_step)
                start_step += 1
        executor = ThreadPoolExecutor(self.workers, thread_name_prefix="loader")
        try:
            ahead: deque[Future[Batch]] = deque()
            while True:
                while len(ahead) < self.workers * BATCHES_AHEAD:
                    ahead.append(executor.submit(self.batch, start_step))
                    start_step += 1
                yield ahead.popleft().result()
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


def check_shares(rows_per_batch: int, seq_len: int, world_size: int, stage: int = 0) -> None:
    """Raise UserError, which names the curriculum's stage if there is one, when ranks cannot share a batch's rows equally."""
    if rows_per_batch < 1 or rows_per_batch % world_size:
        batch = f"Stage {stage} of the curriculum: a batch" if stage else "A batch"
        raise UserError(
            f"{batch} of {rows_per_batch} rows (of {seq_len} tokens) cannot be shared equally by {world_size} ranks; make the "
            f"number of rows a multiple of {world_size}."
        )


@dataclass(frozen=True)
class StagedLoader:
    """The batches of a run: each span of the timeline has its loader, whose step 0 is the first step of the span."""

    timeline: Timeline
    loaders: Sequence[Loader]

    def batches(self, start_step: int = 0, skipped_tokens: int = 0) -> Iterator[Batch]:
        """Yield the batches from a step of the run on, without end, with the first tokens of the data skipped."""
        for span, loader in zip(self.timeline.spans, self.loaders, strict=True):
            first = max(start_step, span.first_step)
            count = None if span.end_step is None else max(0, span.end_step - first)
            shifted = replace(loader, packing=self.packing(span, skipped_tokens))
            with closing(shifted.batches(first - span.first_step)) as batches:
                yield from islice(batches, count)

    def packing(self, span: Span, skipped_tokens: int = 0) -> MixedPacking:
        """Return the packing of a stage, in which each source begins later by its share of the skipped tokens.

        The share is the largest of all stages, so that no stage repeats data of the one before, and less than a row more
        is left out where the rows of the stage do not divide it.
        """
        packings = [cast(MixedPacking, loader.packing) for loader in self.loaders]
        shares = map(max, zip(*(packing.mixture.fractions for packing in packings), strict=True))
        return packings[span.number - 1].skipping([span.rows_in(math.ceil(share * skipped_tokens)) for share in shares])


def make_batch(packing: Packing, indices: Sequence[int]) -> Batch:
    """Return the rows with these numbers as one batch."""
    rows = [packing.row(index) for index in indices]
    return Batch(*(torch.from_numpy(np.stack(arrays)) for arrays in zip(*rows, strict=True)))
