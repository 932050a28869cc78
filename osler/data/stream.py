"""Training on data that are still being prepared.

When the order reaches shards that are not written yet, ShardSet, Order and packings raise NotPreparedYet. The ranks then wait
together, because a step needs all of them. They agree on many steps at once, so steps whose data are there cost nothing extra.
Only rank 0 looks after the process that prepares the data (`preparer.py`).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from osler.checkpoint.folders import STATE, by_age
from osler.data.loader import Batch, Loader
from osler.data.order import Order
from osler.data.preparer import GIGABYTE, PAUSED
from osler.data.shard_set import NotPreparedYet, ShardSet, evict, identity_of, num_evicted
from osler.data.shards import read_data_manifest
from osler.data.writing import read_journal
from osler.runtime.errors import UserError
from osler.runtime.files import read_json
from osler.runtime.stop import AskedToStop, asked
from osler.runtime.world import World

logger = logging.getLogger(__name__)

T = TypeVar("T")
POLL_SECONDS = 0.05
PATIENCE_SECONDS = 1.0  # before the log gives the reason for a wait; it does so again after four times as long, and so on
STUCK_SECONDS = 300.0  # the longest wait for a preparation that has no room
STEPS_AGREED = 64  # the ranks agree on at most this many steps at once while data are being prepared
ALL_STEPS = 1 << 62  # more than any run has: all data are prepared
SURE_SHARE = 0.8  # trusted share of the estimate for unread files, which assumes that they are like those that were read


def untended(seconds: float) -> None:
    """Do nothing: another rank looks after the preparation, or there is none."""


def wait_together(attempt: Callable[[], T], world: World, who: str, tend: Callable[[float], None] = untended) -> T:
    """Return what `attempt` returns, as soon as no rank raises NotPreparedYet any more; log why `who` waits.

    `tend` looks after the preparation; it is called before every attempt with the seconds of the wait so far. Raises
    AskedToStop on every rank when one of them is asked to stop while they wait.
    """
    found: list[T] = []
    began, patience, reason = time.monotonic(), PATIENCE_SECONDS, ""
    while True:
        tend(time.monotonic() - began)
        if not found:
            try:
                found.append(attempt())
                reason = "other processes wait for theirs"
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
    loader: Loader, steps: range, world: World, tend: Callable[[float], None] = untended, *, skipped_tokens: int = 0
) -> Generator[Batch, None, None]:
    """Yield the batches from step `steps.start` on, without end; the ranks wait together for data that are not prepared yet.

    The run itself ends before `steps.stop`. Raises UserError when all data are prepared and the run needs shards that were
    deleted to keep within a disk budget.
    """
    step, agreed = steps.start, 0
    with closing(loader.batches(step, skipped_tokens)) as batches:
        while agreed != ALL_STEPS:
            ready = partial(steps_ready, loader, step, skipped_tokens)
            (agreed,) = world.all_reduce_min(wait_together(ready, world, "Training", tend))
            if agreed == ALL_STEPS:
                refuse_deleted(loader, steps.stop, skipped_tokens)
            for _ in range(agreed):
                yield next(batches)
                step += 1
                tend(0.0)


def steps_ready(loader: Loader, step: int, skipped_tokens: int) -> int:
    """Return how many steps, from `step` on, surely have their data: `ALL_STEPS` when all data are prepared.

    Until then they are steps of one stage, in which a later step needs data that are prepared later. So only the last of them is
    checked. Raises NotPreparedYet when the data of `step` are missing.
    """
    for shards in loader.sources.values():
        shards.refresh()
    if all(shards.is_complete for shards in loader.sources.values()):
        return ALL_STEPS
    loader.check_prepared(step, skipped_tokens)
    steps, end = 1, loader.timeline.at_step(step).end_step or math.inf
    with suppress(NotPreparedYet):
        while steps < STEPS_AGREED and step + 2 * steps <= end:
            loader.check_prepared(step + 2 * steps - 1, skipped_tokens)
            steps *= 2
    return steps


def refuse_deleted(loader: Loader, stop: int, skipped_tokens: int) -> None:
    """Raise UserError when shards of a source were deleted and the steps before `stop` read all of its tokens or more.

    A run that reads every token just once is refused too: its last row ends with the first token of the next epoch.
    """
    deleted = {name: shards for name, shards in loader.sources.items() if num_evicted(shards.folder)}
    needed = loader.tokens_before(stop, skipped_tokens) if deleted else {}
    for name, shards in deleted.items():
        if needed[name] >= shards.num_tokens:
            raise UserError(
                f"The run reads {needed[name]:,} tokens of {name}, which has {shards.num_tokens:,}. The first of them were "
                f"deleted to keep within data.disk_budget_gb, because {name} seemed to be larger. Set total_tokens lower, or "
                f"delete {shards.folder.parents[1]} and give the command without data.disk_budget_gb: it prepares all of them."
            )


class DiskBudget:
    """Deletes the shards that a run no longer needs, when the preparation has no room for more and asks for it (`PAUSED`).

    It deletes the shards that no row behind the oldest checkpoint to resume from needs, and only of sources that surely have more
    tokens than the run reads, even if rollbacks skip `spare_tokens` more. While a source is being prepared, the tokens of its
    unread files are estimated from those of the files that were read, and `SURE_SHARE` of the estimate counts.
    """

    def __init__(
        self, folder: Path, gigabytes: float, loader: Loader, checkpoints: Path, *, keep_last: int, total_tokens: int,
        spare_tokens: int,
    ) -> None:  # fmt: skip
        self.folder, self.gigabytes, self.loader, self.checkpoints = folder, gigabytes, loader, checkpoints
        self.keep_last, self.steps, self.spare_tokens = keep_last, loader.timeline.steps_for(total_tokens), spare_tokens
        self.last_basis: object = None  # what the last decision was based on

    def make_room(self, waited: float) -> None:
        """Delete shards when the preparation is paused; `waited` is how many seconds the run has waited for data.

        Raises UserError at once when the run may read every source again, and after `STUCK_SECONDS` when no shard can go.
        """
        basis = identity_of(self.folder / PAUSED), identity_of(self.checkpoints)
        if basis[0] is None or (basis == self.last_basis and waited <= STUCK_SECONDS):
            return
        self.last_basis = basis
        done, needed = self._done_and_needed()
        sure = {name: self._sure_tokens(name, shards) for name, shards in self.loader.sources.items()}
        once = [name for name in sure if needed[name] < sure[name]]
        for name in once:
            shards = self.loader.sources[name]
            first = Order(shards, 0).first_shard(done[name])
            if first > num_evicted(shards.folder):
                evict(shards.folder, first)
                shards.shard.cache_clear()  # a deleted file keeps its room while it is mapped
                (self.folder / PAUSED).unlink(missing_ok=True)
                return
        if not once or waited > STUCK_SECONDS:
            raise UserError(f"data.disk_budget_gb={self.gigabytes:g} is too small: {self._reason(once, needed, sure)}")

    def _reason(self, once: list[str], needed: dict[str, int], sure: dict[str, float]) -> str:
        if once:
            why, remedy = "more shards are needed at once from the oldest checkpoint on", "save checkpoints more often"
        else:
            reads = (f"{tokens:,} tokens of {name}, which surely has {sure[name]:,.0f}" for name, tokens in needed.items())
            why = f"the run may read every source again, rollbacks included, and then needs all shards: {'; '.join(reads)}"
            remedy = "set total_tokens lower"
        size = sum(shards.file_bytes * sure[name] / max(1, shards.num_tokens) for name, shards in self.loader.sources.items())
        return f"{why}. All shards take about {size / GIGABYTE:.2g} GB or more: set the budget higher, or {remedy}."

    def _sure_tokens(self, name: str, shards: ShardSet) -> float:
        """Return how many tokens a source has, or will surely have."""
        shards.refresh()
        if shards.is_complete:
            return shards.num_tokens
        content = read_data_manifest(self.folder)["sources"][name]["content"]
        all_bytes = sum(size for _, size, _ in content["files"])
        read_bytes = read_journal(shards.folder.parent).counts["bytes"]
        return shards.num_tokens * (1 + SURE_SHARE * max(0, all_bytes - read_bytes) / (read_bytes or math.inf))

    def _done_and_needed(self) -> tuple[dict[str, int], dict[str, int]]:
        """Return for each source the first token that the oldest checkpoint to resume from needs, and the tokens of the run."""
        offsets, done = [0], []
        for entry in [entry for entry in by_age(self.checkpoints) if not entry.milestone][: self.keep_last]:
            with suppress(UserError):  # the checkpoint is damaged, or is being rotated away
                offsets.append(read_json(entry.path / STATE)["incidents"]["data_offset"])
                done.append(self.loader.first_needed(entry.step, offsets[-1]))
        needed = self.loader.tokens_before(self.steps, max(offsets) + self.spare_tokens)
        return {name: min((tokens[name] for tokens in done), default=0) for name in needed}, needed
