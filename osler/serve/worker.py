"""The one thread in which models compute. The rows of all requests form a batch: they join, draw a token per step, and leave.

The web server's thread asks for rows with ``draw`` and reads what they drew from a ``Drawing``. One call delivers the new tokens
of all rows, so a client that reads slowly delays nobody: after every step, or while many rows run after the steps of some
milliseconds, because sending a token takes as long as drawing it. A cancelled row draws nothing from the next step on. Only keys
and values of finished rows are kept, for prompts with the same beginning.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from osler.inference.batch import Batch
from osler.inference.engine import InferenceEngine
from osler.inference.load import LoadedModel
from osler.inference.rows import Capabilities, Continuation, Request
from osler.serve.config import MOST_TOP_LOGPROBS, ServeConfig
from osler.serve.errors import ApiError

logger = logging.getLogger(__name__)

JOIN_TOKENS = 2048  # the most prompt tokens that join in one step, because running rows wait for them
# Parameters. Smaller models leave a core to the web server and its clients: their many small operators would each wait for the
# thread on that core (two cores, one client, 1.3 and 6 million parameters: twice the tokens/s so; 88 million: 0.7 times).
SMALL_MODEL = 20_000_000
FEW_ROWS, DELIVERY_SECONDS = 8, 0.05  # more rows get their tokens so long after the last ones at the earliest

T = TypeVar("T")


@dataclass
class Served:
    """A model under its name, with the batch that draws for it."""

    name: str
    ready: LoadedModel
    config: ServeConfig
    batch: Batch = field(init=False)
    rows: dict[int, tuple[Drawing, int]] = field(default_factory=dict)  # by row number of the batch; for the worker's thread only
    delivered: float = 0.0  # time.monotonic() when rows last got their tokens
    outstanding: int = 0  # completions that have not ended; for the web server's thread only

    def __post_init__(self) -> None:
        self.open()

    @property
    def longest_prompt(self) -> int:
        """The most tokens that a prompt may have."""
        room = self.ready.model.config.max_seq_len - 1
        return min(room, self.config.max_prompt_tokens or room)

    @property
    def may_delay(self) -> bool:
        """Whether many rows run; on a CPU, where it is known when a step has ended."""
        return len(self.rows) > FEW_ROWS and self.batch.may_draw and self.batch.decoder.device.type == "cpu"

    @property
    def cache_bytes(self) -> int:
        """The memory of the cache when all rows run."""
        number_bytes = self.batch.decoder.new_cache(1, 1).k.element_size()
        return self.ready.model.config.kv_cache_bytes(self.batch.max_rows, self.batch.slots, number_bytes)

    def room(self, prompt: Sequence[int]) -> int:
        """Return how many tokens can follow a prompt, at least 1."""
        return max(min(self.ready.model.config.max_seq_len - len(prompt), self.config.max_new_tokens), 1)

    def open(self) -> None:
        """Make an empty batch with a copy of the model's weights."""
        config = self.ready.model.config
        can = Capabilities(1, truncates=True, penalises=True, top_logprobs=min(MOST_TOP_LOGPROBS, config.vocab_size))
        slots = config.max_seq_len
        self.batch = InferenceEngine(self.ready.model).open(
            slots,
            min(slots, self.config.max_new_tokens),
            self.config.max_rows,
            can,
            keeps_masks=False,
            join_tokens=JOIN_TOKENS,
        )


class Drawing:
    """The completions of one request while they are drawn. For the web server's thread only."""

    def __init__(self, worker: Worker, served: Served, requests: Sequence[Request]) -> None:
        self._worker, self._served = worker, served
        self._running = set(range(len(requests)))
        self._limits = [request.sampling.max_new_tokens for request in requests]
        self._news: asyncio.Queue[tuple[int, Continuation] | ApiError] = asyncio.Queue()
        served.outstanding += len(requests)

    async def news(self) -> dict[int, Continuation]:
        """Wait for new tokens; return by index what each completion drew since the last call. Raises ApiError on failure."""
        drawn: dict[int, Continuation] = {}
        while not drawn or not self._news.empty():
            item = await self._news.get()
            if isinstance(item, ApiError):
                raise item
            index, new = item
            before = drawn.setdefault(index, Continuation([], [], finished=False))
            joined = before.top_logprobs + new.top_logprobs
            drawn[index] = Continuation(before.ids + new.ids, before.logprobs + new.logprobs, new.finished, None, joined)
        return drawn

    def deliver(self, index: int, continuation: Continuation) -> None:
        """Take over the tokens that a completion drew."""
        if index not in self._running:
            return
        self._news.put_nowait((index, continuation))
        self._limits[index] -= len(continuation.ids)
        if continuation.finished or self._limits[index] <= 0:
            self._leave(index)

    def fail(self, error: ApiError) -> None:
        """Stop drawing, and let ``news`` raise ``error``."""
        if self._running:
            self.cancel()
            self._news.put_nowait(error)

    def cancel(self, index: int | None = None) -> None:
        """Stop drawing one completion, or all; does nothing for those that have ended."""
        given_up = self._running & ({index} if index is not None else self._running)
        if given_up:
            self._worker.cancel(self, self._served, given_up)
        for one in given_up:
            self._leave(one)

    def _leave(self, index: int) -> None:
        self._running.remove(index)
        self._served.outstanding -= 1
        if not self._running:
            self._worker.drawings.discard(self)


