"""Other work on the same CPUs: measure it, and let OpenMP's threads sleep instead of spin during such work.

The threads of a team wait for each other thousands of times a second. Spinning is the fastest way to wait on an idle machine. It
is the slowest beside other work, because a thread that spins uses up its share of a CPU before it can resume
(``benchmarks/bench_neighbour.py``). GNU's OpenMP (libgomp, which torch brings on Linux) spins only for a moment while it has more
threads than there are CPUs. So while other processes are busy, extra Python threads keep idle teams of their own. The team that
computes keeps its size, so results stay the same. On other systems, or if the user set one of ``OWN_SETTINGS``, nothing happens.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

OWN_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
POLL_SECONDS = 0.5
CROWDED_CPUS = 0.2  # the CPUs that own threads and other work may need together beyond those there are
CALM_POLLS = 4  # calm polls in a row before the threads spin again
PARALLEL_NUMEL = 1 << 20  # an operation on this many elements uses the whole team


class CpuReading(NamedTuple):
    """CPU seconds used up to a moment."""

    at: float  # seconds of the monotonic clock
    used: float  # taken by all processes on the CPUs that this process may use, and by other machines of the same hypervisor
    own: float  # taken by this process


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
    """Return how many CPUs other processes kept busy between two readings, on average."""
    seconds = after.at - before.at
    return max(0.0, after.used - before.used - (after.own - before.own)) / seconds if seconds > 0 else 0.0


def hold_team(dismissed: threading.Event) -> None:
    """Start this thread's own team of OpenMP threads, and keep it asleep until ``dismissed``."""
    import torch

    torch.ones(PARALLEL_NUMEL).add_(1.0)
    dismissed.wait()


class NeighbourMonitor:
    """Chooses how this process's threads wait, by what other processes do on the CPUs."""

    def __init__(self) -> None:
        self.idle_teams: list[threading.Thread] = []
        self._dismissed = threading.Event()
        self._calm_polls = 0

    def poll(self, ended: threading.Event) -> None:
        """Measure other work every half second until ``ended``."""
        before = read_cpus()
        while before is not None and not ended.wait(POLL_SECONDS):
            after = read_cpus()
            if after is not None and "torch" in sys.modules:
                self.adapt(busy_elsewhere(before, after))
            before = after
        self.spin()

    def adapt(self, elsewhere: float) -> None:
        """Choose the way of waiting while other processes keep ``elsewhere`` CPUs busy."""
        import torch  # loaded already, or being loaded by another thread

        threads, cpus = torch.get_num_threads(), len(os.sched_getaffinity(0))
        if threads > 1 and threads + elsewhere > cpus + CROWDED_CPUS:
            self._calm_polls = 0
            # Each team has one thread that OpenMP did not start and so does not count.
            while 1 + (1 + len(self.idle_teams)) * (threads - 1) <= cpus:
                self.idle_teams.append(threading.Thread(target=hold_team, args=(self._dismissed,), daemon=True))
                self.idle_teams[-1].start()
        elif self.idle_teams:
            self._calm_polls += 1
            if self._calm_polls >= CALM_POLLS:
                self.spin()

    def spin(self) -> None:
        """Let the threads wait by spinning: end the idle teams."""
        self._dismissed.set()
        for team in self.idle_teams:
            team.join()
        self.idle_teams, self._dismissed = [], threading.Event()


@contextmanager
def sharing_cpus() -> Iterator[None]:
    """Inside the context, let OpenMP's threads sleep or spin while they wait, as suits the other work on these CPUs."""
    if any(name in os.environ for name in OWN_SETTINGS) or read_cpus() is None:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=NeighbourMonitor().poll, args=(ended,), name="osler-neighbours", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
