"""Trackers in separate processes, so that nothing they do costs the run a step.

A library that talks to a network installs signal handlers, patches how processes start, holds the end of the program until its
uploads are done, hangs, and crashes. Here it does that in a child process, which reads one JSON line for each call from a pipe
and prints into a file in the run folder. The run puts calls into a queue in memory, which a thread empties into the pipe, and
waits for nobody. At the end of the run the children have a few seconds to finish, and then continue alone for at most
``LINGER_SECONDS``.
"""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

from osler.monitor.alerts import Alert
from osler.records.jsonl import to_line

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 8.0  # how long the end of a run waits for all its trackers together
LINGER_SECONDS = 300.0  # how long a tracker may outlive the run's process


class Tracker:
    """A destination for metrics and alerts, in the child process. Every method may raise, and may be slow.

    It is made from its value in the config, the run folder, and the first step that it will get (0: the run begins).
    """

    def write(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """Take the finite metrics of a step."""

    def alert(self, alert: Alert) -> None:
        """Take an alert; raises UndeliveredError when it did not arrive but the next may."""

    def close(self) -> None:
        """Finish the calls that were received."""


class UndeliveredError(Exception):
    """An alert that did not arrive; the tracker is tried again with the next alert."""


class Trackers:
    """The trackers of a run by a short name, each in a child process; no method but ``close`` waits, and none raises."""

    def __init__(self, folder: Path, wanted: Mapping[str, Sequence[Any]]) -> None:
        """Start each tracker, given as ``module:Class`` and arguments, which may be secret; it prints into ``folder``."""
        self.folder = folder
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._queues: dict[str, SimpleQueue[bytes]] = {}
        self._failed: set[str] = set()
        for name, given in wanted.items():
            try:
                self._start(name)
                # Through the pipe, because other users can read a command line.
                self._queues[name].put(to_line({"open": given}).encode())
            except OSError as error:
                logger.warning(f"monitor.{name} could not be started ({error}). The run goes on.")

    def _start(self, name: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        serving = f"import sys; sys.path[:] = {sys.path!r}\nfrom osler.monitor.tracker import serve; serve()"
        command = [sys.executable, "-c", serving]
        pipe = subprocess.PIPE
        with self._output(name).open("wb") as output:  # in a session of its own, because a Ctrl-C is meant for the run alone
            child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=output, start_new_session=True)
        assert child.stdin is not None and child.stdout is not None
        os.set_blocking(child.stdout.fileno(), False)
        self.running[name], self._queues[name] = child, SimpleQueue()
        threading.Thread(target=_feed, args=(self._queues[name], child.stdin), daemon=True).start()

    def _output(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def send(self, call: str, given: Mapping[str, Any]) -> None:
        """Hand a call to every tracker: ``write`` with finite metrics, ``alert``, or ``close``."""
        self._look()
        for name in self.running:
            self._queues[name].put(to_line({call: given}).encode("utf-8", "backslashreplace"))

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Wait at most ``seconds`` until the trackers have finished, and log which have not. Closing twice is fine."""
        self.send("close", {})
        deadline = time.monotonic() + seconds
        while self.running and time.monotonic() < deadline:
            time.sleep(0.01)
            self._look()
        for name in self.running:
            logger.warning(f"monitor.{name} has not finished within {seconds:.3g} s, and nobody waits for it any longer.")
        self.running.clear()

    def _look(self) -> None:
        """Log the first failure that each child reports, and forget children that have ended."""
        for name, child in list(self.running.items()):
            code = child.poll()
            failures = (child.stdout.read() or b"").decode("utf-8", "replace").splitlines()  # type: ignore[union-attr]
            failures += [f"exit code {code}"] if code else []
            if failures and name not in self._failed:
                self._failed.add(name)
                logger.warning(f"monitor.{name} failed ({failures[0]}; more in {self._output(name)}). The run goes on.")
            if code is not None:
                del self.running[name]


def _feed(calls: SimpleQueue[bytes], pipe: IO[bytes]) -> None:
    """Write calls into the pipe as they come, until the child has ended."""
    with suppress(OSError):
        while True:
            pipe.write(calls.get())
            pipe.flush()


def serve() -> None:
    """In the child: open the tracker and make the calls that come in, until the run closes it or is gone."""
    threading.Thread(target=_leave_after, args=(os.getppid(),), daemon=True).start()
    to_run = os.dup(1)
    os.dup2(2, 1)  # what the library prints goes to the file
    try:
        target, *arguments = json.loads(sys.stdin.readline())["open"]
        module, _, kind = target.partition(":")
        tracker: Tracker = getattr(import_module(module), kind)(*arguments)
        for line in sys.stdin:
            ((call, given),) = json.loads(line).items()
            if call == "close":
                break
            try:
                tracker.alert(Alert(**given)) if call == "alert" else tracker.write(**given)
            except UndeliveredError as error:
                print(error, file=sys.stderr)
                with suppress(BrokenPipeError):  # the run is gone
                    os.write(to_run, f"{error}\n".encode())
        tracker.close()
    except BaseException as error:
        os.write(to_run, f"{type(error).__name__}: {error}\n".encode())
        raise


def _leave_after(parent: int) -> None:
    """End this process some time after its parent, whatever it is doing: nobody would look for a process that hangs."""
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(LINGER_SECONDS)
    os._exit(1)
