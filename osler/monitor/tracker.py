"""A tracker in a separate process, so that nothing it does costs the run a step.

A library that talks to a network installs signal handlers, patches how processes start, holds the end of the program until its
uploads are done, hangs, and crashes. Here it does that in a child process, which reads one JSON line for each call from a pipe
and prints into a file in the run folder. The run never waits for the pipe: calls that do not fit wait in a bounded queue. When
the queue is full, further calls are dropped and counted; their numbers are still in ``metrics.jsonl``. At the end of the run the
child has a few seconds to finish, and then continues alone for at most ``LINGER_SECONDS``.
"""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from osler.monitor.alerts import Alert

logger = logging.getLogger(__name__)

QUEUE_BYTES = 4 * 2**20  # bytes of lines that may wait for the pipe
PIPE_BYTES = 2**16  # bytes written at once
CLOSE_SECONDS = 8.0  # how long the end of a run waits for all its trackers together
LINGER_SECONDS = 300.0  # how long a tracker may outlive the run's process


class Tracker:
    """A destination for metrics and alerts, in the child process. Every method may raise, and may be slow."""

    def write(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """Take the finite metrics of a step."""

    def alert(self, alert: Alert) -> None:
        """Take an alert; raises UndeliveredError when it did not arrive but the next may."""

    def close(self) -> None:
        """Finish the calls that were received."""


class UndeliveredError(Exception):
    """An alert that did not arrive; the tracker is tried again with the next alert."""


class TrackerProcess:
    """The tracker ``module:Class(*arguments)`` in a child process; no method but ``close`` raises or waits."""

    def __init__(self, name: str, target: str, printed: Path, *arguments: Any) -> None:
        """``name`` is the tracker's name in messages; ``printed`` is the file for what it prints."""
        self.name, self.printed = name, printed
        self.dropped = 0  # lines
        self.is_gone = False  # the tracker has ended, was given up, or was closed
        self._is_ending = self._has_warned = False
        self._unsent = bytearray()
        serving = f"import sys; sys.path[:] = {sys.path!r}\nfrom osler.monitor.tracker import serve; serve()"
        try:
            printed.parent.mkdir(parents=True, exist_ok=True)
            with printed.open("wb") as file:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", serving],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=file,
                    bufsize=0,
                    start_new_session=True,  # a Ctrl-C is meant for the run alone
                )
            assert self.process.stdin is not None and self.process.stdout is not None
            self._to_child, self._from_child = self.process.stdin, self.process.stdout
            for pipe in (self._to_child, self._from_child):
                os.set_blocking(pipe.fileno(), False)
        except OSError as error:
            self._give_up(f"could not be started ({error})")
        self._send(target, arguments)  # not on the command line, which other users can read

    def write(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """Hand on a line of metrics, which must be finite."""
        self._send("write", {"step": step, "tokens": tokens, "metrics": dict(metrics)})

    def alert(self, alert: Alert) -> None:
        """Hand on an alert."""
        self._send("alert", asdict(alert))

    def end(self) -> None:
        """Say that nothing more comes, without waiting for the tracker to finish."""
        if not self._is_ending:
            self._is_ending = True
            self._send("close", {})

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Wait at most ``seconds`` until the tracker has finished, and log what did not arrive. Closing twice is fine."""
        self.end()
        if self.is_gone:
            return
        deadline = time.monotonic() + seconds
        while not (is_gone := self._exchange()) and time.monotonic() < deadline:
            time.sleep(0.01)
        if not is_gone:
            logger.warning(
                f"{self.name} has not finished within {seconds:.3g} s; the run waits no longer. All of it is in the run folder."
            )
        elif self.dropped:
            logger.warning(f"{self.name} was too slow for {self.dropped} lines; they are only in metrics.jsonl.")
        self.is_gone = True
        self._to_child.close()
        self._from_child.close()

    def _send(self, call: str, given: Any) -> None:
        if self._exchange():
            return
        line = json.dumps([call, given], allow_nan=False).encode("utf-8") + b"\n"
        if len(self._unsent) + len(line) > QUEUE_BYTES and not self._is_ending:
            self.dropped += 1
            return
        self._unsent += line
        self._flush()

    def _flush(self) -> None:
        """Write what the pipe takes."""
        try:
            while self._unsent and (sent := self._to_child.write(self._unsent[:PIPE_BYTES])):
                del self._unsent[:sent]
        except OSError:  # the child has ended; its report or its exit code says why
            self._unsent.clear()

    def _exchange(self) -> bool:
        """Write what the pipe takes, read the child's reports, log the new ones, and return whether the tracker is gone."""
        if self.is_gone:
            return True
        self._flush()
        code = self.process.poll()
        for is_final, reason in map(json.loads, (self._from_child.read() or b"").splitlines()):
            if is_final:
                self._give_up(f"failed ({reason}; more in {self.printed})")
            elif not self._has_warned:
                self._has_warned = True
                logger.warning(f"{self.name} failed ({reason}). The run goes on; the next alert tries it again.")
        if self.is_gone or (self._is_ending and code == 0):
            self.is_gone = True
        elif code is not None:
            self._give_up(f"failed (exit code {code}; more in {self.printed})")
        return self.is_gone

    def _give_up(self, what: str) -> None:
        self.is_gone = True
        logger.warning(f"{self.name} {what}. The run goes on without it.")


def serve() -> None:
    """In the child: open the tracker and make the calls that come in, until the run closes it or is gone."""
    threading.Thread(target=_leave_after, args=(os.getppid(),), daemon=True).start()
    to_run = os.dup(1)
    os.dup2(2, 1)  # what the library prints goes to the file

    def tell(is_final: bool, reason: str) -> None:
        os.write(to_run, json.dumps([is_final, reason[:300]]).encode("utf-8") + b"\n")

    try:
        target, arguments = json.loads(sys.stdin.readline())
        module, _, name = target.partition(":")
        tracker: Tracker = getattr(import_module(module), name)(*arguments)
        for call, given in map(json.loads, sys.stdin):
            if call == "close":
                break
            try:
                tracker.alert(Alert(**given)) if call == "alert" else tracker.write(**given)
            except UndeliveredError as error:
                tell(False, str(error))
        tracker.close()
    except BaseException as error:
        tell(True, f"{type(error).__name__}: {error}")
        raise


def _leave_after(parent: int) -> None:
    """End this process some time after its parent, whatever it is doing: nobody would look for a process that hangs."""
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(LINGER_SECONDS)
    os._exit(1)
