"""Embeddings that start from bigrams: the factors against dense matrices, the start against its definition."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from osler.model.bigrams import PRIOR_COUNT, Factors, bigram_factors, count_pairs, rank_for, start_from_bigrams
from osler.model.config import ModelConfig
from tests.models import tiny_model

WORDS = 40


@pytest.fixture(scope="module")
def text() -> np.ndarray[Any, Any]:
    """Tokens of which most follow from the one before; the last five words never occur."""
    rng, ids = np.random.default_rng(0), [0]
    for drawn in rng.integers(0, WORDS - 5, 5_000):
        ids.append((ids[-1] * 7 + 3) % (WORDS - 5) if rng.random() < 0.6 else int(drawn))
    return np.array(ids, np.uint16)


def counted(text: np.ndarray[Any, Any]) -> torch.Tensor:
    counts = torch.zeros(WORDS, WORDS)
    for first, second in zip(text[:-1].tolist(), text[1:].tolist(), strict=True):
        counts[first, second] += 1
    return counts


def log_probabilities(counts: torch.Tensor) -> torch.Tensor:
    """The bigram model of the counts, smoothed towards the shares of single tokens."""
    share = (counts.sum(0) + 1) / (counts.sum() + WORDS)
    return ((counts + PRIOR_COUNT * share) / (counts.sum(1, keepdim=True) + PRIOR_COUNT)).log()


def of_factors(factors: Factors) -> torch.Tensor:
    return (factors.embedding_VK @ factors.head_VK.T + factors.log_share_V).log_softmax(-1)


def test_pairs_are_counted_within_each_text(text) -> None:
    first, second, count = count_pairs([text[:2_000], text[2_000:]], WORDS)
    expected = counted(text[:2_000]) + counted(text[2_000:])
    assert torch.equal(torch.stack([first, second], 1), expected.nonzero())
    assert torch.equal(count, expected[first, second])


def test_all_singular_vectors_give_the_smoothed_bigram_model(text) -> None:
    factors = bigram_factors([text], rows=WORDS, rank=WORDS, seed=0)
    torch.testing.assert_close(of_factors(factors), log_probabilities(counted(text)), rtol=1e-4, atol=1e-4)


def test_few_singular_vectors_are_nearly_as_near_as_the_best_ones_of_the_dense_matrix(text) -> None:
    """Against torch's decomposition of the whole matrix, weighted as a loss over tokens would."""
    counts = counted(text)
    share = (counts.sum(0) + 1) / (counts.sum() + WORDS)
    ratio = log_probabilities(counts) - share.log()
    weight = torch.outer((counts.sum(1) + 5).sqrt(), share.sqrt())
    best = torch.linalg.svdvals(ratio * weight)[6:].norm()
    factors = bigram_factors([text], rows=WORDS, rank=6, seed=0)
    found = ((factors.embedding_VK @ factors.head_VK.T - ratio) * weight).norm()
    assert best * 0.999 < found < best * 1.005


def test_the_start_is_the_bigram_model_in_an_embedding_of_unit_mean_square(text) -> None:
    """The model is that of the factors, but for tokens whose vectors are cut: an embedding must keep room for the rest."""
    model = tiny_model(vocab_size=WORDS, hidden_size=64)
    factors = bigram_factors([text], rows=model.config.padded_vocab_size, rank=rank_for(model.config), seed=0)
    start_from_bigrams(model, factors)
    embedding, head = model.embed_tokens.weight.detach(), model.lm_head.weight.detach()
    torch.testing.assert_close(embedding.square().mean(1), torch.ones(len(embedding)))
    assert torch.equal(embedding[:, 0], torch.ones(len(embedding)))
    rank = factors.embedding_VK.shape[1]
    assert rank == 56 and not head[:, 1 : 64 - rank].any()
    # The drawn places keep their direction, so unequal tokens stay unequal even where nothing was counted.
    drawn = tiny_model(vocab_size=WORDS, hidden_size=64).embed_tokens.weight.detach()[:, 1 : 64 - rank]
    torch.testing.assert_close(F.normalize(embedding[:, 1 : 64 - rank]), F.normalize(drawn))
    cut = embedding[:, -rank:].square().sum(1) > 0.79 * 64
    assert 0 < cut.sum() < WORDS - 5
    torch.testing.assert_close((embedding @ head.T).log_softmax(-1)[~cut], of_factors(factors)[~cut], rtol=1e-3, atol=1e-3)
    loss = F.cross_entropy((embedding @ head.T)[text[:-1].astype(int)], torch.from_numpy(text[1:].astype(int)))
    shares = counted(text).sum(0)[: WORDS - 5] / (len(text) - 1)
    assert loss < -(shares * shares.log()).sum() - 0.5  # far below the loss of knowing each token's share alone


def test_an_induction_head_keeps_its_places(text) -> None:
    shape = {"hidden_size": 64, "head_dim": 20, "attention_init": "induction", "vocab_size": WORDS}
    model = tiny_model(**shape)
    assert rank_for(model.config) == 38  # of 64, less the constant and 20 for the token before
    start_from_bigrams(model, bigram_factors([text], rows=64, rank=38, seed=0))
    assert not model.embed_tokens.weight[:, 1:21].any()
    torch.testing.assert_close(model.embed_tokens.weight.detach().square().mean(1), torch.ones(64))


@pytest.mark.parametrize("shape", [{"tie_embeddings": True, "head_init": "normal"}, {"embed_rank": 8}])
def test_one_matrix_for_both_is_refused(shape: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="embedding_init=bigrams needs untied, unfactorized embeddings"):
        ModelConfig(embedding_init="bigrams", **shape)


@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_next_to_no_text_gives_a_start_without_nan(tokens: int) -> None:
    model = tiny_model(vocab_size=WORDS, hidden_size=64)
    start_from_bigrams(model, bigram_factors([np.arange(tokens, dtype=np.uint16)], rows=64, rank=56, seed=0))
    assert all(weight.isfinite().all() for weight in (model.embed_tokens.weight, model.lm_head.weight))
