"""A spike is told from noise, and nothing that is no usual loss changes what is usual."""

import json
import math
import random

import pytest

from osler.monitor.config import SpikeConfig
from osler.monitor.spikes import SpikeWindow, robust_z

CONFIG = SpikeConfig(threshold=8.0, window_steps=20)


def usual(count: int, seed: int = 0, level: float = 3.0) -> list[float]:
    rng = random.Random(seed)
    return [level + rng.gauss(0.0, 0.1) for _ in range(count)]


def test_the_score_is_that_of_the_formula() -> None:
    """Median 3; distances 2, 1, 0, 1, 97 have the median 1."""
    assert robust_z(13.0, [1.0, 2.0, 3.0, 4.0, 100.0]) == (pytest.approx(10.0 / 1.4826), 3.0)


@pytest.mark.parametrize("seed", range(5))
def test_noise_and_a_falling_loss_are_no_spikes(seed: int) -> None:
    window = SpikeWindow(CONFIG)
    losses = [8.0 * 0.99**step + noise for step, noise in enumerate(usual(500, seed, level=0.0))]
    assert not any(window.observe(loss) for loss in losses)


def test_a_jump_is_a_spike_and_does_not_become_usual() -> None:
    window = SpikeWindow(CONFIG)
    assert not any(window.observe(loss) for loss in usual(20))
    first, *_, last = spikes = [window.observe(9.0) for _ in range(3)]
    assert [spike.in_a_row for spike in spikes] == [1, 2, 3] and first[:2] == last[:2], "a spike changed what is usual"
    assert first.deviations > 8.0 and first.median == pytest.approx(3.0, abs=0.1)
    assert window.observe(3.0) is None and window.observe(9.0).in_a_row == 1


def test_what_is_not_judged() -> None:
    """Values that are not finite, what comes before half a window, and what rounding does."""
    window = SpikeWindow(CONFIG)
    assert [window.observe(loss) for loss in [*usual(9), 50.0]] == [None] * 10
    before = window.state()
    assert window.observe(math.nan) is window.observe(math.inf) is window.observe(-math.inf) is None
    assert window.state() == before
    window = SpikeWindow(CONFIG)
    assert not any(window.observe(loss) for loss in [0.0] * 20 + [1e-6]) and window.observe(0.1) is not None


def test_a_loss_that_stays_up_is_a_new_level() -> None:
    window = SpikeWindow(CONFIG)
    for loss in usual(20):
        window.observe(loss)
    judged = [window.observe(loss) is not None for loss in usual(30, seed=1, level=5.0)]
    assert judged == [True] * 10 + [False] * 20
    assert window.observe(9.0) is not None


def test_what_is_remembered_goes_through_json() -> None:
    losses = [*usual(25), 9.0, 9.1, *usual(10, seed=2), 11.0]
    whole = SpikeWindow(CONFIG)
    expected = [whole.observe(loss) for loss in losses]
    assert sum(spike is not None for spike in expected) == 3
    for cut in range(len(losses)):
        first, second = SpikeWindow(CONFIG), SpikeWindow(CONFIG)
        found = [first.observe(loss) for loss in losses[:cut]]
        second.restore(json.loads(json.dumps(first.state())))
        assert found + [second.observe(loss) for loss in losses[cut:]] == expected
