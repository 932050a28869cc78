"""Run a program that a model wrote, such as an answer to HumanEval, with the tests that judge it, in a process of its own.

The process has limits of time, memory, files and processes where the system knows them, an empty folder to work in and hardly any
environment variables. An audit hook refuses networks, other processes and signals, and changes to files outside of that folder.
This is isolation against accidents, such as a loop that never ends or a program that removes files. It is no security boundary,
because Python code can get around a hook of its own process. Run programs of a model that you do not trust in a container or on a
machine that has nothing to lose.

This file is also the program of that process. It imports nothing of Osler and no other package.
"""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from typing import Any, NoReturn

PASSED = "passed"
TIMED_OUT = "timed out"
NO_CODE = ("SyntaxError", "IndentationError", "TabError")  # what ends an answer that is no program
CPU_SECONDS = 5
WALL_SECONDS = 30  # by the clock, because a program that waits takes no CPU time
MEMORY_BYTES, FILE_BYTES, OPEN_FILES = 1 << 30, 1 << 20, 32

_BLOCK = re.compile(r"```[ \w]*\n(.*?)(?:^```|\Z)", re.DOTALL | re.MULTILINE)
_TOP_LEVEL = re.compile(r"(?:\s*(?:#.*)?\n)*(?:(?:def|class|import|from|async)\b|@)")
_FUNCTION = re.compile(r"^(?:async +)?def +(\w+)", re.MULTILINE)
_REFUSED = (
    "socket.", "subprocess.", "os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.startfile", "os.kill", "pty.",
    "signal.pthread_kill", "ctypes.", "_thread.start_new_thread", "os.chdir", "os.fchdir", "os.chroot", "sys.addaudithook",
)  # fmt: skip
_CHANGES = {
    "os.remove", "os.rmdir", "os.rename", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.utime",
    "shutil.rmtree", "shutil.move", "shutil.copyfile", "sqlite3.connect",
}  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def complete(prompt: str, answer: str) -> str:
    """Return the program that a prompt and an answer make; the answer is a whole function or its body, also in a Markdown block.

    A body ends where its indentation ends. Its first line may have lost its indentation.
    """
    blocks = _BLOCK.findall(answer)
    code = next((block for block in blocks if "def " in block), blocks[0] if blocks else answer).rstrip()
    if _TOP_LEVEL.match(code) and set(_FUNCTION.findall(prompt)[-1:]) & set(_FUNCTION.findall(code)):  # the whole function
        return f"{prompt}\n    pass\n\n\n{code}\n"
    if not code[:1].isspace() and re.search(r"\nreturn\b", code):  # the whole body has lost its indentation
        code = textwrap.indent(code, "    ")
    first, *rest = code.lstrip("\n").split("\n")
    body = [first if first[:1].isspace() else f"    {first}"]
    for line in rest:
        if line.strip() and not line[0].isspace():
            break
        body.append(line)
    return "\n".join([prompt, *body, ""])


@functools.lru_cache(maxsize=1024)  # the reward and the exam both ask
def run_tests(program: str, tests: str, cpu_seconds: int = CPU_SECONDS, wall_seconds: int = WALL_SECONDS) -> str:
    """Run a program and then its tests; return PASSED, TIMED_OUT, the name of an exception, or how else the process ended."""
    given = json.dumps([program, tests, cpu_seconds, wall_seconds]).encode()
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}  # Python needs these
    with tempfile.TemporaryDirectory(prefix="osler-program-", ignore_cleanup_errors=True) as folder:
        try:
            ended = subprocess.run(
                [sys.executable, "-I", "-S", "-B", os.path.abspath(__file__)],
                input=given, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder, env=kept, timeout=wall_seconds,
                start_new_session=True, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return TIMED_OUT
    if ended.returncode in (-getattr(signal, "SIGXCPU", 0), -getattr(signal, "SIGALRM", 0)):
        return TIMED_OUT
    return ended.stdout.decode(errors="replace") or f"exit code {ended.returncode}"


def _serve() -> NoReturn:
    """Run the program that stdin holds, and say on stdout how it ended; the program's own output goes nowhere."""
    program, tests, cpu_seconds, wall_seconds = json.load(sys.stdin)
    said, nowhere = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)

    def say(kind: type[BaseException], *_: object) -> None:
        os.write(said, kind.__name__.encode())

    sys.excepthook = say
    _limit(cpu_seconds, wall_seconds)
    sys.addaudithook(_guard(os.path.realpath(os.getcwd())))
    namespace = {"__name__": "program"}
    exec(compile(program, "program", "exec"), namespace)
    exec(compile(tests, "tests", "exec"), namespace)
    os.write(said, PASSED.encode())
    os._exit(0)


def _limit(cpu_seconds: int, wall_seconds: int) -> None:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    signal.alarm(wall_seconds)  # works even when the parent is gone
    limits = {"CPU": cpu_seconds, "AS": MEMORY_BYTES, "FSIZE": FILE_BYTES, "NOFILE": OPEN_FILES, "NPROC": 0, "CORE": 0}
    for name, limit in limits.items():
        if (kind := getattr(resource, f"RLIMIT_{name}", None)) is not None:
            most = limit + 1 if name == "CPU" else limit  # at the limit comes a signal; a second later the process is killed
            hard = resource.getrlimit(kind)[1]
            hard = most if hard == resource.RLIM_INFINITY else min(most, hard)
            try:
                resource.setrlimit(kind, (min(limit, hard), hard))
            except (ValueError, OSError):  # macOS refuses some
                continue


def _guard(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    def refuse_accidents(event: str, given: tuple[Any, ...]) -> None:
        if event.startswith(_REFUSED):
            raise PermissionError(f"{event} is refused")
        writes = event == "open" and isinstance(given[2], int) and given[2] & _WRITING
        paths = given[:1] if writes else given[:2] if event in _CHANGES else ()
        for path in paths:
            inside = isinstance(path, (str, bytes)) and os.path.realpath(os.fsdecode(path)).startswith(folder + os.sep)
            if not inside and isinstance(path, (str, bytes, os.PathLike)):
                raise PermissionError(f"{event} is refused outside of the folder of the program")

    return refuse_accidents


if __name__ == "__main__":
    _serve()
