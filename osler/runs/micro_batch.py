"""The micro-batch of a run: when memory runs out in a pass, all ranks halve it and make the step again.

A step adds up the gradients of its passes, so it learns from the same batch, and its numbers differ by rounding only. A limit
holds from the update on in which memory ran out (a step of GRPO may have several), also after a rollback or a resume, because the
run's events hold it. So resume is exact. A start with another ``micro_batch_tokens`` begins with that.

A rank alone knows that its memory has run out, and the others would wait for its gradients. So the first steps of each shape
are made in two parts where the strategy allows that: every pass leaves its gradient on the rank, then the ranks vote, and only
then they exchange gradients. In later steps, and with FSDP or DeepSpeed, whose ranks talk to each other in every pass, the run
ends with an error, and the same command goes on with the smaller micro-batch.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable
from typing import TypeVar

from osler.records.jsonl import OUT_OF_MEMORY, EventLog, read_events, recorded_limits
from osler.runs.process import Learner, Run
from osler.runtime.device import is_out_of_memory
from osler.runtime.errors import UserError
from osler.runtime.world import EXIT_LOST

logger = logging.getLogger(__name__)

T = TypeVar("T")
VOTED_STEPS = 8  # from the second step on the optimizer's moments are there too, and gaps between tensors grow for a while


class MicroBatchLimit:
    """Limits the tokens of a forward pass of one process, as configured or less.

    Every rank has an instance; rank 0 writes and logs, or the rank that ends the run. Without a ``run`` nothing is recorded.
    """

    def __init__(
        self, learner: Learner, tokens: int | None, run: Run | None = None, step: Callable[[], int] = lambda: 1
    ) -> None:
        """``tokens`` is the configured limit, None for none. ``step`` returns the number of the step that is made, from 1."""
        self.learner, self.configured, self.run, self.step = learner, tokens, run, step
        self.world = learner.engine.world
        self.limits: list[tuple[tuple[int, int], int]] = []  # the step and its update from which a limit holds, and its tokens
        self.made = Counter[Hashable]()  # steps that were made with each limit and shape
        if run is not None:
            self.limits = self.world.broadcast_from_first(lambda: recorded_limits(read_events(run.folder.events), tokens))

    def tokens(self, update: int = 1) -> int | None:
        """Return the limit in an update (1, 2 ...) of the step that is made."""
        found = [tokens for start, tokens in self.limits if start <= (self.step(), update)]
        return min(found, default=self.configured)

    def make(
        self,
        passes: Callable[[int | None, bool], T],
        halved: Callable[[int | None], int | None],
        shape: Hashable | None = None,
        update: int = 1,
    ) -> T:
        """Return what ``passes(tokens, apart)`` returns, which makes all passes of an update; repeat it when memory runs out.

        With ``apart`` every pass leaves its gradient on the rank, also the last one. ``halved`` returns a limit with which passes
        are smaller, the same on all ranks, or None when each has one row. Steps of one ``shape`` take the same memory; a step
        without is like no other. Raises UserError where memory ran out and the passes cannot be smaller, or the other ranks
        cannot know.
        """
        exchange = self.learner.engine.exchange
        while True:
            tokens = self.tokens(update)
            is_new = shape is None or self.made[tokens, shape] < VOTED_STEPS
            apart = self.world.size > 1 and exchange is not None and is_new
            result, problem = self._attempt(passes, tokens, apart)
            if apart and not all(self.world.all_reduce_min(result is not None)):
                result = None  # another rank has no memory
            if result is not None:
                if apart and exchange is not None:
                    exchange()
                self.made[tokens, shape] += 1
                return result
            self.learner.engine.discard(self.learner.optimizer)
            goes_on = apart or self.world.size == 1
            self._halve(halved(tokens), problem or "on another rank", update, goes_on=goes_on)

    def _attempt(self, passes: Callable[[int | None, bool], T], tokens: int | None, apart: bool) -> tuple[T | None, str]:
        """Return the result of the passes, or None and the words of the allocator, when the tensors of the pass are gone."""
        try:
            return passes(tokens, apart), ""
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None, words_of(error)

    def _halve(self, tokens: int | None, problem: str, update: int, *, goes_on: bool) -> None:
        """Take a lower limit from this update on and record it; raises UserError when there is none or the run cannot go on."""
        if tokens is None:
            raise UserError(
                f"The memory is too small for a step with one row at once ({problem}). Compute activations again "
                "(recompute=selective, then full), take shorter rows (seq_len) or a smaller model. More GPUs share the "
                "rows and, with parallel.type=fsdp, the weights; a single row is never split over them (no context parallelism)."
            )
        step = self.step()
        self.limits.append(((step, update), tokens))
        message = (
            f"Memory ran out in a pass ({problem}). From this step on a pass has at most {tokens:,} tokens (micro_batch_tokens="
            f"{tokens}), and a step makes more passes. The batch is the same, so the numbers change by rounding only."
        )
        if self.run is not None and (self.world.is_first or not goes_on):
            events = self.run.events if self.world.is_first else EventLog(self.run.folder.events)  # no other rank knows of it
            events.write(
                step, "incident", OUT_OF_MEMORY, message, update=update, micro_batch_tokens=tokens, configured=self.configured
            )
            logger.warning(f"step {step}: {message}")
        if not goes_on:
            error = UserError(
                f"Memory ran out in a pass ({problem}), in a step in which the other processes could not know. The same command "
                f"goes on with passes of at most {tokens:,} tokens."
            )
            error.exit_code = EXIT_LOST
            raise error


def words_of(error: BaseException) -> str:
    """Return what an allocator said, in one line without the place in its code."""
    first = (str(error).strip().splitlines() or ["MemoryError"])[0]
    return first.rpartition("DefaultCPUAllocator: ")[2].rstrip(".")
