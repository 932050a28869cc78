"""What counts as one request to stop, and what as a second."""

from __future__ import annotations

import signal
import time

import pytest

from osler.runtime.stop import SAME_REQUEST_SECONDS, StopFlag


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_that_is_passed_on_is_one_and_a_later_one_leaves_at_once(number, capsys):
    with StopFlag() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        assert capsys.readouterr().err.count("finishing this step and saving; once more to leave at once") == 1
        time.sleep(1.1 * SAME_REQUEST_SECONDS)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)


def test_the_first_signal_after_another_ranks_is_no_second_one():
    before = signal.getsignal(signal.SIGTERM)
    with StopFlag() as stop:
        stop.requested = True  # the ranks have agreed on it
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) is before
