"""Forks the processes of a run as torchrun would start them, and reports on the cases of a program that forks."""

import faulthandler
import functools
import math
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from run_folders import logged

from osler.cli.main import main
from osler.runtime import faults

PATIENCE_SECONDS = 300  # less than a lost rank would cost that is given up only after COLLECTIVE_TIMEOUT


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(program: Callable[[], int], folder: Path, size: int, fault_rank: int = -1, fault: str = "") -> list[int]:
    """Fork the ranks of a program with torchrun's environment and return their process ids."""
    port, children = free_port(), []
    for rank in range(size):
        child = os.fork()
        if child:
            children.append(child)
            continue
        faulthandler.enable(os.dup(1))  # a rank that `codes` aborts shows there where it stood
        with open(folder.with_suffix(f".rank{rank}.log"), "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        if size > 1:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}}
        if rank == fault_rank:
            os.environ[faults.VARIABLE] = fault
        code = 1
        try:
            code = program()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return children


def codes(children: Sequence[int], *, again: signal.Signals | None = None) -> list[int]:
    """Exit codes in the order of the ranks, a signal as its negative number; aborts what runs for too long.

    ``again`` is sent to each child until it has ended.
    """
    deadline, found = time.monotonic() + PATIENCE_SECONDS, {}
    while len(found) < len(children):
        for child in children:
            done, status = (0, 0) if child in found else os.waitpid(child, os.WNOHANG)
            if done:
                found[child] = os.waitstatus_to_exitcode(status)
            elif again is not None and child not in found:
                os.kill(child, again)
        if time.monotonic() > deadline:
            for child in set(children) - found.keys():
                os.kill(child, signal.SIGABRT)
                os.waitpid(child, 0)
            raise AssertionError(f"still running after {PATIENCE_SECONDS} s; ended: {found}")
        time.sleep(0.005)
    return [found[child] for child in children]


def train(command: Sequence[str], folder: Path, size: int, **fault: object) -> list[int]:
    return codes(start(functools.partial(main, [*command, "--run", str(folder)]), folder, size, **fault))  # type: ignore[arg-type]


def said(folder: Path, rank: int) -> str:
    return folder.with_suffix(f".rank{rank}.log").read_text()


def same_on_two_ranks(
    command: Sequence[str], folder: Path, alone: Path, *, names: Sequence[str], marked: str, rel_tol: float
) -> None:
    """Two ranks log what one process logged: the metrics ``names``, of which ``marked`` is in three lines."""
    assert train(command, folder, 2) == [0, 0], said(folder, 0)[-2000:]
    assert said(folder, 1) == "", "another rank than 0 spoke"
    found, expected = ([{name: line[name] for name in names if name in line} for line in logged(run)] for run in (folder, alone))
    assert len(found) == len(expected) and sum(marked in line for line in found) == 3
    for line, other in zip(found, expected, strict=True):
        assert line.keys() == other.keys()
        assert all(math.isclose(line[name], other[name], rel_tol=rel_tol) for name in other), f"{line} instead of {other}"


def runs_on_two(program: Callable[[], int], folder: Path) -> None:
    assert codes(start(program, folder, 2)) == [0, 0], said(folder, 0) + said(folder, 1)


def report(name: str, case: Callable[..., None], *given: Any, **options: Any) -> None:
    before = time.monotonic()
    try:
        case(*given, **options)
    except (AssertionError, OSError) as error:
        print(f"FAILED {name}: {error}", flush=True)
    else:
        print(f"ok {name} {time.monotonic() - before:.1f}", flush=True)
