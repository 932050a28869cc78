"""Bits per byte: every token once, and the same number as the formula written out."""

from math import exp, inf, log

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from osler.eval.likelihood import TextScore, batches, measure, windows
from osler.model.transformer import Transformer
from osler.runtime.errors import UserError
from tests.models import tiny_model

VOCAB = 50


def build(**changes: str) -> Transformer:
    return tiny_model(seed=1, vocab_size=VOCAB, **changes)


@settings(derandomize=True)
@given(st.lists(st.integers(0, 40), max_size=5), st.integers(1, 12))
def test_every_token_of_every_document_is_a_label_once(sizes: list[int], seq_len: int) -> None:
    documents = [[100 * d + t for t in range(size)] for d, size in enumerate(sizes)]
    labelled: list[int] = []
    for inputs, labels in windows(documents, seq_len=seq_len, start_id=-1):
        assert len(inputs) == len(labels) <= seq_len
        assert inputs == [label - 1 if label % 100 else -1 for label in labels]
        labelled += labels
    assert labelled == [token for document in documents for token in document]


def test_bits_per_byte_is_the_formula() -> None:
    model = build()
    generator = torch.Generator().manual_seed(2)
    documents = [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in (1, 40, 0, 16, 17, 3)]
    rows = list(windows(documents, seq_len=16, start_id=0))
    nats = 0.0
    for inputs, labels in rows:
        logits = model.logits(model(torch.tensor([inputs])))[0]
        nats += F.cross_entropy(logits.double(), torch.tensor(labels), reduction="sum").item()
    for batch_tokens in (1, 40, 10_000):
        result = measure(model, batches(rows, batch_tokens=batch_tokens), total_bytes=300)
        assert result.tokens == 77
        assert result.nats == pytest.approx(nats, rel=1e-6)
        assert result.bits_per_byte == pytest.approx(nats / log(2) / 300, rel=1e-6)
        assert result.loss == pytest.approx(nats / 77, rel=1e-6)
    assert model.training


def test_packed_documents_cost_what_they_cost_apart() -> None:
    model = build()
    first, second = [0, 5, 6, 7], [0, 9, 8]
    apart = measure(model, batches(windows([first[1:], second[1:]], seq_len=8, start_id=0), batch_tokens=64), 10)
    ids = torch.tensor([first[:-1] + second[:-1]])
    labels = torch.tensor([first[1:] + second[1:]])
    documents = torch.tensor([[0, 0, 0, 1, 1]])
    packed = measure(model, [(ids, labels, documents)], 10)
    assert packed.nats == pytest.approx(apart.nats, rel=1e-5)  # attention knows relative positions only


def test_nothing_to_measure_is_said() -> None:
    with pytest.raises(UserError, match="no text"):
        measure(build(), [], 100)
    with pytest.raises(UserError, match="no text"):
        measure(build(), [(torch.tensor([[1]]), torch.tensor([[2]]))], 0)


@pytest.mark.parametrize(("nats", "words", "expected"), [(6.0, 3, exp(2)), (6.0, 0, inf), (1e6, 1, inf)])
def test_word_perplexity_is_per_word(nats: float, words: int, expected: float) -> None:
    assert TextScore(nats, tokens=4, right=0, bytes=9, words=words).word_perplexity == expected
