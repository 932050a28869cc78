"""Best-fit decreasing: in which rows of a fixed size pieces of documents have a place, with little room left over."""

import numpy as np

from osler.data.shards import Int64Array


def best_fit(lengths: Int64Array, capacity: int) -> Int64Array:
    """Return which row each length goes to: the fullest row that it fits in, else a new one; `lengths` come longest first.

    Bit n of a mask says whether a row has room for n more tokens. The best fit is the lowest bit from `length` on, so 100,000
    documents take a fraction of a second.
    """
    rows = np.empty(len(lengths), dtype=np.int64)
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # row numbers by how much is left
    mask = num_rows = 0
    for place, length in enumerate(lengths.tolist()):
        fitting = mask >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            row = with_room[left].pop()
            if not with_room[left]:
                mask ^= 1 << left
        else:
            left, row = capacity, num_rows
            num_rows += 1
        rows[place] = row
        if left > length:
            with_room[left - length].append(row)
            mask |= 1 << (left - length)
    return rows
