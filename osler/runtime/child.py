"""A child process that runs a module of Osler. It finds the same modules as this process, and can tell when this process ends."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


def start(module: str, *arguments: str, env: dict[str, str] | None = None, **streams: Any) -> subprocess.Popen[bytes]:
    """Start ``python -m module``, with a pipe to its standard input; raises OSError when that is impossible."""
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command, given = [sys.executable, "-m", module, *arguments], {**os.environ, **paths, **(env or {})}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, env=given, start_new_session=True, **streams
    )  # Ctrl-C is for the parent


@contextmanager
def running(module: str, *arguments: str, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Start a child with pipes to its standard input and output, and kill it at the end, whatever it is doing."""
    child = start(module, *arguments, env=env, stdout=subprocess.PIPE)
    try:
        yield child
    finally:
        with suppress(BrokenPipeError), child:  # leaving it closes the pipes and waits for the process
            child.kill()


def end_with_parent() -> None:
    """Start a thread that ends this child when its standard input closes; the parent must send nothing more."""

    def wait() -> None:
        while os.read(0, 1):  # not through sys.stdin, whose lock this thread would hold while the program ends
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
