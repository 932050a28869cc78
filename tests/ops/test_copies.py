"""Copies beside the vocabulary in the softmax: every fast form against the definition."""

import pytest
import torch
from torch import Tensor

from osler.ops.copies import (
    NEVER,
    Copies,
    add_copies_,
    can_copy,
    copied_logits_reference,
    copy_scores,
    log_masses,
    log_masses_reference,
)
from osler.ops.cross_entropy import cross_entropy_reference, entropy, linear_cross_entropy, linear_logprobs

ROWS, LENGTH, WORDS, WIDTH = 3, 11, 40, 8


def case() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return features, head, tokens at places, scores (the first token of a row can copy nothing) and labels."""
    draw = torch.Generator().manual_seed(5)
    features = torch.randn(ROWS * LENGTH, WIDTH, generator=draw).double()
    head = torch.randn(64, WIDTH, generator=draw).double()
    ids = torch.randint(7, (ROWS, LENGTH), generator=draw)  # few words, so that most stand at several places
    score = 2 * torch.randn(ROWS, LENGTH, LENGTH, generator=draw).double()
    score = score.masked_fill(torch.ones(LENGTH, LENGTH).triu().bool(), NEVER)
    labels = torch.where(torch.rand(ROWS, LENGTH, generator=draw) < 0.6, ids.roll(3, 1), WORDS - 1)
    return features, head, ids, score, labels


def test_copied_logits_are_a_softmax_over_words_and_places() -> None:
    _, _, ids, score, _ = case()
    logits = torch.randn(LENGTH, WORDS, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    expected = logits.exp()
    for token in range(LENGTH):
        for place in range(LENGTH):
            expected[token, ids[0, place]] += score[0, token, place].exp()
    found = logits.clone()
    before, after = add_copies_(found, ids[:1].expand(LENGTH, -1), score[0])
    torch.testing.assert_close(found, expected.log())
    torch.testing.assert_close(copied_logits_reference(logits, ids[:1].expand(LENGTH, -1), score[0]), expected.log())
    torch.testing.assert_close(before, logits[:, ids[0]])
    torch.testing.assert_close(after, found[:, ids[0]])


@pytest.mark.parametrize("chunk_tokens", [4, 64])
@pytest.mark.parametrize("compiled", [False, True])
def test_cross_entropy_with_copies_is_that_of_the_definition(chunk_tokens: int, compiled: bool) -> None:
    features, head, ids, score, labels = case()
    labels[1, 4:6] = -100
    row = torch.arange(ROWS).repeat_interleave(LENGTH)
    found = []
    for is_fast in (True, False):
        learned = [each.clone().requires_grad_() for each in (features, head, score)]
        if is_fast:

            def function(x: Tensor, weight: Tensor, of: Tensor) -> Tensor:
                masses = log_masses_reference(ids, of, labels)
                return linear_cross_entropy(
                    x, weight, labels.flatten(), vocab_size=WORDS, log_masses=masses, chunk_tokens=chunk_tokens
                )

            loss = (torch.compile(function, fullgraph=True) if compiled else function)(*learned)
        else:
            copies = Copies(ids, row, learned[2].flatten(0, 1))
            loss = cross_entropy_reference(learned[0], learned[1], labels.flatten(), vocab_size=WORDS, copies=copies)
        found.append([loss, *torch.autograd.grad(3 * loss, learned)])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("compiled", [False, True])
def test_copies_that_weigh_far_more_than_all_words_have_finite_gradients(compiled: bool) -> None:
    learned = [each.float().requires_grad_() for each in case()[:2]]
    labels = case()[4].flatten()
    masses = [torch.full((len(labels),), value, requires_grad=True) for value in (250.0, 3.0)]
    fast = torch.compile(linear_cross_entropy, fullgraph=True) if compiled else linear_cross_entropy
    loss = fast(*learned, labels, vocab_size=WORDS, log_masses=tuple(masses))
    found = torch.autograd.grad(loss, [*learned, *masses])
    assert loss.isfinite() and all(grad.isfinite().all() for grad in found)
    torch.testing.assert_close(found[2], torch.ones(len(labels)))


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("piece", [4, LENGTH])
@pytest.mark.parametrize("compiled", [False, True])
def test_log_masses_in_pieces_are_those_of_all_scores(monkeypatch, documents: bool, piece: int, compiled: bool) -> None:
    monkeypatch.setattr("osler.ops.pieces.FEWEST", piece)
    monkeypatch.setattr("osler.ops.pieces.MOST", piece)
    _, _, ids, _, labels = case()
    labels[1, 4:6] = -100
    document = (torch.arange(LENGTH) >= 5).long().expand(ROWS, -1) if documents else None
    draw = torch.Generator().manual_seed(8)
    q, k = (torch.randn(ROWS, LENGTH, WIDTH, generator=draw).double().requires_grad_() for _ in range(2))
    fast = torch.compile(log_masses, fullgraph=True, dynamic=False) if compiled else log_masses
    found = []
    scores = copy_scores(q, k, can_copy(slice(0, LENGTH), document, ids.device))
    for of_all, of_label in (fast(q, k, ids, labels, document), log_masses_reference(ids, scores, labels)):
        shares = of_all.exp(), of_label.exp()  # as the softmax has them, where a place that cannot be copied is 0
        found.append([*shares, *torch.autograd.grad(shares[0].sum() - 3 * shares[1].sum(), (q, k))])
    assert 0 < (found[0][1] == 0).sum() < ROWS * LENGTH
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("size", [1.0, 12.0])
def test_log_masses_in_the_dtypes_of_training_are_near_those_in_fp64(dtype: torch.dtype, near: float, size: float) -> None:
    """With scores of some dozens, too, and a row of one token, which can copy nothing."""
    draw = torch.Generator().manual_seed(9)
    for length in (1, LENGTH):
        ids, labels = (torch.randint(4, (ROWS, length), generator=draw) for _ in range(2))
        labels[0] = -100
        rounded = [(torch.randn(ROWS, length, WIDTH, generator=draw) * size**0.5).to(dtype) for _ in range(2)]
        found = []
        for own in (dtype, torch.float64):
            q, k = (each.to(own).requires_grad_() for each in rounded)
            of_all, of_label = log_masses(q, k, ids, labels)
            counts = (labels.flatten() >= 0) & (of_label.detach() > NEVER / 2)
            loss = (torch.where(counts, of_all - of_label, 0)).sum()
            found.append([torch.where(counts, of_all - of_label, 0), *torch.autograd.grad(loss, (q, k))])
        for ours, exact in zip(*found, strict=True):
            assert ours.isfinite().all() and (ours - exact).norm() <= near * exact.norm()


def test_scores_far_above_and_below_leave_everything_finite() -> None:
    features, head, ids, score, labels = case()
    score = torch.where(score > NEVER, score + 250 - 110.0 * (ids[:, None] == labels[..., None]), NEVER).float()
    label_N, copied = labels.flatten(), (ids, torch.arange(ROWS).repeat_interleave(LENGTH))
    learned = [features.float().requires_grad_(), head.float().requires_grad_(), score.flatten(0, 1).requires_grad_()]
    logits = copied_logits_reference(learned[0] @ learned[1][:WORDS].T, *Copies(*copied, learned[2]).part(0, len(label_N)))
    exact = copied_logits_reference(
        learned[0].detach().double() @ head[:WORDS].T, *Copies(*copied, learned[2].detach().double()).part(0, len(label_N))
    )
    assert logits.isfinite().all()
    torch.testing.assert_close(logits.softmax(-1).double(), exact.softmax(-1), atol=1e-5, rtol=1e-4)
    logp, _ = linear_logprobs(
        (learned[0], learned[1]), label_N, entropy, vocab_size=WORDS, copies=Copies(*copied, learned[2]), chunk_tokens=5
    )
    for result in (logits.log_softmax(-1).gather(1, label_N[:, None]), logp):
        assert all(grad.isfinite().all() and grad.abs().max() < 1e3 for grad in torch.autograd.grad(result.sum(), learned))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("masked", [False, True])
def test_log_probabilities_with_copies_are_those_of_the_definition(temperature: float, masked: bool) -> None:
    features, head, ids, score, labels = case()
    row, label_N = torch.arange(ROWS).repeat_interleave(LENGTH), labels.flatten()
    mask = torch.rand(ROWS * LENGTH, WORDS, generator=torch.Generator().manual_seed(7)) < 0.5
    mask[torch.arange(len(mask)), label_N] = True
    weight_N = torch.linspace(-1, 2, len(label_N), dtype=torch.float64)
    found = []
    for is_fast in (True, False):
        learned = [each.clone().requires_grad_() for each in (features, head, score)]
        copies = Copies(ids, row, learned[2].flatten(0, 1))
        if is_fast:
            logp, spread = linear_logprobs(
                (learned[0], learned[1]), label_N, entropy, vocab_size=WORDS, temperature=temperature,
                mask_NV=mask if masked else None, copies=copies, chunk_tokens=5,
            )  # fmt: skip
        else:
            logits = copied_logits_reference(learned[0] @ learned[1][:WORDS].T, *copies.part(0, len(label_N)))
            logits = logits.masked_fill(~mask, -torch.inf) if masked else logits
            log_NV = (logits / temperature).log_softmax(-1)
            logp = log_NV.gather(1, label_N[:, None]).squeeze(1)
            spread = entropy(log_NV.detach().clone(), label_N)
        found.append([logp, spread, *torch.autograd.grad((logp * weight_N).sum(), learned)])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-9)
