"""The fast form of attention against the plain formula: values and gradients, grouped heads, masks, windows."""

import pytest
import torch

from osler.ops.attention import attention, attention_reference
from osler.ops.pieces import FEWEST, MOST, causal_pieces


@pytest.mark.parametrize("length", [1, 255, 256, 293, 1000, 1024, 5000])
def test_pieces_hold_every_query_once(length: int) -> None:
    pieces = causal_pieces(length)
    assert [place for piece in pieces for place in range(piece.start, piece.stop)] == list(range(length))
    assert max(piece.stop - piece.start for piece in pieces) <= (MOST if length >= 2 * FEWEST else length)
    assert len(pieces) <= max(8, length // MOST + 1)


@pytest.mark.parametrize("window", [None, 1, 4, 9, 128])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "length"),
    [(4, 4, 8, 9), (4, 2, 8, 9), (6, 1, 72, 9), (4, 2, 8, 2 * FEWEST), (4, 2, 8, 2 * FEWEST + 37)],
)
def test_equal_to_the_reference(heads: int, kv_heads: int, size: int, length: int, masked: bool, window: int | None) -> None:
    """Long rows are computed in pieces of the queries, and with a window in blocks, of which the last may be shorter."""
    g = torch.Generator().manual_seed(heads + size)
    q, k, v = (torch.randn(2, n, length, size, generator=g).requires_grad_() for n in (heads, kv_heads, kv_heads))
    mask = None
    if masked:
        mask = torch.rand(2, 1, length, length, generator=g) < 0.5
        mask = (mask | torch.eye(length, dtype=torch.bool)).tril()  # every query sees something
    fast, plain = (form(q, k, v, mask=mask, window=window) for form in (attention, attention_reference))
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)
    out_grad = torch.randn(fast.shape, generator=g)
    ours = torch.autograd.grad(fast, (q, k, v), out_grad)
    torch.testing.assert_close(ours, torch.autograd.grad(plain, (q, k, v), out_grad), atol=1e-5, rtol=1e-5)


def test_a_window_counts_the_query_itself_and_the_keys_before_it() -> None:
    """Values that tell their places: with equal scores the output is the mean of the places that are seen."""
    length, places = 9, torch.arange(9.0)
    nothing, values = torch.zeros(1, 1, length, 2), places.view(1, 1, length, 1).expand(-1, -1, -1, 2)
    expected = torch.stack([places[max(0, place - 3) : place + 1].mean() for place in range(length)])
    torch.testing.assert_close(attention(nothing, nothing, values, window=4)[0, 0, :, 0], expected)
    later = attention(nothing[:, :, 6:], nothing, values, window=4, mask=torch.ones(1, 1, 3, length, dtype=torch.bool).tril(6))
    torch.testing.assert_close(later[0, 0, :, 0], expected[6:])
