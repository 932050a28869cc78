"""Trackers in separate processes, so that nothing they do costs the run a step.

A library that talks to a network installs signal handlers, patches how processes start, holds the end of the program until its
uploads are done, hangs, and crashes. Here it does that in a child process, which follows a file of JSON lines, one for each call,
and prints into another file in the run folder. The run appends to the file and waits for nobody. At the end of the run the
children have a few seconds to finish, and then continue alone for at most ``LINGER_SECONDS``.
"""

import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from osler.monitor.alerts import Alert
from osler.records.jsonl import parse, to_line

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1  # between two looks of a child at the file of calls
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


class Trackers:
    """The trackers of a run by a short name, each in a child process; no method but ``close`` waits, and none raises."""

    def __init__(self, folder: Path, wanted: Mapping[str, Sequence[Any]]) -> None:
        """Start the trackers, of each ``module:Class`` with arguments that may be secret; they print into ``folder``."""
        self.folder = folder
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._failed: set[str] = set()
        try:
            if wanted:
                self._start(wanted)
        except OSError as error:
            logger.warning(f"monitor.{' and monitor.'.join(wanted)} could not be started ({error}). The run goes on.")

    def _start(self, wanted: Mapping[str, Sequence[Any]]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        # Other users can read a command line, and not this file, which loses its name once every child has opened it.
        self._calls = tempfile.NamedTemporaryFile(dir=self.folder, buffering=0, delete=False)  # noqa: SIM115 - open to the end
        for name in wanted:
            serving = f"from osler.monitor.tracker import serve; serve({name!r}, {os.getpid()})"
            with open(self._calls.name, "rb") as calls, self._printed(name).open("wb") as printed:
                self.running[name] = subprocess.Popen(
                    [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}\n{serving}"],
                    stdin=calls,
                    stdout=subprocess.PIPE,
                    stderr=printed,
                    bufsize=0,
                    start_new_session=True,  # a Ctrl-C is meant for the run alone
                )
            os.set_blocking(self.running[name].stdout.fileno(), False)  # type: ignore[union-attr]
        os.unlink(self._calls.name)
        self.send("open", wanted)

    def _printed(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def send(self, call: str, given: Mapping[str, Any]) -> None:
        """Hand on a call: ``write`` with finite metrics, ``alert``, or ``close``."""
        self._look()
        if self.running:
            with suppress(OSError):  # a full disk, which metrics.jsonl tells of; the newline in front ends a torn line
                self._calls.write(f"\n{to_line({call: given})}".encode("utf-8", "backslashreplace"))

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
                logger.warning(f"monitor.{name} failed ({failures[0]}; more in {self._printed(name)}). The run goes on.")
            if code is not None:
                del self.running[name]


def serve(name: str, parent: int) -> None:
    """In the child: open the tracker and make the calls that come in, until the run closes it or is gone."""
    threading.Thread(target=_leave_after, args=(parent,), daemon=True).start()
    to_run = os.dup(1)
    os.dup2(2, 1)  # what the library prints goes to the file
    calls = follow(parent)
    try:
        target, *arguments = next(calls)["open"][name]
        module, _, kind = target.partition(":")
        tracker: Tracker = getattr(import_module(module), kind)(*arguments)
        for (call, given), in map(dict.items, calls):
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


def follow(parent: int) -> Iterator[dict[str, Any]]:
    """Yield the calls that the process ``parent`` appends to this process's standard input, until that process is gone."""
    line = b""
    while True:
        is_last = os.getppid() != parent
        line += sys.stdin.buffer.readline()
        if line.endswith(b"\n"):
            if call := parse(line):
                yield call
            line = b""
        elif is_last:
            return
        else:
            time.sleep(POLL_SECONDS)


def _leave_after(parent: int) -> None:
    """End this process some time after its parent, whatever it is doing: nobody would look for a process that hangs."""
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(LINGER_SECONDS)
    os._exit(1)
