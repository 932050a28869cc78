"""Which temperatures tokens can be drawn at. Torch-free, because configurations ask as well as samplers."""

from __future__ import annotations

import math

COLDEST = 1e-30  # a logit divided by less may leave the range of fp32, and what is drawn is no number


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless a temperature is 0, which takes the likeliest token, or a number that logits can be divided by."""
    if temperature != 0 and not COLDEST <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}: give 0 (always the likeliest token), or a number of at least {COLDEST}")
