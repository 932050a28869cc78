"""What counts as one request to stop, and what as a second; what a process that leaves still hears."""

import signal

import pytest

from osler.runtime import stop
from osler.runtime.stop import REQUESTS, SAME_REQUEST_SECONDS, StopFlag, Terminated, interruptible

pytestmark = pytest.mark.usefixtures("standard_handlers")


@pytest.fixture
def pass_on(monkeypatch):
    """A clock stands still until this moves it past the time in which signals are one request."""
    now = [100.0]
    monkeypatch.setattr(stop.time, "monotonic", lambda: now[0])
    return lambda: now.append(now.pop() + 1.1 * SAME_REQUEST_SECONDS)


@pytest.mark.parametrize("number", REQUESTS)
def test_a_request_that_is_passed_on_is_one_and_a_later_one_leaves_at_once(number, pass_on, capsys):
    assert signal.SIGUSR1 in REQUESTS, "the warning from Slurm"
    with StopFlag() as flag:
        assert not flag.requested
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)
        assert flag.requested
        assert capsys.readouterr().err.count("finishing this step and saving; once more to leave at once") == 1
        pass_on()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)


def test_the_first_signal_after_another_ranks_is_no_second_one():
    before = signal.getsignal(signal.SIGTERM)
    with StopFlag() as flag:
        flag.requested = True  # the ranks have agreed on it
        signal.raise_signal(signal.SIGTERM)
        assert flag.requested
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("heard", [True, False])
def test_a_process_that_was_asked_to_stop_is_deaf_while_it_leaves(heard, pass_on):
    """Also when another rank has heard the request, and the launcher passes it on late."""
    before = [signal.getsignal(number) for number in REQUESTS]
    with interruptible():
        with StopFlag() as flag:
            if heard:
                signal.raise_signal(signal.SIGINT)
            flag.requested = True
        for number in REQUESTS:
            pass_on()
            signal.raise_signal(number)
    assert [signal.getsignal(number) for number in REQUESTS] == before


@pytest.mark.parametrize("number", REQUESTS)
def test_an_interruption_that_is_passed_on_is_one(number, pass_on):
    with interruptible():
        with StopFlag():
            pass  # a run that nobody asked to stop can be interrupted after it
        with pytest.raises(KeyboardInterrupt) as raised:
            signal.raise_signal(number)
        assert isinstance(raised.value, Terminated) == (number != signal.SIGINT)
        signal.raise_signal(number)
        pass_on()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible(), StopFlag() as flag:
            signal.raise_signal(signal.SIGHUP)
            assert not flag.requested
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
