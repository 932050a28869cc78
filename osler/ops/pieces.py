"""The parts of a row whose queries a CPU computes at a time, because no query sees a key after it. Torch-free."""

FEWEST, MOST = 128, 256  # queries of a piece; 64 were a little slower than 128 (6 layers x 256, rows of 256 tokens)


def causal_pieces(length: int) -> list[slice]:
    """Return the parts of a row in order: the whole of a short row, pieces of 128 tokens, and of 256 in rows of 1,024 and more.

    Larger pieces compute more scores in vain, but each piece is code of its own to compile.
    """
    size = length if length < 2 * FEWEST else min(MOST, max(FEWEST, length // 4))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
