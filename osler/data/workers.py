"""Processes that tokenise parts side by side; the results come in the order of the parts, whatever the number of processes.

Each process is fed and read by a thread through pipes. A process ends when its standard input does, so none outlives the program,
however that ends. Results that are not taken yet are few: a process that is far ahead waits.
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
from typing import Any

from osler.data.documents import Corpus
from osler.data.tokenise import PartEnd, Piece, Task, Tokeniser
from osler.files.find import log_once
from osler.runtime.errors import UserError
from osler.tokenizer.bpe import Tokenizer

AHEAD = 4  # parts per process that are at work or finished and not taken
PIECES = 8  # of a part that wait to be taken
MOST_PROCESSES = 16
WORTHWHILE_BYTES = 1 << 25  # of files: less is tokenised faster than processes start


def process_count(num_bytes: int) -> int:
    """Return how many processes are worth while for so many bytes of files; 0: this process does it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if num_bytes < WORTHWHILE_BYTES or cores == 1 else min(cores, MOST_PROCESSES)


def tokenise(
    corpora: Sequence[Corpus], tokenizer: Tokenizer | None, tasks: Iterable[Task], processes: int
) -> Generator[tuple[Task, Piece | PartEnd], None, None]:
    """Yield what `Tokeniser` makes of the tasks, in their order; 0 processes: in this one."""
    if not processes:
        tokeniser = Tokeniser(corpora, tokenizer)
        for task in tasks:
            for result in tokeniser.results(task):
                yield task, result
        return
    setup = pickle.dumps((corpora, None if tokenizer is None else tokenizer.to_bytes()))
    todo: queue.SimpleQueue[tuple[Task, queue.Queue[Any]] | None] = queue.SimpleQueue()
    waiting: deque[tuple[Task, queue.Queue[Any]]] = deque()
    workers = [_Worker(setup, todo) for _ in range(processes)]
    remaining = iter(tasks)
    try:
        while True:
            while len(waiting) < AHEAD * processes and (coming := next(remaining, None)) is not None:
                waiting.append((coming, queue.Queue(PIECES)))
                todo.put(waiting[-1])
            if not waiting:
                return
            task, results = waiting[0]
            while True:
                result = results.get()
                if isinstance(result, BaseException):
                    raise result
                if isinstance(result, str):
                    log_once(result)
                    continue
                yield task, result
                if isinstance(result, PartEnd):
                    break
            waiting.popleft()
    finally:
        for worker in workers:
            todo.put(None)
            worker.process.kill()
        for worker in workers:
            while worker.is_alive():
                for _, results in waiting:  # a thread may wait for room in one of them
                    while not results.empty():
                        results.get_nowait()
                worker.join(0.05)


class _Worker(threading.Thread):
    """A process and the thread that serves it."""

    def __init__(self, setup: bytes, todo: queue.SimpleQueue[tuple[Task, queue.Queue[Any]] | None]) -> None:
        super().__init__(daemon=True, name="tokenise")
        one_core = {name: "1" for name in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "osler.data.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **one_core, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # only this process handles Ctrl-C
        )
        self._setup, self._todo = setup, todo
        self.start()

    def run(self) -> None:
        """Send tasks and receive results until there are none, or the process is gone."""
        to_process, from_process = self.process.stdin, self.process.stdout
        assert to_process is not None and from_process is not None
        begun: bytes | None = self._setup
        with to_process, from_process:
            while (item := self._todo.get()) is not None:
                task, results = item
                try:
                    to_process.write((begun or b"") + pickle.dumps(task))
                    to_process.flush()
                    begun = None
                    while True:
                        result = pickle.load(from_process)
                        results.put(result)
                        if isinstance(result, (PartEnd, BaseException)):
                            break
                except (EOFError, OSError, pickle.UnpicklingError):
                    results.put(_death(self.process.wait()))
                    return


def _death(code: int) -> Exception:
    if code == -9:
        return UserError(
            "A process that prepares the data was killed, most often for want of memory. The same command goes on; "
            "`osler data prepare --workers 1` needs less."
        )
    return RuntimeError(f"A process that prepares the data ended with exit code {code}; what it said is above.")


class _Notes(logging.Handler):
    """Collects messages, which the parent logs."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def serve() -> None:
    """Tokenise the parts that come through standard input, and write what comes of them to standard output."""
    tasks = sys.stdin.buffer
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints
    notes = _Notes()
    logging.getLogger("osler").addHandler(notes)
    logging.getLogger("osler").setLevel(logging.INFO)
    corpora, tokenizer = pickle.load(tasks)
    tokeniser = Tokeniser(corpora, None if tokenizer is None else Tokenizer.from_bytes(tokenizer))
    while True:
        try:
            task = pickle.load(tasks)
        except EOFError:
            return
        for result in _told(tokeniser.results(task)):
            for text in notes.texts:
                pickle.dump(text, results)
            notes.texts.clear()
            pickle.dump(result, results)
            results.flush()


def _told(results: Iterator[Piece | PartEnd]) -> Iterator[Piece | PartEnd | Exception]:
    """Yield results, and what a person can mend as the last one."""
    try:
        yield from results
    except (UserError, OSError) as error:
        yield error


if __name__ == "__main__":
    try:
        serve()
    except BrokenPipeError:
        os._exit(1)  # the parent is gone
