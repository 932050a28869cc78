"""A sink in a process of its own, for libraries that talk to a network.

Such a library installs signal handlers, patches what starts processes, and holds the end of the program until its uploads are
done. Here it can do all of that, crash included, and the run does not notice: it writes JSON lines into a pipe, one for each
call. At the end of the run the process has a little time to finish and then goes on alone, for at most ``LINGER_SECONDS`` after
the run's own process is gone. What it prints goes to a file in the run folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from osler.monitor.alerts import Alert

LINGER_SECONDS = 300.0


class Outpost:
    """The sink ``module:Class(*arguments)`` in a child process; a call raises OSError when that has ended."""

    def __init__(self, target: str, log: Path, *arguments: Any) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "osler.monitor.outpost", target, json.dumps(arguments)]
        with log.open("wb") as printed:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=printed,
                stderr=printed,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # a Ctrl-C is for the run
            )

    def write(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """Send a line."""
        self._send("write", step=step, tokens=tokens, metrics=dict(metrics))

    def alert(self, alert: Alert) -> None:
        """Send an alert."""
        self._send("alert", **asdict(alert))

    def close(self) -> None:
        """Let the process finish, and wait for it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        if self.process.wait() != 0:
            raise OSError(self._last_words())

    def _send(self, call: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        if self.process.poll() is not None:
            raise OSError(self._last_words())
        self.process.stdin.write(json.dumps([call, arguments], allow_nan=False).encode("utf-8") + b"\n")
        self.process.stdin.flush()

    def _last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), f"exit code {self.process.poll()}")
        return f"{last[:300]}; more in {self.log}"


def serve(target: str, arguments: Iterable[Any], lines: Iterable[str]) -> None:
    """In the child: open the sink and make the calls that come in, until the pipe is closed."""
    module, _, name = target.partition(":")
    sink = getattr(import_module(module), name)(*arguments)
    for line in lines:
        call, given = json.loads(line)
        if call == "alert":
            sink.alert(Alert(**given))
        else:
            sink.write(**given)
    sink.close()


def leave_after(parent: int) -> None:
    """End this process some time after its parent, whatever it is doing: nobody would look for one that hangs."""
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(LINGER_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=leave_after, args=(os.getppid(),), daemon=True).start()
    serve(sys.argv[1], json.loads(sys.argv[2]), sys.stdin)
