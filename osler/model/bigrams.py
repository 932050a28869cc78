"""Embeddings and a head that start with what counting knows: how often one token follows another.

A model without blocks is a bigram model of low rank: its logits are head @ embedding[token]. A good one of those is known in
closed form: the largest singular vectors of the pointwise mutual information of neighbours (Levy and Goldberg, NeurIPS 2014),
here smoothed. Training finds it, too, but needs its first steps for that, and rare tokens see few steps.

The first place of every embedding becomes the constant 1, with which the head gives each token its share of the text. The last
places hold the singular vectors; those between stay as they were drawn, so that each token can be told from all others.
Shapes: V rows of the embedding, K singular vectors, C a few more, P pairs that occur, D hidden.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from osler.model.config import ModelConfig
from osler.model.transformer import Transformer
from osler.runtime.sharded import put_whole, whole

PRIOR_COUNT = 20.0  # for each first token, so many pairs as in unrelated text are added to those that were counted
EXTRA_VECTORS, ITERATIONS = 16, 2  # of the randomized decomposition
RANK_SHARE = 0.9  # of the free places of an embedding, for singular vectors; half and a quarter were a little worse
SHARE = 0.5  # of the squared length of an embedding, on average, that belongs to its singular vectors
LARGEST_SHARE = 0.8  # of one embedding

Product = Callable[[Tensor], Tensor]  # of a square matrix with some vectors, [V, C] -> [V, C]


class Factors(NamedTuple):
    """A bigram model of low rank: logits = embedding @ head.T + log_share, up to a constant for each row."""

    embedding_VK: Tensor
    head_VK: Tensor
    log_share_V: Tensor  # log-probability of each token, whatever is before it


def rank_for(config: ModelConfig) -> int:
    """Return how many singular vectors an embedding takes; the constant and an induction head need places of their own."""
    free = config.hidden_size - 1 - (config.head_dim if config.attention_init == "induction" else 0)
    return int(RANK_SHARE * free)


def bigram_factors(texts: Sequence[npt.NDArray[Any]], *, rows: int, rank: int, seed: int) -> Factors:
    """Return a bigram model of rank ``rank`` of some texts, which are arrays of token ids below ``rows``."""
    first_P, second_P, count_P = count_pairs(texts, rows)
    before_V, after_V = (torch.bincount(ids_P, count_P, rows) for ids_P in (first_P, second_P))
    share_V = (after_V + 1) / (after_V.sum() + rows)
    # The matrix is log(P(second | first) / P(second)). Where a pair never occurs it is a constant of its row, ``-absent_V``, so
    # what is left is sparse.
    value_P = torch.log1p(count_P / (PRIOR_COUNT * share_V[second_P]))
    absent_V = torch.log1p(before_V / PRIOR_COUNT)
    # An entry counts by how often its tokens occur, as in a loss over tokens.
    root_before_V, root_share_V = (before_V + 5).sqrt(), share_V.sqrt()
    weighted_P, weighted_absent_V = value_P * root_before_V[first_P] * root_share_V[second_P], absent_V * root_before_V
    matrix, by_second_P = (first_P, second_P, weighted_P), second_P.argsort(stable=True)
    transposed = (second_P[by_second_P], first_P[by_second_P], weighted_P[by_second_P])

    def product(dense_VC: Tensor) -> Tensor:
        return sparse_product(*matrix, dense_VC) - torch.outer(weighted_absent_V, root_share_V @ dense_VC)

    def transposed_product(dense_VC: Tensor) -> Tensor:
        return sparse_product(*transposed, dense_VC) - torch.outer(root_share_V, weighted_absent_V @ dense_VC)

    drawn_VC = torch.randn(rows, min(rank + EXTRA_VECTORS, rows), generator=torch.Generator().manual_seed(seed))
    left_VK, size_K, right_VK = singular_vectors(product, transposed_product, drawn_VC, rank)
    root_K = size_K.sqrt()
    return Factors(left_VK * root_K / root_before_V[:, None], right_VK * root_K / root_share_V[:, None], share_V.log())


def count_pairs(texts: Sequence[npt.NDArray[Any]], rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first and the second token of each pair of neighbours that occurs, in order, and how often, in fp32."""
    pairs = [text[:-1].astype(np.int64) * rows + text[1:] for text in texts]
    found, count = np.unique(np.concatenate(pairs), return_counts=True)
    return torch.from_numpy(found // rows), torch.from_numpy(found % rows), torch.from_numpy(count).float()


def sparse_product(row_P: Tensor, column_P: Tensor, value_P: Tensor, dense_VC: Tensor) -> Tensor:
    """Return the product of a sparse square matrix, given by its entries in the order of rows, and a dense one."""
    starts_V = torch.searchsorted(row_P, torch.arange(len(dense_VC)))
    return F.embedding_bag(column_P, dense_VC, starts_V, mode="sum", per_sample_weights=value_P)


def singular_vectors(product: Product, transposed: Product, drawn_VC: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ``rank`` largest left vectors [V, K], singular values [K] and right vectors [V, K] of a matrix.

    The matrix is given by its products; ``drawn_VC`` is random, with some columns more than ``rank`` (arXiv 0909.4061).
    """
    basis_VC = torch.linalg.qr(product(drawn_VC)).Q
    for _ in range(ITERATIONS):
        basis_VC = torch.linalg.qr(product(torch.linalg.qr(transposed(basis_VC)).Q)).Q
    right_VC, size_C, mixed_CC = torch.linalg.svd(transposed(basis_VC), full_matrices=False)
    return (basis_VC @ mixed_CC.T)[:, :rank], size_C[:rank], right_VC[:, :rank]


@torch.no_grad()
def start_from_bigrams(model: Transformer, factors: Factors) -> None:
    """Overwrite the freshly drawn embedding and head of ``model``, which must be two matrices; the ranks do so together."""
    assert model.lm_head is not None
    width, rank = model.config.hidden_size, factors.embedding_VK.shape[1]
    longest = math.sqrt(LARGEST_SHARE * width)
    embedding_VD = whole(model.embed_tokens.weight).cpu()
    vectors_VK = factors.embedding_VK
    scale = (SHARE * width / vectors_VK.square().sum(1).mean().clamp(min=1e-12)).sqrt()  # of one token nothing is counted
    vectors_VK = vectors_VK * scale
    length_V1 = vectors_VK.norm(dim=1, keepdim=True)
    vectors_VK = vectors_VK * (longest / length_V1.clamp(min=longest))
    drawn = embedding_VD[:, 1 : width - rank]
    left_V1 = width - 1 - vectors_VK.square().sum(1, keepdim=True)  # of the squared length, which the final norm makes ``width``
    drawn = drawn * (left_V1 / drawn.square().sum(1, keepdim=True)).sqrt()
    put_whole(model.embed_tokens.weight, torch.cat([torch.ones(len(drawn), 1), drawn, vectors_VK], 1))
    head_VD = torch.zeros(len(drawn), width)
    head_VD[:, 0] = factors.log_share_V - factors.log_share_V.mean()
    head_VD[:, width - rank :] = factors.head_VK / scale
    put_whole(model.lm_head.weight, head_VD)
