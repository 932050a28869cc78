"""Other work on the same CPUs: how much of it there is, and how OpenMP's threads wait while it is there.

The threads of a team wait for each other at the end of every parallel operation, thousands of times in a second, and they wait
by spinning. Alone that is the fastest way. Beside other work it is the slowest: a thread that spins uses up its share of a CPU,
and the system then takes the CPU away just when the thread could go on. ``benchmarks/bench_neighbour.py`` has the figures.

GNU's OpenMP (libgomp, which torch brings on Linux) spins only for a moment and then sleeps while it has more threads than there
are CPUs. So as long as a neighbour is there, idle threads hold teams of their own. The team that computes keeps its size, so no
result changes by a bit, and the way of waiting can change in the middle of a run.

On other systems nothing happens here. Settings of the user's own (``OWN_SETTINGS``) are left alone.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

OWN_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
LOOK_SECONDS = 0.5
CROWDED_CPUS = 0.2  # more than the machine has, asked for by this process's threads and all others together
CALM_LOOKS = 4  # in a row, before the threads spin again
PARALLEL_NUMEL = 1 << 20  # an operation on so many elements uses the whole team


class CpuReading(NamedTuple):
    """CPU time up to a moment, in seconds."""

    at: float  # of the monotonic clock
    used: float  # by all processes, on the CPUs that this process may use; time that a hypervisor took away is part of it
    own: float  # by this process


def read_cpus() -> CpuReading | None:
    """Read the CPU time used so far; None on a system without ``/proc/stat``."""
    try:
        with open("/proc/stat") as file:
            lines = [line.split() for line in file if line.startswith("cpu")]
    except OSError:
        return None
    mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    # user, nice, system, idle, iowait, irq, softirq, steal; what guests use is in user and nice already
    used = sum(int(ticks) for name, *times in lines if name in mine for ticks in (*times[:3], *times[5:8]))
    return CpuReading(time.monotonic(), used / os.sysconf("SC_CLK_TCK"), time.process_time())


def busy_elsewhere(before: CpuReading, after: CpuReading) -> float:
    """How many CPUs other processes kept busy between two readings, on average."""
    seconds = after.at - before.at
    return max(0.0, after.used - before.used - (after.own - before.own)) / seconds if seconds > 0 else 0.0


class IdleTeam:
    """A team of OpenMP threads that sleeps until it is dismissed."""

    def __init__(self) -> None:
        self._dismissed = threading.Event()
        self._thread = threading.Thread(target=self._hold, name="osler-idle-team", daemon=True)
        self._thread.start()

    def _hold(self) -> None:
        import torch

        torch.ones(PARALLEL_NUMEL).add_(1.0)  # the thread keeps its team until it ends
        self._dismissed.wait()

    def dismiss(self) -> None:
        """End the team."""
        self._dismissed.set()
        self._thread.join()


class NeighbourWatch:
    """Looks for other work every half second, and chooses how this process's threads wait."""

    def __init__(self) -> None:
        self.idle_teams: list[IdleTeam] = []
        self._calm_looks = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="osler-neighbours", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def end(self) -> None:
        """Look no more; the threads wait as usual again."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        before = read_cpus()
        while before is not None and not self._ended.wait(LOOK_SECONDS):
            after = read_cpus()
            if after is None:
                break
            if "torch" in sys.modules:
                self.look(busy_elsewhere(before, after))
            before = after
        self._spin()

    def look(self, elsewhere: float) -> None:
        """Choose the way of waiting when other processes keep so many CPUs busy."""
        import torch  # loaded already, or being loaded by another thread

        threads, cpus = torch.get_num_threads(), len(os.sched_getaffinity(0))
        if threads > 1 and threads + elsewhere > cpus + CROWDED_CPUS:
            self._calm_looks = 0
            # Each team has one thread that OpenMP did not start and so does not count.
            while 1 + (1 + len(self.idle_teams)) * (threads - 1) <= cpus:
                self.idle_teams.append(IdleTeam())
        elif self.idle_teams:
            self._calm_looks += 1
            if self._calm_looks >= CALM_LOOKS:
                self._spin()

    def _spin(self) -> None:
        while self.idle_teams:
            self.idle_teams.pop().dismiss()


@contextmanager
def sharing_cpus() -> Iterator[None]:
    """While entered, OpenMP's threads wait in the way that suits what else runs on these CPUs."""
    if any(name in os.environ for name in OWN_SETTINGS) or read_cpus() is None:
        yield
        return
    watch = NeighbourWatch()
    watch.start()
    try:
        yield
    finally:
        watch.end()
