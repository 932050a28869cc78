"""Training on data that are still being prepared.

Where the order comes to shards that are not written yet, ShardSet, Order and packings raise NotPreparedYet. The ranks then wait
together, because a step needs all of them. Only rank 0 looks after the process that prepares (`preparer.py`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import TypeVar

from osler.checkpoint.folders import STATE, by_age
from osler.data.consumed import ConsumedData
from osler.data.loader import Batch, StagedLoader, WorkAhead
from osler.data.order import Order
from osler.data.preparer import GIGABYTE, PAUSED
from osler.data.shard_set import NotPreparedYet, ShardSet, evict, num_evicted
from osler.data.shards import read_data_manifest
from osler.data.writing import bytes_read
from osler.runtime.errors import UserError
from osler.runtime.files import read_json
from osler.runtime.stop import AskedToStop, asked
from osler.runtime.world import World

logger = logging.getLogger(__name__)

T = TypeVar("T")
POLL_SECONDS = 0.05
STUCK_SECONDS = 300.0  # of a wait for a preparation that has no room
TOLERANCE = 1.1  # of how large a source will be
PATIENCE_SECONDS = 1.0  # before the reason for a wait is told; it is told again after four times as long, and so on


def untended(seconds: float) -> None:
    """Look after no preparation: another rank does, or there is none."""


def wait_together(attempt: Callable[[], T], world: World, who: str, tend: Callable[[float], None] = untended) -> T:
    """Return what `attempt` returns, as soon as it raises NotPreparedYet on no rank any more; say why `who` waits.

    `tend` looks after the preparation; it is called before every attempt with the seconds of the wait so far. Raises
    AskedToStop on every rank when one of them is asked to stop while they wait.
    """
    found: list[T] = []
    began, patience, reason = time.monotonic(), PATIENCE_SECONDS, "other processes wait for theirs"
    while True:
        tend(time.monotonic() - began)
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


def wait_for_batches(
    batches: WorkAhead, shards: Sequence[ShardSet], world: World, tend: Callable[[float], None] = untended
) -> Generator[Batch, None, None]:
    """Yield the batches; the ranks wait together for those that are not prepared yet."""
    with closing(batches):
        is_prepared = False
        while not is_prepared:
            yield wait_together(lambda: next(batches), world, "Training", tend)
            (all_complete,) = world.all_reduce_min(all(part.is_complete for part in shards))
            is_prepared = bool(all_complete)
        yield from batches


class DiskBudget:
    """Deletes the shards that a run has done with, when the preparation has no room for more.

    Those are the shards before the window that the oldest checkpoint to resume from stands in, of sources that the run does not
    read again. While a source is being prepared, how large it will be is reckoned from the share of its files that was read.
    """

    def __init__(
        self, folder: Path, gigabytes: float, loader: StagedLoader, checkpoints: Path, *, keep_last: int, total_tokens: int
    ) -> None:
        self.folder, self.gigabytes, self.loader, self.checkpoints = folder, gigabytes, loader, checkpoints
        self.keep_last = keep_last
        self.planned = ConsumedData(loader).planned_tokens(total_tokens)

    def make_room(self, waited: float) -> None:
        """Delete shards when the preparation is paused; raises UserError when no shard can go and the run has waited long."""
        if not (self.folder / PAUSED).exists():
            return
        sizes = {name: self._tokens_in_all(name, shards) for name, shards in self.loader.sources.items()}
        once = [name for name, size in sizes.items() if self.planned[name] <= TOLERANCE * size]
        done = self._done_with() if once else {}
        for name in once:
            shards = self.loader.sources[name]
            first = Order(shards, 0).first_shard(done[name])
            if first > num_evicted(shards.folder):
                evict(shards.folder, first)
                return
        if not once or waited > STUCK_SECONDS:
            needed = sum(size * self.loader.sources[name].token_bytes for name, size in sizes.items())
            again = [f"{name} {self.planned[name] / size:.1f} times" for name, size in sizes.items() if name not in once]
            why = f"the run reads {', '.join(again)}" if again else "from the oldest checkpoint on, more is needed at once"
            raise UserError(
                f"data.disk_budget_gb={self.gigabytes:g} is too small: {why}. All shards take about {needed / GIGABYTE:.2g} GB: "
                "set it higher, set total_tokens lower, or save checkpoints more often."
            )

    def _tokens_in_all(self, name: str, shards: ShardSet) -> float:
        """Return how many tokens a source has, or about how many it will have."""
        shards.refresh()
        if shards.is_complete:
            return shards.num_tokens
        content = read_data_manifest(self.folder)["sources"][name]["content"]
        return shards.num_tokens * sum(size for _, size, _ in content["files"]) / max(1, bytes_read(shards.folder.parent))

    def _done_with(self) -> dict[str, int]:
        """Return the tokens of each source before the oldest checkpoint that a start or a rollback goes back to."""
        timeline, found = self.loader.timeline, []
        for entry in [entry for entry in by_age(self.checkpoints) if not entry.milestone][: self.keep_last]:
            offset, stop = 0, timeline.rows_at(max(0, entry.step - 1)).stop if entry.step else 0
            with suppress(UserError):  # it is damaged, or rotated away in this moment
                offset = read_json(entry.path / STATE)["incidents"]["data_offset"]
            found.append(self.loader.packing(timeline.at_step(max(0, entry.step - 1)), offset).tokens(stop))
        return {name: min((tokens[name] for tokens in found), default=0) for name in self.planned}
