"""Batches for one rank: a pure function of (packing, step), with threads that only work ahead.

The global batch of step s is rows s * n ... (s + 1) * n of the packing, and rank r of w takes the r-th of w equal parts. So the
ranks need not communicate, their number may change between runs, and the state of a loader is the step. A curriculum has one
loader for each stage. This is the only module of `osler/data` that imports torch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch

from osler.data.curriculum import Span, Timeline
from osler.data.packing import MixedPacking, Packing
from osler.data.shard_set import NotPreparedYet, ShardSet
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

    def batches(self, start_step: int = 0) -> WorkAhead:
        """Return the batches from a step on, without end; they do not depend on the number of workers."""
        return WorkAhead(self.batch, self.workers, start_step)


class WorkAhead:
    """An endless iterator over the batches of the steps from one on, which threads prepare ahead.

    ``next`` raises NotPreparedYet while the data of a stream are not there; it may then be called again.
    """

    def __init__(self, batch: Callable[[int], Batch], workers: int, start_step: int) -> None:
        self._batch, self._step, self._workers = batch, start_step, workers
        self._ahead: deque[Future[Batch]] = deque()  # of the steps from `_step` on
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="loader") if workers else None

    def __iter__(self) -> WorkAhead:
        return self

    def __next__(self) -> Batch:
        if self._executor is None:
            batch = self._batch(self._step)
        else:
            while len(self._ahead) < self._workers * BATCHES_AHEAD:
                self._ahead.append(self._executor.submit(self._batch, self._step + len(self._ahead)))
            try:
                batch = self._ahead[0].result()
            except NotPreparedYet:
                self._ahead.clear()  # what comes later is not prepared either
                raise
            self._ahead.popleft()
        self._step += 1
        return batch

    def close(self) -> None:
        """End the threads."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)


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

    def batches(self, start_step: int = 0, skipped_tokens: int = 0) -> WorkAhead:
        """Return the batches from a step of the run on, without end, with the first tokens of the data skipped."""
        spans = zip(self.timeline.spans, self.loaders, strict=True)
        loaders = [replace(loader, packing=self.packing(span, skipped_tokens)) for span, loader in spans]

        def batch(step: int) -> Batch:
            span = self.timeline.at_step(step)
            return loaders[span.number - 1].batch(step - span.first_step)

        return WorkAhead(batch, self.loaders[0].workers, start_step)

    @property
    def sources(self) -> dict[str, ShardSet]:
        """Return the training data of each source."""
        packing = cast(MixedPacking, self.loaders[0].packing)
        return {name: part.order.shards for name, part in packing.packings.items()}

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
