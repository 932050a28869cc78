"""Text for tests of cleaning."""

import random


def prose(seed: int, count: int) -> list[str]:
    """Words that no other seed gives."""
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(count)]
