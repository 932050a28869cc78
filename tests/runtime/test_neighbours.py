"""Other work on the CPUs is seen; OpenMP then has more threads than CPUs, and results stay the same to the bit."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from osler.runtime import neighbours
from osler.runtime.neighbours import CALM_POLLS, OWN_SETTINGS, CpuReading, NeighbourMonitor, busy_elsewhere, sharing_cpus

CPUS = len(os.sched_getaffinity(0))


def test_what_others_use_is_all_use_less_ones_own():
    before, after = CpuReading(at=10.0, used=100.0, own=5.0), CpuReading(at=12.0, used=103.5, own=6.0)
    assert busy_elsewhere(before, after) == 1.25
    assert busy_elsewhere(before, before) == 0.0, "no time has passed"
    assert busy_elsewhere(before, CpuReading(at=11.0, used=100.5, own=6.0)) == 0.0, "clock ticks are coarse"


def test_a_busy_process_is_seen():
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        before, until = neighbours.read_cpus(), time.monotonic() + 300
        seen = 0.0
        while seen < 0.2 and time.monotonic() < until:  # a busy machine gives it less than a whole CPU
            time.sleep(0.2)
            seen = busy_elsewhere(before, neighbours.read_cpus())
        assert seen >= 0.2
    finally:
        neighbour.kill()
        neighbour.wait()


@pytest.fixture
def monitor():
    threads = torch.get_num_threads()
    monitor = NeighbourMonitor()
    yield monitor
    monitor.spin()
    torch.set_num_threads(threads)


def test_idle_teams_come_with_a_neighbour_and_go_when_it_has_been_gone_for_a_while(monitor):
    threads = max(2, CPUS)
    torch.set_num_threads(threads)
    monitor.adapt(0.0)
    assert not monitor.idle_teams
    monitor.adapt(1.0)
    teams = len(monitor.idle_teams)
    assert 1 + (1 + teams) * (threads - 1) > CPUS, "OpenMP has more threads than CPUs"
    monitor.adapt(1.0)
    assert len(monitor.idle_teams) == teams, "another look changes nothing"
    for elsewhere in [0.0] * (CALM_POLLS - 1) + [1.0] + [0.0] * (CALM_POLLS - 1):
        monitor.adapt(elsewhere)
        assert len(monitor.idle_teams) == teams, "a short rest of the neighbour is not its end"
    monitor.adapt(0.0)
    assert not monitor.idle_teams
    torch.set_num_threads(1)  # which has nobody to wait for
    monitor.adapt(99.0)
    assert not monitor.idle_teams


def test_the_way_of_waiting_changes_no_bit():
    program = """
import torch
from osler.runtime.neighbours import NeighbourMonitor

torch.set_num_threads(2)
x = torch.randn(300, 1 << 14, generator=torch.Generator().manual_seed(0))

def result():
    return torch.stack([(x @ x.T).sum(), x.softmax(-1).pow(2).sum(), torch.linalg.norm(x)])

alone = result()
monitor = NeighbourMonitor()
monitor.adapt(99.0)
assert monitor.idle_teams
beside = result()
monitor.spin()
assert torch.equal(alone, beside) and torch.equal(alone, result())
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def watching() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("osler-neighbours")]


def test_the_watch_ends_with_the_command_and_the_users_own_setting_wins(monkeypatch):
    for name in OWN_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(KeyboardInterrupt), sharing_cpus():
        assert watching()
        raise KeyboardInterrupt
    assert not watching()
    for name in OWN_SETTINGS:
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            with sharing_cpus():
                assert not watching()
