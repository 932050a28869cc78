"""Linear head and cross-entropy in one, by chunks of tokens: tokens x vocabulary logits are never held.

Idea: the gradient of a summed cross-entropy with respect to the logits is known as soon as the logits are, so the forward pass
turns each chunk of logits into its contribution to the gradients and forgets it. Log-probabilities of given labels (RL) do not
know their gradient yet; they recompute each chunk in the backward pass instead. The matmuls run in the dtype of the features,
the log-sum-exp and the weight gradient in fp32. Both pass ``torch.compile(fullgraph=True)``.

Shape legend: N tokens, R features per token, V rows of the head (padding included), C tokens of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from osler.ops.labels import IGNORED

MOST_CHUNK_TOKENS = 2048
WEIGHT_PIECE = 1 << 25  # elements of a weight gradient that are widened to fp32 at a time: 128 MB
CHUNK_BYTES = 1 << 28  # of logits: in fp32 1,280 tokens of 50k words, 320 of 200k
BLOCK_LOGITS = {"cpu": 1 << 21}  # logits that are widened to fp32 at a time: few enough to stay in the cache while worked on


def cross_entropy_reference(
    features_NR: Tensor,
    weight_VR: Tensor,
    labels_N: Tensor,
    *,
    vocab_size: int | None = None,
    loss_weight_N: Tensor | None = None,
) -> Tensor:
    """The formula itself: full logits, summed ``F.cross_entropy``; what :func:`linear_cross_entropy` is tested against."""
    logits = _wide(features_NR @ weight_VR[:vocab_size].to(features_NR.dtype).T)
    losses = F.cross_entropy(logits, labels_N, ignore_index=IGNORED, reduction="none")
    return (losses if loss_weight_N is None else losses * loss_weight_N).sum()


def linear_cross_entropy(
    features_NR: Tensor,
    weight_VR: Tensor,
    labels_N: Tensor,
    *,
    vocab_size: int | None = None,
    loss_weight_N: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Sum over tokens of -log softmax(features @ weight.T)[label], fp32 scalar, in nats.

    Labels equal to -100 count nothing; ``loss_weight_N`` scales each token; weight rows from ``vocab_size`` on are padding and
    take no probability.
    """
    valid_N = labels_N != IGNORED
    scale_N = _wide(valid_N.to(features_NR.dtype)) if loss_weight_N is None else valid_N * _wide(loss_weight_N)
    loss: Tensor = _LinearCrossEntropy.apply(
        features_NR,
        weight_VR,
        labels_N.clamp_min(0),
        scale_N,
        vocab_size or weight_VR.shape[0],
        chunk_tokens
        or default_chunk_tokens(weight_VR.shape[0], 4 if torch.compiler.is_compiling() else features_NR.element_size()),
    )
    return loss


