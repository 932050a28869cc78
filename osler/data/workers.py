"""Processes that tokenise parts side by side; the results come in the order of the parts, whatever the number of processes.

Each process is fed and read by a thread through pipes. A process ends when its standard input does, so none outlives the program,
however the program ends. Few results wait to be taken, because a process that is far ahead pauses.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from logging.handlers import BufferingHandler
from typing import IO, Any, BinaryIO

from osler.data.documents import Corpus
from osler.data.tokenise import Chunk, PartEnd, Task, Tokeniser
from osler.files.find import log_once
from osler.runtime.errors import UserError
from osler.tokenizer.bpe import Tokenizer

AHEAD = 4  # parts per process that are in work, or finished but not taken
CHUNKS = 16  # of a part may wait to be taken; only a large compressed file has more
HEADER_BYTES = 8
FEWER = (
    "The same command goes on from what is written. Fewer processes need less memory: `osler data prepare` has --workers for "
    "that, and a run with data.type=prepared trains on its shards."
)
MOST_PROCESSES = 16
WORTHWHILE_BYTES = 1 << 25  # of files; fewer are tokenised faster than processes start


def process_count(num_bytes: int) -> int:
    """Return how many processes are worth while for `num_bytes` of files; 0 means that this process does the work."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if num_bytes < WORTHWHILE_BYTES or cores == 1 else min(cores, MOST_PROCESSES)


@dataclass
class _PendingTask:
    """A task, its results that wait to be taken, and room for more; once it `is_given_up`, nobody takes them any more."""

    task: Task
    results: queue.SimpleQueue[bytes | Exception] = field(default_factory=queue.SimpleQueue)
    room: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(CHUNKS))
    is_given_up: bool = False


def tokenise(
    corpora: Sequence[Corpus], tokenizer: Tokenizer | None, tasks: Iterable[Task], processes: int
) -> Generator[tuple[Task, Chunk | PartEnd], None, None]:
    """Yield what `Tokeniser` makes of the tasks, in their order; with 0 `processes`, this process does the work."""
    if not processes:
        tokeniser = Tokeniser(corpora, tokenizer)
        yield from ((task, result) for task in tasks for result in tokeniser.results(task))
        return
    setup = pickle.dumps((corpora, None if tokenizer is None else tokenizer.to_bytes()))
    todo: queue.SimpleQueue[_PendingTask | None] = queue.SimpleQueue()
    waiting: deque[_PendingTask] = deque()
    workers: list[_Worker] = []
    remaining = iter(tasks)
    try:
        while True:
            while len(waiting) < AHEAD * processes and (task := next(remaining, None)) is not None:
                waiting.append(_PendingTask(task))
                todo.put(waiting[-1])
                if len(workers) < processes:
                    workers.append(_Worker(setup, todo))
            if not waiting:
                return
            pending, result = waiting[0], None
            while not isinstance(result, PartEnd):
                data = pending.results.get()
                pending.room.release()
                result = data if isinstance(data, Exception) else pickle.loads(data)
                if isinstance(result, Exception):
                    raise result
                if isinstance(result, str):
                    log_once(result)
                else:
                    yield pending.task, result
            waiting.popleft()
    finally:
        for worker in workers:  # kill all before the waits below, which a second Ctrl-C may end
            worker.process.kill()
        for pending in waiting:
            pending.is_given_up = True
            pending.room.release()  # for a thread that waits to hand on more
        for _ in workers:
            todo.put(None)
        for worker in workers:
            worker.join()


class _Worker(threading.Thread):
    """A process and the thread that serves it."""

    def __init__(self, setup: bytes, todo: queue.SimpleQueue[_PendingTask | None]) -> None:
        super().__init__(daemon=True, name="tokenise")
        one_core = {name: "1" for name in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS")}
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "osler.data.workers"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, **one_core, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # only this process handles Ctrl-C
            )
        except OSError as error:
            raise UserError(f"A process that prepares the data could not be started: {error.strerror}. {FEWER}") from error
        self._setup, self._todo = setup, todo
        self.start()

    def run(self) -> None:
        """Send tasks and receive results until there are none, or the process is gone."""
        with suppress(OSError), self.process:  # closes the pipes, even if not all was sent, and leaves no zombie
            while (pending := self._todo.get()) is not None:
                try:
                    self._do(pending)
                except (EOFError, OSError):
                    pending.results.put(_death(self.process.wait()))
                    break
                except BaseException as error:  # otherwise the reader of the results would wait for ever
                    pending.results.put(RuntimeError(f"A result of a process that prepares the data was not received: {error!r}"))
                    self.process.kill()
                    raise
            self.process.kill()

    def _do(self, pending: _PendingTask) -> None:
        to_process, from_process = self.process.stdin, self.process.stdout
        assert to_process is not None and from_process is not None
        to_process.write(self._setup)
        self._setup = b""
        pickle.dump(pending.task, to_process)
        to_process.flush()
        while size := int.from_bytes(_exactly(from_process, HEADER_BYTES), "big"):
            if not pending.is_given_up:
                pending.room.acquire()
            pending.results.put(_exactly(from_process, size))


def _exactly(pipe: IO[bytes], size: int) -> bytes:
    """Read `size` bytes; raises EOFError when the other process ends first."""
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _death(code: int) -> Exception:
    """Return the error that says how a process ended."""
    if code == -9:
        return UserError(f"A process that prepares the data was killed, most often for want of memory. {FEWER}")
    return RuntimeError(f"A process that prepares the data ended with exit code {code}; what it said is above.")


def serve() -> None:
    """Tokenise the parts that come through standard input, and write the results to standard output.

    Every result is pickled and follows its length. A length of 0 ends the part.
    """
    tasks, results = _received(sys.stdin.buffer), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # prints of libraries go to standard error
    notes = BufferingHandler(sys.maxsize)  # messages, which the parent logs
    logging.getLogger("osler").addHandler(notes)
    logging.getLogger("osler").setLevel(logging.INFO)

    def send(result: Chunk | PartEnd | UserError) -> None:
        for data in map(pickle.dumps, (*(record.getMessage() for record in notes.buffer), result)):
            results.write(len(data).to_bytes(HEADER_BYTES, "big") + data)
        notes.flush()
        results.flush()

    for corpora, tokenizer in islice(tasks, 1):
        tokeniser = Tokeniser(corpora, None if tokenizer is None else Tokenizer.from_bytes(tokenizer))
        for task in tasks:
            try:
                for result in tokeniser.results(task):
                    send(result)
            except UserError as error:  # an error that a person can mend
                send(error)
            results.write(bytes(HEADER_BYTES))
            results.flush()


def _received(stream: BinaryIO) -> Iterator[Any]:
    """Yield the objects that the parent sends; stop at a torn one, which a killed parent leaves."""
    with suppress(EOFError, pickle.UnpicklingError):
        while True:
            yield pickle.load(stream)


if __name__ == "__main__":
    try:
        serve()
    except BrokenPipeError:
        os._exit(1)  # the parent is gone
