"""The fast form of attention against the plain formula: values and gradients, grouped heads, masks."""

from __future__ import annotations

import pytest
import torch

from osler.ops.attention import CAUSAL_PIECE, attention, attention_reference


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 8), (4, 2, 8), (6, 1, 72)])
@pytest.mark.parametrize("masked", [None, "shared", "per_head"])
def test_equal_to_the_reference(heads: int, kv_heads: int, size: int, masked: str | None) -> None:
    g = torch.Generator().manual_seed(heads + size)
    queries, keys = (9, 9) if masked is None else (5, 9)
    q = torch.randn(3, heads, queries, size, generator=g).requires_grad_()
    k = torch.randn(3, kv_heads, keys, size, generator=g).requires_grad_()
    v = torch.randn(3, kv_heads, keys, size, generator=g).requires_grad_()
    mask = None
    if masked:
        mask = torch.rand(3, 1 if masked == "shared" else heads, queries, keys, generator=g) < 0.5
        mask[..., 0] = True  # every query sees something
    fast, plain = attention(q, k, v, mask=mask), attention_reference(q, k, v, mask=mask)
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)
    out_grad = torch.randn(fast.shape, generator=g)
    ours = torch.autograd.grad(fast, (q, k, v), out_grad)
    torch.testing.assert_close(ours, torch.autograd.grad(plain, (q, k, v), out_grad), atol=1e-5, rtol=1e-5)


def test_a_longer_cache_is_causal_from_its_end() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 8, generator=g) for n in (3, 7, 7))
    full = attention(torch.cat([torch.zeros(1, 2, 4, 8), q], 2), k, v)
    torch.testing.assert_close(attention(q, k, v), full[:, :, 4:])


@pytest.mark.parametrize("length", [2 * CAUSAL_PIECE, 2 * CAUSAL_PIECE + 37])
def test_long_rows_are_computed_in_pieces_and_come_out_the_same(length: int) -> None:
    g = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, heads, length, 8, generator=g).requires_grad_() for heads in (4, 2, 2))
    fast, plain = attention(q, k, v), attention_reference(q, k, v)
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)
    out_grad = torch.randn(fast.shape, generator=g)
    ours = torch.autograd.grad(fast, (q, k, v), out_grad)
    torch.testing.assert_close(ours, torch.autograd.grad(plain, (q, k, v), out_grad), atol=1e-5, rtol=1e-5)
