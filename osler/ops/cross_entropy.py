"""Linear head and cross-entropy in one, by chunks of tokens, so that only a part of the tokens x vocabulary logits is in memory.

The gradient of a summed cross-entropy is known as soon as the logits are, so the forward pass turns each chunk of logits into its
part of the gradients. The gradient of log-probabilities (RL) is not known yet, so their backward pass computes each chunk again.
Matmuls run in the dtype of the features, the log-sum-exp and sums of weight gradients in fp32. Both compile with
``fullgraph=True``.

Shape legend: N tokens, R features per token, V rows of the head (padding included), C tokens of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from osler.ops.copies import Copies, add_copies_, copied_logits_reference
from osler.ops.labels import IGNORED
from osler.ops.precision import wide

WEIGHT_PIECE = 1 << 25  # elements of a weight gradient that are widened to fp32 at a time: 128 MB
CHUNK_BYTES = 1 << 28  # the most in a chunk of logits: in fp32 1,280 tokens with 50k words, or 320 with 200k
BLOCK_LOGITS = {"cpu": 1 << 21}  # logits that are widened to fp32 at a time: few enough to stay in the cache
CACHED_LOGITS = {"cpu": 1 << 19}  # logits in fp32 that stay in a core's cache
TILES = {"cpu": 4}  # parts of the vocabulary that compiled code takes one after another, each at least TILE_WORDS wide
TILE_WORDS = 12_800
WHOLE_CHUNK_TOKENS = 1024  # of a vocabulary of one tile: more of its logits stay in the cache between the passes over them
TILED_CHUNK_TOKENS, TILED_CHUNK_BYTES = 4096, 400 << 20  # larger, because exponentials replace logits tile by tile

# Features [C, R], labels [C], the scale of each label's loss [C], and the log-masses of all copies and of the label's [C].
Chunks = list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # the loss; its gradients for features, head, and both log-masses
Tiles = list[tuple[int, Tensor]]  # the first word of each tile, and its rows of the head
Statistic = Callable[[Tensor, Tensor], Tensor]  # [C] from log-softmax [C, V], which it may overwrite, and labels [C]


def cross_entropy_reference(
    features_NR: Tensor, weight_VR: Tensor, labels_N: Tensor, *, vocab_size: int | None = None, copies: Copies | None = None
) -> Tensor:
    """Compute :func:`linear_cross_entropy` by its definition: full logits, and the sum of ``F.cross_entropy``."""
    logits = wide(features_NR @ weight_VR[:vocab_size].to(features_NR.dtype).T)
    if copies is not None:
        logits = copied_logits_reference(logits, *copies.part(0, len(logits)))
    return F.cross_entropy(logits, labels_N, ignore_index=IGNORED, reduction="sum")


def linear_cross_entropy(
    features_NR: Tensor,
    weight_VR: Tensor,
    labels_N: Tensor,
    *,
    vocab_size: int | None = None,
    log_masses: tuple[Tensor, Tensor] | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return the sum over tokens of -log softmax(features @ weight.T)[label], fp32 scalar, in nats.

    Labels equal to -100 count nothing; weight rows from ``vocab_size`` on are padding and take no probability. ``log_masses``
    (``copies.log_masses``, [N] each) are the copies that stand beside the vocabulary in the softmax; they get gradients, too.
    """
    scale_N = wide((labels_N != IGNORED).to(features_NR.dtype))  # in the dtype of every sum
    words, logit_bytes = weight_VR.shape[0], features_NR.element_size()
    if chunk_tokens is None and torch.compiler.is_compiling() and features_NR.device.type in TILES:
        most_tokens = TILED_CHUNK_TOKENS if words > TILE_WORDS else WHOLE_CHUNK_TOKENS
        chunk_tokens = default_chunk_tokens(words, logit_bytes, most_tokens, TILED_CHUNK_BYTES)
    numbers = (vocab_size or words, chunk_tokens or default_chunk_tokens(words, logit_bytes))
    # Two tensors, because a compiler refuses the same one twice.
    of_all_N, of_label_N = log_masses or [torch.full_like(scale_N, -torch.inf) for _ in range(2)]
    loss: Tensor = _LinearCrossEntropy.apply(
        features_NR, weight_VR, labels_N.clamp_min(0), scale_N, of_all_N, of_label_N, numbers
    )
    return loss


