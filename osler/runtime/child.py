"""A child process that runs a module of Osler. It finds the same modules as this process, and can tell when this process ends."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


def start(module: str, *arguments: str, env: dict[str, str] | None = None, **streams: Any) -> subprocess.Popen[bytes]:
    """Start ``python -m module`` with a pipe to its standard input; raises OSError when that is impossible.

    ``env`` is added to the environment of this process; ``streams`` are further arguments of ``Popen``.
    """
    command = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **(env or {})}
    # The child has a session of its own, because Ctrl-C is for the parent.
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True, **streams)


@contextmanager
def running(module: str, *arguments: str, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Start a child with pipes to its standard input and output, and kill it when the context ends, whatever it is doing."""
    child = start(module, *arguments, env=env, stdout=subprocess.PIPE)
    try:
        yield child
    finally:
        with suppress(BrokenPipeError), child:  # leaving ``child`` closes its pipes and waits for its end
            child.kill()


def end_with_parent() -> None:
    """In the child: start a thread that ends this process when its standard input closes, and discards all input until then."""

    def wait() -> None:
        while os.read(0, 1):  # not through sys.stdin, whose lock this thread would hold while the program ends
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
