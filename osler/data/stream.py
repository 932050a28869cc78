"""Training on data that are still being prepared.

Where the order comes to shards that are not written yet, ShardSet, Order and packings raise NotPreparedYet. The ranks then wait
together, because a step needs all of them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import TypeVar

from osler.data.loader import Batch, WorkAhead
from osler.data.shard_set import NotPreparedYet, ShardSet
from osler.runtime.stop import AskedToStop, asked
from osler.runtime.world import World

logger = logging.getLogger(__name__)

T = TypeVar("T")
POLL_SECONDS = 0.05
PATIENCE_SECONDS = 1.0  # before the reason for a wait is told; it is told again after four times as long, and so on


def wait_together(attempt: Callable[[], T], world: World, who: str) -> T:
    """Return what `attempt` returns, as soon as it raises NotPreparedYet on no rank any more; say why `who` waits.

    Raises AskedToStop on every rank when one of them is asked to stop while they wait.
    """
    found: list[T] = []
    began, patience, reason = time.monotonic(), PATIENCE_SECONDS, "other processes wait for theirs"
    while True:
        if not found:
            try:
                found.append(attempt())
            except NotPreparedYet as error:
                reason = str(error)
        all_found, go_on = world.all_reduce_min(bool(found), not asked())
        waited = time.monotonic() - began
        if all_found:
            if waited >= PATIENCE_SECONDS and world.is_first:
                logger.info(f"{who} goes on: it waited {waited:.1f} s for data.")
            return found[0]
        if not go_on:
            raise AskedToStop
        if waited >= patience and world.is_first:
            patience *= 4
            logger.info(f"{who} waits for data, which are still being prepared: {reason}.")
        time.sleep(POLL_SECONDS)


def wait_for_batches(batches: WorkAhead, shards: Sequence[ShardSet], world: World) -> Generator[Batch, None, None]:
    """Yield the batches; the ranks wait together for those that are not prepared yet."""
    with closing(batches):
        is_prepared = False
        while not is_prepared:
            yield wait_together(lambda: next(batches), world, "Training")
            (all_complete,) = world.all_reduce_min(all(part.is_complete for part in shards))
            is_prepared = bool(all_complete)
        yield from batches