def linear_logprobs(
    head: tuple[Tensor, Tensor],
    labels_N: Tensor,
    statistic: Statistic,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    mask_NV: Tensor | None = None,
    copies: Copies | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return for each label its log-probability, and the ``statistic`` of its distribution, each [N].

    The log-probability is fp32 in nats, at ``temperature``, and has a gradient. ``mask_NV`` (bool, [N, vocab_size]) is a sampling
    mask to renormalise over, with the labels in it. ``copies`` become part of the logits before both. ``head`` is features
    [N, R] and weight [V, R].
    """
    features_NR, weight_VR = head
    words = weight_VR.shape[0]
    backward_tokens = chunk_tokens or default_chunk_tokens(words)
    # The forward pass reads the logits of a chunk several times, so on a CPU they are few enough to stay in the cache.
    is_cached = chunk_tokens is None and features_NR.device.type in CACHED_LOGITS and not torch.compiler.is_compiling()
    forward_tokens = max(64, CACHED_LOGITS[features_NR.device.type] // words) if is_cached else backward_tokens
    numbers = (vocab_size or words, temperature, forward_tokens, backward_tokens)
    copied = copies or (None, None, None)
    logp, found = _LinearLogprobs.apply(features_NR, weight_VR, labels_N, (statistic, numbers), mask_NV, *copied)
    return logp, found


def entropy(log_softmax_CV: Tensor, labels_C: Tensor) -> Tensor:
    """Return the entropy of each distribution in nats; overwrites the logarithms."""
    # A word outside the mask has log-probability -inf and adds nothing: 0 * -inf must not become NaN.
    return -log_softmax_CV.exp().mul_(log_softmax_CV.clamp_min_(-1e9)).sum(-1)


def is_likeliest(log_softmax_CV: Tensor, labels_C: Tensor) -> Tensor:
    """Return whether each label is the likeliest word of its distribution."""
    return log_softmax_CV.argmax(-1) == labels_C


def default_chunk_tokens(vocab_size: int, logit_bytes: int = 4, most_tokens: int = 2048, most_bytes: int = CHUNK_BYTES) -> int:
    """Return how many tokens' logits fit in ``most_bytes``: a multiple of 64, at least 64 and at most ``most_tokens``."""
    return max(64, min(most_tokens, most_bytes // (logit_bytes * vocab_size) // 64 * 64))


def _tile_words(head_VR: Tensor) -> int:
    words = -(-head_VR.shape[0] // TILES.get(head_VR.device.type, 1))
    return max(TILE_WORDS, -(-words // 64) * 64)  # whole cache lines


@torch.library.custom_op("osler::in_turn", mutates_args=(), schema="(Tensor x, Tensor[] after) -> Tensor")
def in_turn(x: Tensor, after: list[Tensor]) -> Tensor:
    """Return ``x`` once ``after`` has been computed; without it a compiler would fuse all chunks and hold all their logits."""
    return x.clone()


@in_turn.register_fake
def _(x: Tensor, after: list[Tensor]) -> Tensor:
    return torch.empty_like(x)


def without_padding(logits_CV: Tensor, vocab_size: int) -> Tensor:
    """Return the logits with -inf in the columns from ``vocab_size`` on."""
    if vocab_size >= logits_CV.shape[1]:
        return logits_CV
    return logits_CV.masked_fill(torch.arange(logits_CV.shape[1], device=logits_CV.device) >= vocab_size, float("-inf"))


# Of the softmax that the vocabulary has beside copies: what is divided by it must still fit into bf16 and fp32.
LEAST_SHARE = 1e-30


class WithCopies(NamedTuple):
    """What a token's copies change about its loss, each [C]."""

    loss_C: Tensor  # before its scale
    share_C: Tensor  # of the softmax that the vocabulary has: 1 without copies
    label_share_C: Tensor  # of the label's probability that comes from the vocabulary: 1 without copies

    @classmethod
    def of(cls, log_sum_C: Tensor, label_logit_C: Tensor, of_all_C: Tensor, of_label_C: Tensor) -> WithCopies:
        """Return it for the log-sum-exp of the vocabulary, the label's logit and the log-masses of the copies."""
        total_C, label_C = torch.logaddexp(log_sum_C, of_all_C), torch.logaddexp(label_logit_C, of_label_C)
        # The gradients divide by the vocabulary's share, which would be 0 where copies weigh some 90 nats more than all words.
        return cls(total_C - label_C, (log_sum_C - total_C).exp().clamp_min(LEAST_SHARE), (label_logit_C - label_C).exp())

    def gradients(self, scale_C: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients for both log-masses."""
        return (1 - self.share_C) * scale_C, (self.label_share_C - 1) * scale_C


def _eager_gradients(chunks: Chunks, head_VR: Tensor, vocab_size: int) -> Gradients:
    """Return the loss, and its gradients; that of the head is in the dtype it was summed in.

    This goes chunk by chunk and overwrites the logits of each with their gradient.
    """
    grad_head = torch.zeros_like(head_VR, dtype=chunks[0][2].dtype)
    losses, grad_chunks, grad_all, grad_label = [], [], [], []
    for x, *of_tokens in chunks:
        logits = x @ head_VR.T
        loss, share_C, of_all_C, of_label_C = _into_gradient(logits, of_tokens, vocab_size)
        losses.append(loss)
        grad_chunks.append((wide(logits @ head_VR) * share_C[:, None]).to(x.dtype))
        add_weight_gradient(grad_head, logits, (x * share_C[:, None]).to(x.dtype))
        grad_all.append(of_all_C)
        grad_label.append(of_label_C)
        del logits  # else the logits of two chunks would be in memory
    return torch.stack(losses).sum(), torch.cat(grad_chunks), grad_head, torch.cat(grad_all), torch.cat(grad_label)


def _into_gradient(logits_CV: Tensor, of_tokens: list[Tensor], vocab_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a chunk's summed loss, a factor for each token, and the gradients of its log-masses.

    The gradient of the logits but for this factor overwrites them. A whole chunk would go through memory once for every operator;
    a block of its rows stays in the cache.
    """
    rows = max(1, BLOCK_LOGITS.get(logits_CV.device.type, logits_CV.numel()) // logits_CV.shape[1])
    losses, shares, grad_all, grad_label = [], [], [], []
    for block, label, scale, *masses in zip(*(each.split(rows) for each in (logits_CV, *of_tokens)), strict=True):
        label_logit, logits = wide(block.gather(1, label[:, None])).squeeze(1), without_padding(wide(block), vocab_size)
        most = logits.amax(-1)
        exp = (logits - most[:, None]).exp_().to(block.dtype)
        total = wide(exp).sum(-1)
        copied = WithCopies.of(total.log() + most, label_logit, *masses)
        losses.append((copied.loss_C * scale).sum())
        shares.append(scale * copied.share_C / total)
        of_all, of_label = copied.gradients(scale)
        grad_all.append(of_all)
        grad_label.append(of_label)
        label_error = ((label_logit - most).exp() - total * copied.label_share_C / copied.share_C).to(block.dtype)
        block.copy_(exp.scatter_(1, label[:, None], label_error[:, None]))
    return torch.stack(losses).sum(), torch.cat(shares), torch.cat(grad_all), torch.cat(grad_label)


def add_weight_gradient(grad_weight_VR: Tensor, grad_logits_CV: Tensor, x_CR: Tensor) -> None:
    """Add one chunk's part, in pieces of the vocabulary, because the whole widened product would be as large as the sum."""
    rows = max(1, WEIGHT_PIECE // x_CR.shape[1])
    if rows >= grad_weight_VR.shape[0] or torch.compiler.is_compiling():  # compiled code widens nothing separately
        grad_weight_VR += grad_logits_CV.T @ x_CR
        return
    for sum_PR, part_CP in zip(grad_weight_VR.split(rows), grad_logits_CV.split(rows, dim=1), strict=True):
        sum_PR += part_CP.T @ x_CR


def _compiled_gradients(chunks: Chunks, head_VR: Tensor, vocab_size: int) -> Gradients:
    """Compute the same as ``_eager_gradients``, in a form for a compiler, which fuses the operations on a logit.

    On a CPU it goes by tiles of the vocabulary, whose exponentials take the place of their logits one tile after the other. A
    logit's exponential is taken once: exp(logit - largest logit) goes through the matmuls, and the division by the sum follows.
    """
    tile_words = _tile_words(head_VR)
    tiles = list(zip(range(0, head_VR.shape[0], tile_words), head_VR.split(tile_words), strict=True))
    loss = chunks[0][2].new_zeros(())
    grad_chunks: list[Tensor] = []
    grad_tiles: list[Tensor] = []
    grad_masses: list[tuple[Tensor, Tensor]] = []
    for x, label, scale, *masses in chunks:
        if grad_chunks:
            x = in_turn(x, [grad_chunks[-1], *grad_tiles])
        tile_logits, most_C, label_logit_C = _tile_logits(x, tiles, label, vocab_size)
        exps: list[Tensor] = []
        for (start, _), logits in zip(tiles, tile_logits, strict=True):
            # So that these take the place of the logits tile by tile, once those of the labels have been read.
            largest_C = in_turn(most_C, exps[-1:] or [label_logit_C]) if len(tiles) > 1 else most_C
            exps.append((without_padding(wide(logits), vocab_size - start) - largest_C[:, None]).exp().to(x.dtype))
        sum_C = torch.stack([wide(exp).sum(-1) for exp in exps]).sum(0)  # of what was written: summing fp32 would write that too
        copied = WithCopies.of(sum_C.log() + most_C, label_logit_C, *masses)
        loss = loss + (copied.loss_C * scale).sum()
        grad_masses.append(copied.gradients(scale))
        share_C1 = (scale * copied.share_C / sum_C)[:, None]
        scaled_x = (x * share_C1).to(x.dtype)
        grad_x = torch.zeros_like(x, dtype=scale.dtype)
        parts: list[Tensor] = []
        for (start, tile), exp in zip(tiles, exps, strict=True):
            if parts:
                sum_C = in_turn(sum_C, [grad_x, parts[-1]])
            of_label_C = sum_C * copied.label_share_C / copied.share_C
            error = _minus_at_label(exp, label - start, (label_logit_C - most_C).exp(), of_label_C)
            grad_x = grad_x + error @ tile
            parts.append(error.T @ scaled_x)
        grad_chunks.append((grad_x * share_C1).to(x.dtype))
        if grad_tiles:
            grad_tiles = [whole + part for whole, part in zip(grad_tiles, parts, strict=True)]
        else:
            grad_tiles = parts if len(chunks) == 1 else [wide(part) for part in parts]
    grad_all, grad_label = (torch.cat(parts) for parts in zip(*grad_masses, strict=True))
    return loss, torch.cat(grad_chunks), torch.cat(grad_tiles), grad_all, grad_label


def _minus_at_label(exp_CV: Tensor, label_C: Tensor, label_exp_C: Tensor, less_C: Tensor) -> Tensor:
    """Return the exponentials with ``less_C`` subtracted at each label that is among these words."""
    is_here_C = (label_C >= 0) & (label_C < exp_CV.shape[1])
    place = torch.arange(exp_CV.shape[0], device=exp_CV.device), label_C * is_here_C
    return exp_CV.index_put(place, torch.where(is_here_C, (label_exp_C - less_C).to(exp_CV.dtype), exp_CV[place]))


def _tile_logits(x_CR: Tensor, tiles: Tiles, label_C: Tensor, vocab_size: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return the logits of every tile, the largest logit of all tiles, and the logits of the labels."""
    tile_logits: list[Tensor] = []
    most: list[Tensor] = []
    label_logit_C = torch.zeros_like(label_C, dtype=torch.promote_types(x_CR.dtype, torch.float32))
    for start, tile in tiles:
        logits = (in_turn(x_CR, most[-1:]) if most else x_CR) @ tile.T
        most.append(without_padding(wide(logits), vocab_size - start).amax(-1))
        is_here_C = (label_C >= start) & (label_C < start + tile.shape[0])
        here = logits.gather(1, ((label_C - start) * is_here_C)[:, None]).squeeze(1)
        label_logit_C = label_logit_C + here.masked_fill(~is_here_C, 0.0)
        tile_logits.append(logits)
    return tile_logits, torch.stack(most).amax(0), label_logit_C


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        labels: Tensor,
        scale: Tensor,
        of_all: Tensor,
        of_label: Tensor,
        numbers: tuple[int, int],
    ) -> Tensor:
        (vocab_size, chunk_tokens), head = numbers, weight.to(features.dtype)
        chunks = list(zip(*(each.split(chunk_tokens) for each in (features, labels, scale, of_all, of_label)), strict=True))
        gradients = _compiled_gradients if torch.compiler.is_compiling() else _eager_gradients
        loss, *to_save = gradients(chunks, head, vocab_size)
        ctx.save_for_backward(*to_save)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_features, grad_head, grad_all, grad_label = ctx.saved_tensors
        grad_weight = (grad_head.to(grad_loss.dtype) * grad_loss).to(ctx.weight_dtype)
        grad_features = grad_features * grad_loss.to(grad_features.dtype)
        return grad_features, grad_weight, None, None, grad_all * grad_loss, grad_label * grad_loss, None


def _scaled(logits_CV: Tensor, mask_CV: Tensor | None, temperature: float) -> Tensor:
    if mask_CV is not None:
        mask_CV = F.pad(mask_CV, (0, logits_CV.shape[1] - mask_CV.shape[1]))
        logits_CV = logits_CV.masked_fill(~mask_CV, float("-inf"))
    return logits_CV if temperature == 1 else logits_CV / temperature


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        labels: Tensor,
        how: tuple[Statistic, tuple[int, float, int, int]],
        mask: Tensor | None,
        *copied: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(features, weight, labels, mask, *copied)
        statistic, ctx.numbers = how
        vocab_size, temperature, chunk_tokens, _ = ctx.numbers
        head, copies = weight.to(features.dtype), _copies(*copied)
        # Small results that stay between the large logits of two chunks would let the C library take new memory for each chunk.
        logp_N = features.new_empty(features.shape[0], dtype=torch.promote_types(features.dtype, torch.float32))
        found_N: Tensor | None = None
        for start in range(0, features.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits = without_padding(wide(features[part] @ head.T), vocab_size)
            if copies is not None:
                add_copies_(logits, *copies.part(start, chunk_tokens))
            log_softmax = _scaled(logits, None if mask is None else mask[part], temperature).log_softmax(-1)
            logp_N[part] = log_softmax.gather(1, labels[part, None]).squeeze(1)
            found_C = statistic(log_softmax, labels[part])
            found_N = found_C.new_empty(features.shape[0]) if found_N is None else found_N
            found_N[part] = found_C
        assert found_N is not None  # there is a token at least
        ctx.mark_non_differentiable(found_N)
        return logp_N, found_N

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        features, weight, labels, mask, *copied = ctx.saved_tensors
        vocab_size, temperature, _, chunk_tokens = ctx.numbers
        head, copies = weight.to(features.dtype), _copies(*copied)
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(features.dtype, torch.float32))
        grad_chunks: list[Tensor] = []
        grad_scores: list[Tensor] = []
        for start in range(0, features.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits = without_padding(wide(features[part] @ head.T), vocab_size)
            of_chunk = None
            if copies is not None:
                ids_CS, score_CS = copies.part(start, chunk_tokens)
                of_chunk = ids_CS, score_CS, *add_copies_(logits, ids_CS, score_CS)
            logits = _scaled(logits, None if mask is None else mask[part], temperature)
            one_hot = labels[part, None] == torch.arange(head.shape[0], device=head.device)
            grad_logits = (one_hot.to(logits.dtype) - logits.softmax(-1)) * (grad_logp[part, None] / temperature)
            if of_chunk is not None:  # a word's gradient goes to its logit and to its places by their shares of its probability
                ids_CS, score_CS, before_CS, after_CS = of_chunk
                grad_CS = grad_logits.gather(1, ids_CS)
                # A share is at most 1, but a word all of whose places are far below the best one has lost them in the sum.
                grad_scores.append(grad_CS * (score_CS - after_CS).clamp_max(0).exp())
                grad_logits.scatter_(1, ids_CS, grad_CS * (before_CS - after_CS).exp())
            grad_logits = grad_logits.to(features.dtype)
            grad_chunks.append(grad_logits @ head)
            add_weight_gradient(grad_weight, grad_logits, features[part])
        grad_score = torch.cat(grad_scores) if grad_scores else None
        return torch.cat(grad_chunks), grad_weight.to(weight.dtype), None, None, None, None, None, grad_score


def _copies(next_ids_BS: Tensor | None, row_N: Tensor | None, score_NS: Tensor | None) -> Copies | None:
    """Put the parts together again that ``apply`` takes one by one, because it only sees gradients of plain tensors."""
    return None if next_ids_BS is None or row_N is None or score_NS is None else Copies(next_ids_BS, row_N, score_NS)