def linear_logprobs(
    features_NR: Tensor,
    weight_VR: Tensor,
    labels_N: Tensor,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    keep_NV: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label and entropy of its distribution, both [N] fp32 in nats, at ``temperature``.

    ``keep_NV`` (bool, True = kept, [N, vocab_size]) renormalises over a sampler's kept set, which must hold the label. Only the
    log-probabilities are differentiable.
    """
    logp, entropy = _LinearLogprobs.apply(
        features_NR,
        weight_VR,
        labels_N,
        keep_NV,
        vocab_size or weight_VR.shape[0],
        temperature,
        chunk_tokens or default_chunk_tokens(weight_VR.shape[0]),
    )
    return logp, entropy


def default_chunk_tokens(vocab_size: int, logit_bytes: int = 4) -> int:
    """How many tokens' logits are held at a time: what ``CHUNK_BYTES`` allows, in whole tiles of 64."""
    return max(64, min(MOST_CHUNK_TOKENS, CHUNK_BYTES // (logit_bytes * vocab_size) // 64 * 64))


@torch.library.custom_op("osler::in_turn", mutates_args=(), schema="(Tensor x, Tensor[] after) -> Tensor")
def in_turn(x: Tensor, after: list[Tensor]) -> Tensor:
    """``x``, once ``after`` has been computed.

    A compiler sees no order between chunks and fuses across them, until the logits of all chunks lie side by side in memory.
    """
    return x.clone()


@in_turn.register_fake
def _(x: Tensor, after: list[Tensor]) -> Tensor:
    return torch.empty_like(x)


def _wide(x: Tensor) -> Tensor:
    """At least fp32: bf16 is widened, fp64 (numerical tests) stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _without_padding(logits_CV: Tensor, vocab_size: int) -> Tensor:
    if vocab_size == logits_CV.shape[1]:
        return logits_CV
    return logits_CV.masked_fill(torch.arange(logits_CV.shape[1], device=logits_CV.device) >= vocab_size, float("-inf"))


def _chunk_logits(x_CR: Tensor, weight_VR: Tensor, vocab_size: int, keep_CV: Tensor | None) -> Tensor:
    logits_CV = _without_padding(_wide(x_CR @ weight_VR.T), vocab_size)
    if keep_CV is not None:
        keep_CV = F.pad(keep_CV, (0, weight_VR.shape[0] - keep_CV.shape[1]))
        logits_CV = logits_CV.masked_fill(~keep_CV, float("-inf"))
    return logits_CV


def _loss_and_gradient(logits_CV: Tensor, label_C: Tensor, scale_C: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Summed loss of one chunk and its gradient in the dtype of the logits, written over them unless a compiler fuses it all.

    Run operator by operator, a chunk would go through memory once for each of them; a block of its rows stays in the cache.
    """
    if torch.compiler.is_compiling():
        log_softmax_CV = _without_padding(_wide(logits_CV), vocab_size).log_softmax(-1)
        loss = -(log_softmax_CV.gather(1, label_C[:, None]).squeeze(1) * scale_C).sum()
        one_hot_CV = label_C[:, None] == torch.arange(logits_CV.shape[1], device=logits_CV.device)
        error_CV = (log_softmax_CV.exp() - one_hot_CV.to(log_softmax_CV.dtype)) * scale_C[:, None]
        return loss, error_CV.to(logits_CV.dtype)
    rows = max(1, BLOCK_LOGITS.get(logits_CV.device.type, logits_CV.numel()) // logits_CV.shape[1])
    losses = []
    for block, label, scale in zip(logits_CV.split(rows), label_C.split(rows), scale_C.split(rows), strict=True):
        log_softmax = _without_padding(_wide(block), vocab_size).log_softmax(-1)
        losses.append((log_softmax.gather(1, label[:, None]).squeeze(1) * scale).sum())
        error = log_softmax.exp_().scatter_add_(1, label[:, None], log_softmax.new_full((label.shape[0], 1), -1.0))
        block.copy_(error.mul_(scale[:, None]))
    return -torch.stack(losses).sum(), logits_CV


def _add_weight_gradient(grad_weight_VR: Tensor, grad_logits_CV: Tensor, x_CR: Tensor) -> None:
    """Add one chunk's part, in pieces of the vocabulary: the product of all of it, widened, would be as large as the sum."""
    rows = max(1, WEIGHT_PIECE // x_CR.shape[1])
    if rows >= grad_weight_VR.shape[0] or torch.compiler.is_compiling():  # compiled, nothing is widened on its own
        grad_weight_VR += grad_logits_CV.T @ x_CR
        return
    for sum_PR, part_CP in zip(grad_weight_VR.split(rows), grad_logits_CV.split(rows, dim=1), strict=True):
        sum_PR += part_CP.T @ x_CR


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, labels: Tensor, scale: Tensor, vocab_size: int, chunk_tokens: int
    ) -> Tensor:
        head = weight.to(features.dtype)
        wide = torch.promote_types(features.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=features.device)
        grad_weight = torch.zeros_like(weight, dtype=wide)
        grad_chunks: list[Tensor] = []
        for x, label, weigh in zip(
            features.split(chunk_tokens), labels.split(chunk_tokens), scale.split(chunk_tokens), strict=True
        ):
            if grad_chunks and torch.compiler.is_compiling():
                x = in_turn(x, [grad_chunks[-1], grad_weight])
            chunk_loss, grad_logits = _loss_and_gradient(x @ head.T, label, weigh, vocab_size)
            loss = loss + chunk_loss
            grad_chunks.append(grad_logits @ head)
            _add_weight_gradient(grad_weight, grad_logits, x)
        ctx.save_for_backward(torch.cat(grad_chunks), grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_features, grad_weight = ctx.saved_tensors
        scaled_weight = (grad_weight * grad_loss).to(ctx.weight_dtype)
        return grad_features * grad_loss.to(grad_features.dtype), scaled_weight, None, None, None, None


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        labels: Tensor,
        keep: Tensor | None,
        vocab_size: int,
        temperature: float,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        head = weight.to(features.dtype)
        logp, entropy = [], []
        for start in range(0, features.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits = _chunk_logits(features[part], head, vocab_size, None if keep is None else keep[part]) / temperature
            log_softmax = logits.log_softmax(-1)
            logp.append(log_softmax.gather(1, labels[part, None]).squeeze(1))
            # A word outside the kept set has log-probability -inf and adds nothing: 0 * -inf must not become NaN.
            entropy.append(-(log_softmax.exp() * log_softmax.clamp_min(-1e9)).sum(-1))
        ctx.save_for_backward(features, weight, labels, keep)
        ctx.numbers = (vocab_size, temperature, chunk_tokens)
        entropy_N = torch.cat(entropy)
        ctx.mark_non_differentiable(entropy_N)
        return torch.cat(logp), entropy_N

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        features, weight, labels, keep = ctx.saved_tensors
        vocab_size, temperature, chunk_tokens = ctx.numbers
        head = weight.to(features.dtype)
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(features.dtype, torch.float32))
        grad_chunks: list[Tensor] = []
        for start in range(0, features.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            x = features[part]
            logits = _chunk_logits(x, head, vocab_size, None if keep is None else keep[part]) / temperature
            one_hot = labels[part, None] == torch.arange(head.shape[0], device=x.device)
            grad_logits = ((one_hot.to(logits.dtype) - logits.softmax(-1)) * (grad_logp[part, None] / temperature)).to(x.dtype)
            grad_chunks.append(grad_logits @ head)
            _add_weight_gradient(grad_weight, grad_logits, x)
        return torch.cat(grad_chunks), grad_weight.to(weight.dtype), None, None, None, None, None
