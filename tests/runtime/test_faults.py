"""The fault hook strikes where and when it is told to, once, and not otherwise."""

import errno

import pytest

from osler.runtime import faults


@pytest.mark.parametrize(("kind", "code"), [("enospc", errno.ENOSPC), ("ioerror", errno.EIO)])
def test_an_error_strikes_its_stage_once(monkeypatch, kind, code):
    monkeypatch.setenv(faults.VARIABLE, f"save-state:{kind}")
    faults.fault("save-tensors")
    with pytest.raises(OSError) as caught:
        faults.fault("save-state")
    assert caught.value.errno == code
    faults.fault("save-state")


def test_visits_may_be_a_range_and_faults_several(monkeypatch):
    monkeypatch.setenv(faults.VARIABLE, "step:nan:2-3,step:nan:6-,loss:nan,step:crash:4")
    found = []
    for _ in range(3):
        faults.fault("other")
        found.append(faults.poisoned("step"))
    with pytest.raises(faults.InjectedError):
        faults.fault("step")
    found += [faults.poisoned("step") for _ in range(3)]
    assert found == [False, True, True, False, True, True]
    assert [faults.poisoned("loss") for _ in range(2)] == [True, False]
    assert not faults.poisoned("other") and faults.fault("loss") is None, "numbers that nobody asks for are not poisoned"


@pytest.mark.parametrize(
    "spec",
    ["", "save-state", "save-state:explode", ":kill", "a:kill:0", "a:kill:x", "a:kill:1:2", "a:nan:2-0", "a:kill,", "a:nan:-3"],
)
def test_a_malformed_fault_is_refused(monkeypatch, spec):
    monkeypatch.setenv(faults.VARIABLE, spec)
    with pytest.raises(ValueError, match="point:kind"):
        faults.fault("save-state")
