"""The fault hook strikes where and when it is told to, once, and not otherwise."""

from __future__ import annotations

import errno
import signal

import pytest

from osler.runtime import faults


@pytest.fixture(autouse=True)
def _fresh_visits():
    faults.reset()
    yield
    faults.reset()


def test_nothing_happens_without_the_variable(monkeypatch):
    monkeypatch.delenv(faults.VARIABLE, raising=False)
    assert faults.fault("save-state") is None


@pytest.mark.parametrize(("kind", "code"), [("enospc", errno.ENOSPC), ("ioerror", errno.EIO)])
def test_an_error_strikes_its_stage_once(monkeypatch, kind, code):
    monkeypatch.setenv(faults.VARIABLE, f"save-state:{kind}")
    faults.fault("save-tensors")
    with pytest.raises(OSError) as caught:
        faults.fault("save-state")
    assert caught.value.errno == code
    faults.fault("save-state")


def test_the_count_picks_the_visit(monkeypatch):
    monkeypatch.setenv(faults.VARIABLE, "step:ioerror:3")
    faults.fault("step")
    faults.fault("step")
    with pytest.raises(OSError):
        faults.fault("step")
    faults.fault("step")


def test_sigterm_reaches_the_handler(monkeypatch):
    received = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        monkeypatch.setenv(faults.VARIABLE, "step:sigterm")
        faults.fault("step")
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert received == [signal.SIGTERM]


@pytest.mark.parametrize(
    "spec", ["", "save-state", "save-state:explode", ":kill", "a:kill:0", "a:kill:x", "a:kill:1:2"]
)
def test_a_malformed_fault_is_refused(monkeypatch, spec):
    monkeypatch.setenv(faults.VARIABLE, spec)
    with pytest.raises(ValueError, match="stage:kind"):
        faults.fault("save-state")
