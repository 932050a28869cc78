"""Processes that tokenise parts side by side; the results come in the order of the parts, whatever the number of processes.

The processes take the parts in turn. A process works some parts ahead of the results that were taken from it, and then pauses. It
ends when its pipes close, so no process outlives the program, however the program ends.
"""

from __future__ import annotations

import itertools
import logging
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from osler.data.documents import Corpus
from osler.data.tokenise import Chunk, PartEnd, Task, Tokeniser
from osler.files.find import log_once
from osler.runtime.child import running
from osler.runtime.errors import UserError
from osler.tokenizer.bpe import Tokenizer

AHEAD = 4  # parts per process that are being tokenised, or finished but not taken
CHUNKS = 16  # results that may wait in a process: those of about `AHEAD` parts, but few of a large compressed file
FEWER = (
    "The same command goes on from what is written. Fewer processes need less memory: `osler data prepare` has --workers for "
    "that, and a run with data.type=prepared trains on its shards."
)
MOST_PROCESSES = 16
WORTHWHILE_BYTES = 1 << 25  # smaller files are tokenised faster than processes start
ONE_CORE = {name: "1" for name in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS")}


def process_count(num_bytes: int) -> int:
    """Return how many processes are worth while for `num_bytes` of files; 0 means that this process does the work."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if num_bytes < WORTHWHILE_BYTES or cores == 1 else min(cores, MOST_PROCESSES)


def tokenise(
    corpora: Sequence[Corpus], tokenizer: Tokenizer | None, tasks: Iterable[Task], processes: int
) -> Generator[tuple[Task, Chunk | PartEnd], None, None]:
    """Yield what `Tokeniser` makes of the tasks, in their order; with 0 `processes`, this process does the work."""
    if not processes:
        tokeniser = Tokeniser(corpora, tokenizer)
        yield from ((task, result) for task in tasks for result in tokeniser.results(task))
        return
    setup = pickle.dumps((corpora, None if tokenizer is None else tokenizer.to_bytes()))
    workers: list[subprocess.Popen[bytes]] = []
    waiting: deque[tuple[Task, subprocess.Popen[bytes]]] = deque()
    remaining = iter(tasks)
    with ExitStack() as stack:
        for number in itertools.count():
            task = next(remaining, None)
            if task is not None:
                if number < processes:
                    try:
                        workers.append(stack.enter_context(running("osler.data.workers", env=ONE_CORE)))
                    except OSError as error:
                        what = f"A process that prepares the data could not be started: {error.strerror}. {FEWER}"
                        raise UserError(what) from error
                    _send(workers[-1], setup)
                waiting.append((task, workers[number % processes]))
                _send(waiting[-1][1], pickle.dumps(task))  # much smaller than a pipe, so that this never waits
            if task is None or len(waiting) == AHEAD * processes:
                if not waiting:
                    return
                yield from ((waiting[0][0], result) for result in _results(waiting[0][1]))
                waiting.popleft()


def _send(worker: subprocess.Popen[bytes], data: bytes) -> None:
    assert worker.stdin is not None
    try:
        worker.stdin.write(data)
        worker.stdin.flush()
    except OSError:
        raise _death(worker) from None


def _results(worker: subprocess.Popen[bytes]) -> Generator[Chunk | PartEnd, None, None]:
    """Yield the results of the next part of a process, and log its messages; raises the error that it met."""
    assert worker.stdout is not None
    result = None
    while not isinstance(result, PartEnd):
        try:
            result = pickle.load(worker.stdout)
        except (EOFError, pickle.UnpicklingError):
            raise _death(worker) from None
        if isinstance(result, UserError):
            raise result
        if isinstance(result, str):
            log_once(result)
        else:
            yield result


def _death(worker: subprocess.Popen[bytes]) -> Exception:
    """Return the error that says how a process ended."""
    code = worker.wait()
    if code == -9:
        return UserError(f"A process that prepares the data was killed, most often for want of memory. {FEWER}")
    return RuntimeError(f"A process that prepares the data ended with exit code {code}; what it said is above.")


def serve() -> None:
    """Tokenise the parts that come through standard input; a thread writes results and messages to standard output."""
    pipe, results = os.fdopen(os.dup(1), "wb"), queue.Queue[bytes](CHUNKS)
    os.dup2(2, 1)  # prints of libraries go to standard error
    messages = logging.Handler()  # sends messages to the parent, which logs them
    messages.emit = lambda record: results.put(pickle.dumps(record.getMessage()))  # type: ignore[method-assign]
    logging.getLogger("osler").addHandler(messages)
    logging.getLogger("osler").setLevel(logging.INFO)

    def write() -> None:
        with suppress(BrokenPipeError):
            while True:
                pipe.write(results.get())
                pipe.flush()
        os._exit(1)  # the parent is gone

    threading.Thread(target=write, daemon=True).start()
    corpora, tokenizer = _received()
    tokeniser = Tokeniser(corpora, None if tokenizer is None else Tokenizer.from_bytes(tokenizer))
    while True:
        try:
            for result in tokeniser.results(_received()):
                results.put(pickle.dumps(result))
        except UserError as error:  # an error that a person can mend; the parent ends this process
            results.put(pickle.dumps(error))


def _received() -> Any:
    """Return the next object that the parent sends; end at a torn one, which a killed parent leaves."""
    try:
        return pickle.load(sys.stdin.buffer)
    except (EOFError, pickle.UnpicklingError):
        os._exit(0)


if __name__ == "__main__":
    serve()