class Worker:
    """Computes for all models, in the order of the requests; start it in a running event loop."""

    def __init__(self, models: Sequence[Served], config: ServeConfig) -> None:
        self.models = {served.name: served for served in models}
        self.drawings: set[Drawing] = set()  # those that have not ended
        self._calls: set[asyncio.Future[Any]] = set()  # those that have no result yet
        self.on_end: Callable[[], None] = lambda: None  # called in the web server's thread when the worker has ended
        self._max_outstanding = config.max_outstanding
        # Functions for the worker's thread, each with whether it is slow; None ends the thread.
        self._asked: queue.SimpleQueue[tuple[Callable[[], None], bool] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="osler-serve", daemon=True)
        is_small = all(served.ready.model.config.num_parameters < SMALL_MODEL for served in models)
        self._leaves_core = is_small and "OMP_NUM_THREADS" not in os.environ

    def start(self) -> None:
        """Begin to compute."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the current step, and wait for its end."""
        self._asked.put(None)
        self._thread.join()

    def draw(self, served: Served, requests: Sequence[Request]) -> Drawing:
        """Let requests join the batch of a model. Raises ApiError when too many wait."""
        self._check_alive()
        if served.outstanding + len(requests) > self._max_outstanding:
            raise ApiError(
                429,
                f"{served.outstanding} completions of {served.name} are being drawn or wait, and at most "
                f"{self._max_outstanding} may: try again later, or ask for fewer at once.",
                "overloaded",
                headers={"Retry-After": "1"},
            )
        drawing = Drawing(self, served, requests)
        self.drawings.add(drawing)
        self._asked.put((lambda: self._add(drawing, served, requests), False))
        return drawing

    async def call(self, function: Callable[[], T]) -> T:
        """Call ``function`` in the worker's thread, between two steps; return what it returns and raise what it raises."""
        self._check_alive()
        if len(self._calls) >= self._max_outstanding:
            raise ApiError(429, "Too many questions wait: try again later.", "overloaded", headers={"Retry-After": "1"})
        done: asyncio.Future[T] = self._loop.create_future()
        self._calls.add(done)

        def compute() -> None:
            try:
                result = function()
            except BaseException as error:
                self._tell(_resolve, done, None, error)
                if not isinstance(error, Exception):
                    raise
            else:
                self._tell(_resolve, done, result, None)

        self._asked.put((compute, True))
        try:
            return await done
        finally:
            self._calls.discard(done)

    def cancel(self, drawing: Drawing, served: Served, indices: set[int]) -> None:
        """Remove completions of a drawing from the batch."""

        def give_up() -> None:
            for number in [number for number, row in served.rows.items() if row[0] is drawing and row[1] in indices]:
                served.batch.cancel(number)
                del served.rows[number]

        self._asked.put((give_up, False))

    def _check_alive(self) -> None:
        if not self._thread.is_alive():
            raise ApiError(503, "The server does not compute any more and is about to end.", "stopped")

    def _add(self, drawing: Drawing, served: Served, requests: Sequence[Request]) -> None:
        for index, request in enumerate(requests):
            served.rows[served.batch.add(request)] = (drawing, index)

    def _run(self) -> None:
        if self._leaves_core:
            torch.set_num_threads(max(torch.get_num_threads() - 1, 1))
        try:
            while self._answer():
                for served in self.models.values():
                    if served.batch:
                        self._step(served)
        finally:
            self._tell(self._end)

    def _answer(self) -> bool:
        """Call the functions that wait, at most one slow one; if no row runs, wait for a function. Return False at the end."""
        must_wait = not any(served.batch for served in self.models.values())
        while must_wait or not self._asked.empty():
            asked = self._asked.get()
            if asked is None:
                return False
            function, is_slow = asked
            function()
            must_wait = False
            if is_slow:
                break
        return True

    def _step(self, served: Served) -> None:
        try:
            served.batch.step()
            if served.may_delay and time.monotonic() < served.delivered + DELIVERY_SECONDS:
                return
            news = [(*served.rows[number], drawn) for number, drawn in served.batch.news() if number in served.rows]
            for number, _ in served.batch.collect():
                served.rows.pop(number, None)
        except RuntimeError:  # such as too little memory
            logger.exception(f"{served.name} failed at a step; its requests end with an error, and it starts anew")
        else:
            self._tell(_deliver, news)
            served.delivered = time.monotonic()
            return
        failed = {id(drawing): drawing for drawing, _ in served.rows.values()}
        served.rows.clear()
        del served.batch  # outside of `except`, because the exception holds the batch too: its memory must be free first
        served.open()
        for drawing in failed.values():
            self._tell(drawing.fail, ApiError(500, "The model failed while it computed; see the server's log.", "failed"))

    def _tell(self, function: Callable[..., None], *arguments: object) -> None:
        """Call a function in the web server's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _end(self) -> None:
        stopped = ApiError(503, "The server stopped.", "stopped")
        for drawing in list(self.drawings):
            drawing.fail(stopped)
        for done in self._calls:
            _resolve(done, None, stopped)
        self.on_end()


def _deliver(news: Sequence[tuple[Drawing, int, Continuation]]) -> None:
    for drawing, index, continuation in news:
        drawing.deliver(index, continuation)


def _resolve(done: asyncio.Future[T], result: T, error: BaseException | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(result)
    else:
        done.set_exception(error)
