"""The parts of a row whose queries are computed at a time, because no query sees a key after it. Torch-free."""

# The fewest and the most queries of a piece on a CPU; 64 were a little slower than 128 (6 layers x 256, rows of 256 tokens).
FEWEST, MOST = 128, 256


def causal_pieces(length: int, *, fewest: int | None = None, most: int | None = None) -> list[slice]:
    """Return the parts of a row in order: at most four of at least ``fewest`` tokens, but as many as ``most`` asks for.

    Larger pieces compute more scores in vain, but each piece is code of its own to compile.
    """
    count = max(1, min(4, length // (fewest or FEWEST)), -(-length // (most or MOST)))
    size = -(-length // count)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
