"""Attention to chosen keys: which are chosen, the form that gathers against the form that masks, what the index learns from."""

import pytest
import torch
from torch import Tensor

from osler.ops import sparse_attention
from osler.ops.attention import attention_reference
from osler.ops.sparse_attention import (
    Choice,
    Index,
    attention_shares,
    choose,
    gather_attention,
    index_measured,
    index_scores,
    is_seen,
    mask_attention,
    recall,
)

B, T, N, K, H, J = 2, 40, 4, 2, 8, 4


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sparse_attention.CHUNK_ELEMENTS, "cpu", 2_000)


def row(choices: int, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Index, Tensor]:
    """Queries, keys and values, an index, and the first token of each token's document: two documents in each row."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    heads = J // choices
    index = Index(draw(B, choices, T, heads, H), draw(B, T, H), draw(B, choices, T, heads))
    first_BT = torch.zeros(B, T, dtype=torch.int64)
    first_BT[0, 25:], first_BT[1, 3:] = 25, 3
    return [draw(B, N, T, H), draw(B, K, T, H), draw(B, K, T, H)], index, first_BT


def gradients(out: Tensor, kl_BT: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Of sums in which every element has another weight."""
    weights = (torch.arange(x.numel(), dtype=x.dtype).sin().view_as(x) for x in (out, kl_BT))
    return list(torch.autograd.grad(sum((x * w).sum() for x, w in zip((out, kl_BT), weights, strict=True)), leaves))


@pytest.mark.parametrize("choices", [1, K])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_gathering_equals_masking(choices, dtype, tolerance):
    qkv, index, first_BT = row(choices, dtype)
    chosen = choose(index, first_BT, Choice(top_k=9, window=3))
    results = []
    for way in (mask_attention, gather_attention):
        out, measured = way(*qkv, index, chosen)
        results.append([out, measured, *gradients(out, measured[..., 0], [*qkv, *index])])
    for masked, gathered in zip(*results, strict=True):
        torch.testing.assert_close(gathered, masked, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("choices", [1, K])
def test_the_best_keys_of_the_document_are_chosen_with_the_window_and_the_first_token(choices):
    _, index, first_BT = row(choices)
    chosen_BRTX, scores_BRTS = choose(index, first_BT, Choice(top_k=9, window=3)), index_scores(index)
    for b in range(B):
        for t in range(T):
            first = int(first_BT[b, t])
            always = {first, *range(max(first, t - 2), t + 1)}
            for r in range(choices):
                score = scores_BRTS[b, r, t].tolist()
                others = sorted(set(range(first, t + 1)) - always, key=lambda s, score=score: (-score[s], -s))
                expected = always | set(others[: 9 - len(always)])
                assert {s for s in chosen_BRTX[b, r, t].tolist() if s >= 0} == expected, (b, r, t)


def test_all_keys_chosen_is_dense_attention():
    qkv, index, _ = row(1)
    first_BT = torch.zeros(B, T, dtype=torch.int64)
    chosen = choose(index, first_BT, Choice(top_k=T, window=1))
    out, measured = gather_attention(*qkv, index, chosen)
    dense = attention_reference(*(x.float() for x in qkv))
    torch.testing.assert_close(out.float(), dense, atol=1e-5, rtol=1e-5)
    # The comparison with all keys is the same, too.
    of_all = index_measured(qkv[0], qkv[1], index, first_BT)
    torch.testing.assert_close(of_all, measured)
    expected = gradients(out.detach(), measured[..., 0], list(index))
    for found, wanted in zip(gradients(out.detach(), of_all[..., 0], list(index)), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("way", [mask_attention, gather_attention, None])
def test_gradient_of_the_kl_is_softmax_of_the_index_minus_attention(way):
    """One head, keys that are unit vectors and positive queries: the query is the row of scores."""
    (q, k, v), _, first_BT = row(1)
    scores = torch.rand(B, 1, T, 1, T, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    index = Index(scores, torch.eye(T, dtype=torch.float64).expand(B, T, T), torch.ones(B, 1, T, 1, dtype=torch.float64))
    if way is None:
        measured = index_measured(q, k, index, first_BT)
        support = is_seen(torch.arange(T)[:, None], first_BT[:, None, :, None], T)
    else:
        chosen = choose(index, first_BT, Choice(top_k=9, window=3))
        _, measured = way(q, k, v, index, chosen)
        support = (chosen[..., None] == torch.arange(T)).any(-2)
    (gradient,) = torch.autograd.grad(measured[..., 0].sum(), scores)
    p = attention_shares(q, k, support, 1)
    share = scores.squeeze(3).masked_fill(~support, -torch.inf).softmax(-1)
    torch.testing.assert_close(gradient.squeeze(3), share - p)
    log_ratio = (p / share).masked_fill(~support, 1.0).log()
    torch.testing.assert_close(measured[..., 0], (p * log_ratio).sum(-1).squeeze(1))


def test_recall_is_the_attention_that_falls_on_the_chosen_keys():
    (q, k, _), index, first_BT = row(K)
    chosen = choose(index, first_BT, Choice(top_k=9, window=3))
    p = attention_shares(q, k, is_seen(torch.arange(T)[:, None], first_BT[:, None, :, None], T), K)
    expected = (p * (chosen[..., None] == torch.arange(T)).any(-2)).sum(-1).mean(1)
    torch.testing.assert_close(recall(q, k, index, first_BT, Choice(top_k=9, window=3)), expected)


def test_a_compiler_is_told_the_shapes_and_strides_of_the_results():
    """Queries come as transposed views, whose strides no result has."""
    qkv, index, first_BT = row(K, torch.float32)
    chosen = choose(index, first_BT, Choice(top_k=9, window=3))
    q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in qkv)
    parts = [part.detach().transpose(1, 2).contiguous().transpose(1, 2) for part in index]
    tensors, ops = [q, k, v, *parts, chosen], torch.ops.osler
    out, log_sum, measured = ops.gather_attention(*tensors)
    kl = measured[..., 0].contiguous()
    for operator, arguments in (
        (ops.choose, (*parts, first_BT, 9, 3)),
        (ops.gather_attention, tensors),
        (ops.gather_attention_backward, (out, kl, [*tensors, out, log_sum])),
        (ops.index_all_keys, (q, k, *parts, first_BT)),
        (ops.index_all_keys_backward, (kl, [q, k, *parts, first_BT])),
    ):
        found = torch.library.opcheck(operator.default, tuple(arguments), test_utils=("test_schema", "test_faketensor"))
        assert set(found.values()) == {"SUCCESS"}
