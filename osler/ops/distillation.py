"""The loss of distillation from two heads: cross-entropy and forward KL from a teacher, by chunks of tokens (arXiv 1503.02531).

For each token the student learns the label, and the teacher's distribution over the vocabulary at a temperature T:

    (1 - share) * cross-entropy + share * T² * KL(teacher || student)

T² keeps the gradient of the KL as large as at T = 1. As in ``cross_entropy.py`` the forward pass turns each chunk of logits into
its part of the gradients, so neither model's logits are ever in memory all at once. Nothing flows back into the teacher.

Shape legend: N tokens, R features per token, V rows of the head (padding included), C tokens of one chunk.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from osler.ops.cross_entropy import (
    BLOCK_LOGITS,
    CHUNK_BYTES,
    add_weight_gradient,
    default_chunk_tokens,
    in_turn,
    wide,
    without_padding,
)
from osler.ops.labels import IGNORED

LIVE_TENSORS = 8  # tensors of the size of a chunk's fp32 logits that exist at once
LEAST_LOG = -1e9  # stands for the logarithm of 0 where that is multiplied by 0


class Mix(NamedTuple):
    """The share of the KL in the loss, from 0 to 1, the temperature of its two distributions, and the size of the vocabulary."""

    share: float
    temperature: float
    vocab_size: int


def distillation_reference(
    features_NR: Tensor, weight_VR: Tensor, labels_N: Tensor, teacher: tuple[Tensor, Tensor], mix: Mix
) -> Tensor:
    """Compute :func:`linear_distillation` by its definition, from the full logits of both models."""
    heads = (features_NR, weight_VR), teacher
    student_NV, teacher_NV = (wide(x @ head[: mix.vocab_size].to(x.dtype).T) for x, head in heads)
    ce = F.cross_entropy(student_NV, labels_N, ignore_index=IGNORED, reduction="sum")
    log_q, log_p = ((logits / mix.temperature).log_softmax(-1)[labels_N != IGNORED] for logits in (student_NV, teacher_NV))
    kl = (log_p.exp() * (log_p - log_q)).sum()
    return torch.stack([ce, kl, (1 - mix.share) * ce + mix.share * mix.temperature**2 * kl])


def linear_distillation(
    features_NR: Tensor,
    weight_VR: Tensor,
    labels_N: Tensor,
    teacher: tuple[Tensor, Tensor],
    mix: Mix,
    *,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return three sums over the tokens, fp32 in nats: the cross-entropy, the KL, and the loss. The loss alone has a gradient.

    ``teacher`` holds the teacher's features [N, its own R] and its head, which has the same vocabulary. A token with the label
    -100 counts in no sum; rows of a head from ``vocab_size`` on are padding and take no probability.
    """
    scale_N = wide((labels_N != IGNORED).to(features_NR.dtype))
    chunk_tokens = chunk_tokens or default_chunk_tokens(LIVE_TENSORS * weight_VR.shape[0], most_bytes=CHUNK_BYTES)
    ce, kl, loss = _LinearDistillation.apply(
        features_NR, weight_VR, labels_N.clamp_min(0), scale_N, *(each.detach() for each in teacher), (mix, chunk_tokens)
    )
    return torch.stack([ce, kl, loss])


def _sums_and_gradient(
    logits_CV: Tensor, teacher_CV: Tensor, label_C: Tensor, scale_C: Tensor, mix: Mix
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums of cross-entropy and KL, and the gradient of the loss with respect to the logits of the student."""
    share, temperature, vocab_size = mix
    student, teacher = (without_padding(wide(logits), vocab_size) for logits in (logits_CV, teacher_CV))
    log_softmax = student.log_softmax(-1)
    log_q = log_softmax if temperature == 1 else (student / temperature).log_softmax(-1)
    log_p = (teacher / temperature).log_softmax(-1)
    p = log_p.exp()
    ce = -(log_softmax.gather(1, label_C[:, None]).squeeze(1) * scale_C).sum()
    # Padding rows have probability 0 in both: 0 * (-inf + inf) must not become NaN.
    kl = ((p * (log_p.clamp_min(LEAST_LOG) - log_q.clamp_min(LEAST_LOG))).sum(-1) * scale_C).sum()
    one_hot = label_C[:, None] == torch.arange(logits_CV.shape[1], device=label_C.device)
    error = (1 - share) * (log_softmax.exp() - one_hot.to(p.dtype)) + share * temperature * (log_q.exp() - p)
    return ce, kl, (error * scale_C[:, None]).to(logits_CV.dtype)


def _chunk_sums_and_gradient(
    logits_CV: Tensor, teacher_CV: Tensor, label_C: Tensor, scale_C: Tensor, mix: Mix
) -> tuple[Tensor, Tensor, Tensor]:
    """Do the same as ``_sums_and_gradient``, uncompiled on a CPU by blocks of rows that stay in the cache."""
    rows = max(1, BLOCK_LOGITS.get(logits_CV.device.type, logits_CV.numel()) // logits_CV.shape[1])
    if torch.compiler.is_compiling() or rows >= logits_CV.shape[0]:
        return _sums_and_gradient(logits_CV, teacher_CV, label_C, scale_C, mix)
    sums = []
    parts = (each.split(rows) for each in (logits_CV, teacher_CV, label_C, scale_C))
    for block, teacher, label, scale in zip(*parts, strict=True):
        *block_sums, error = _sums_and_gradient(block, teacher, label, scale, mix)
        block.copy_(error)
        sums.append(torch.stack(block_sums))
    ce, kl = torch.stack(sums).sum(0)
    return ce, kl, logits_CV


class _LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        labels: Tensor,
        scale: Tensor,
        teacher_features: Tensor,
        teacher_weight: Tensor,
        numbers: tuple[Mix, int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        (mix, chunk_tokens), head = numbers, weight.to(features.dtype)
        teacher_head = teacher_weight.to(teacher_features.dtype)
        grad_head = torch.zeros_like(head, dtype=scale.dtype)
        ce, kl = scale.new_zeros(()), scale.new_zeros(())
        grad_chunks: list[Tensor] = []
        rows = (features, teacher_features, labels, scale)
        for x, teacher_x, label, scale_C in zip(*(each.split(chunk_tokens) for each in rows), strict=True):
            if grad_chunks and torch.compiler.is_compiling():
                x = in_turn(x, [grad_chunks[-1], grad_head])
            chunk_ce, chunk_kl, error = _chunk_sums_and_gradient(x @ head.T, teacher_x @ teacher_head.T, label, scale_C, mix)
            ce, kl = ce + chunk_ce, kl + chunk_kl
            grad_chunks.append(error @ head)
            add_weight_gradient(grad_head, error, x)
            del error  # else the logits of two chunks would be in memory
        ctx.save_for_backward(torch.cat(grad_chunks), grad_head)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(ce, kl)
        return ce, kl, (1 - mix.share) * ce + mix.share * mix.temperature**2 * kl

    @staticmethod
    def backward(ctx: Any, _ce: Tensor, _kl: Tensor, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_features, grad_head = ctx.saved_tensors
        grad_weight = (grad_head * grad_loss).to(ctx.weight_dtype)
        return grad_features * grad_loss.to(grad_features.dtype), grad_weight, None, None, None, None, None
