"""Batches for one rank: a pure function of (packings, step). Threads only compute them ahead.

For n rows in a batch, step s (0, 1, ...) of a stage has rows s * n ... (s + 1) * n - 1 of the stage's packing, and rank r of w
takes the r-th of w equal shares of them. So the ranks need not communicate, their number may change between runs, and the state
of a loader is the step. No other module of `osler/data` uses torch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from osler.data.curriculum import Timeline, check_shares
from osler.data.packing import MixedPacking, Packing
from osler.data.shard_set import NotPreparedYet, ShardSet
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


@dataclass
class Loader:
    """The batches of one rank: each span of the timeline has a packing, whose row 0 is the first row of the span.

    `workers` is the number of threads. Raises UserError when the ranks cannot share the rows of a batch equally.
    """

    timeline: Timeline
    packings: Sequence[MixedPacking]
    rank: int = 0
    world_size: int = 1
    workers: int = 0
    pin_memory: bool = False

    def __post_init__(self) -> None:
        check_shares(self.timeline, self.world_size)

    def batch(self, step: int, skipped_tokens: int = 0) -> Batch:
        """Return this rank's rows of the global batch of a step (0, 1, ...); see `packing` for `skipped_tokens`."""
        fault("load-batch")
        rows = self.timeline.rows_at(step)
        share = len(rows) // self.world_size
        batch = make_batch(self.packing(step, skipped_tokens), rows[self.rank * share : (self.rank + 1) * share])
        return batch.pinned() if self.pin_memory else batch

    def batches(self, start_step: int = 0, skipped_tokens: int = 0) -> WorkAhead:
        """Return the batches from a step on, without end; they do not depend on the number of workers."""
        return WorkAhead(partial(self.batch, skipped_tokens=skipped_tokens), self.workers, start_step)

    @property
    def sources(self) -> dict[str, ShardSet]:
        """Return the training data of each source."""
        return {name: packing.order.shards for name, packing in self.packings[0].packings.items()}

    def packing(self, step: int, skipped_tokens: int = 0) -> MixedPacking:
        """Return the packing of the stage of a step, in which each source begins later by its share of the skipped tokens.

        That share is the source's largest in any stage, and the skipped tokens are rounded up to whole rows of the stage. A
        stage reads none of its own rows twice; a later stage may read up to as many tokens twice as are skipped, because its
        rows are permuted anew.
        """
        span = self.timeline.at_step(step)
        shares = map(max, zip(*(packing.mixture.fractions for packing in self.packings), strict=True))
        skipped = [-(-math.ceil(share * skipped_tokens) // span.seq_len) for share in shares]
        of_stage = self.packings[span.number - 1]
        return MixedPacking(of_stage.packings, of_stage.mixture, skipped)

    def tokens_before(self, step: int, skipped_tokens: int = 0) -> dict[str, int]:
        """Return how many tokens of each source are consumed before a step, skipped ones included."""
        last = max(0, step - 1)
        return self.packing(last, skipped_tokens).tokens(self.timeline.rows_at(last).stop if step else 0)

    def first_needed(self, step: int, skipped_tokens: int = 0) -> dict[str, int]:
        """Return for each source the first token that a step or a later one needs.

        After a rollback that may be one of a later stage. The rows by which a stage goes on behind its end follow in order, but
        the next stage permutes its rows anew, and may begin with tokens from before those.
        """
        starts = [step, *(span.first_step for span in self.timeline.spans if span.first_step > step)]
        needed = [self.packing(start, skipped_tokens).first_needed(self.timeline.rows_at(start).start) for start in starts]
        return {name: min(by_stage[name] for by_stage in needed) for name in needed[0]}

    def planned_tokens(self, total_tokens: int) -> dict[str, float]:
        """Return how many tokens of each source a run of `total_tokens` reads, with padding counted as data."""
        found: dict[str, float] = {}
        for span, tokens in self.timeline.shares(total_tokens):
            packing = self.packings[span.number - 1]
            for name, fraction in zip(packing.packings, packing.mixture.fractions, strict=True):
                found[name] = found.get(name, 0.0) + fraction * tokens
        return found

    def bytes_per_token(self, step: int) -> float | None:
        """Return the bytes of text per token before a step; None when only a part of the tokens is learned."""
        return self.packing(step - 1).bytes_per_token(self.timeline.rows_at(step - 1).stop)

    def metrics(self, step: int, steps: int, *, skipped_tokens: int = 0) -> dict[str, float]:
        """Return the metrics of the data before a step, such as the padding of the last `steps` and the epoch of each source.

        Nothing is counted while training, so every rank gets the same numbers, and a resumed run continues them.
        """
        span, stop = self.timeline.at_step(step - 1), self.timeline.rows_at(step - 1).stop
        packing = self.packing(step - 1, skipped_tokens)
        tokens, of_epoch = packing.tokens(stop), packing.epoch_tokens
        target = dict(zip(tokens, packing.mixture.fractions, strict=True))
        epochs = [tokens[name] / size for name, size in of_epoch.items() if size]
        return {
            **({"data/epoch": max(epochs)} if epochs else {}),
            "data/padding_frac": packing.padding(max(0, stop - steps * span.rows_per_batch), stop),
            **source_metrics(tokens=tokens, consumed=tokens, of_epoch=of_epoch, target=target),
        }

    def repeated_share(self, step: int, skipped_tokens: int = 0) -> float:
        """Return the share of a step's tokens that come from sources in a later epoch than their first.

        The size of such a source is known on all ranks once they have agreed on the step's data. Skipped tokens count as read.
        """
        packing, start = self.packing(step, skipped_tokens), self.timeline.rows_at(step).start
        tokens, of_epoch = packing.tokens(start), packing.epoch_tokens
        shares = zip(tokens, packing.mixture.fractions, strict=True)
        return sum(share for name, share in shares if (size := of_epoch[name]) and tokens[name] >= size)

    def check_prepared(self, step: int, skipped_tokens: int = 0) -> None:
        """Raise NotPreparedYet while some rank's data of a step are not prepared."""
        self.packing(step, skipped_tokens).check_prepared(self.timeline.rows_at(step).stop)


class WorkAhead:
    """An endless iterator over the batches from a step on, which threads prepare ahead.

    `next` raises NotPreparedYet while the data of a stream are not there; it may then be called again.
    """

    def __init__(self, batch: Callable[[int], Batch], workers: int, start_step: int) -> None:
        self._batch, self._step, self._workers = batch, start_step, workers
        self._ahead: deque[Future[Batch]] = deque()  # batches of the steps from `_step` on
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
                batch = self._ahead.popleft().result()
            except NotPreparedYet:  # its thread began too early, and so did the threads of later batches
                self._ahead.clear()
                batch = self._batch(self._step)
        self._step += 1
        return batch

    def close(self) -> None:
        """End the threads."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)


def make_batch(packing: Packing, indices: Sequence[int]) -> Batch:
    """Return the rows with these numbers as one batch."""
    rows = [packing.row(index) for index in indices]
    return Batch(*(torch.from_numpy(np.stack(arrays)) for arrays in zip(*rows, strict=True)))


def source_metrics(
    *,
    tokens: Mapping[str, float],
    consumed: Mapping[str, float],
    of_epoch: Mapping[str, float | None],
    target: Mapping[str, float],
) -> dict[str, float]:
    """Return the metrics of each source.

    ``consumed`` and ``of_epoch`` are in one unit (tokens, or questions); ``target`` holds weights relative to one another. A
    source whose epoch is empty, because all its documents are too long, is left out. While a source is still being prepared, its
    epoch is None and not known.
    """
    metrics: dict[str, float] = {}
    for name, size in of_epoch.items():
        if size != 0:
            metrics |= {} if size is None else {f"data/epoch/{name}": consumed[name] / size}
            metrics[f"data/tokens/{name}"] = tokens[name]
            metrics[f"data/target_frac/{name}"] = target[name] / sum(target.values())
            metrics[f"data/consumed_frac/{name}"] = consumed[name] / sum(consumed.values())
    return metrics
