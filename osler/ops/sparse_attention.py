"""Attention to a few chosen keys, and the index that chooses them (DeepSeek Sparse Attention, DeepSeek-V3.2-Exp report, 2025).

The index scores every key s that a query t sees, and exact attention is computed over the ``top_k`` best keys:

    score[t, s] = sum_j w[t, j] * relu(q[t, j] . k[s])

The last ``window`` keys and the first token of the document are always among them. The index learns from
KL(p || softmax(score)) alone, where p is the attention averaged over heads, without a gradient. ``mask_attention`` is the plain
reference: it computes attention to all keys and hides those that were not chosen. ``gather_attention`` computes only the chosen
ones, some queries at a time, and again in the backward pass, so its memory is linear in length. ``index_measured`` compares the
index with attention to every key.

The loops over queries are custom operators, because a compiler would unroll them. On a GPU ``index_add_`` sums in no fixed order,
so gradients repeat only to rounding there. A choice over a block of queries would let a query see the future, so there is none.

Shape legend: B batch, T queries, which are the last of S keys, N query heads, K key/value heads, G = N / K, H head size, R
choices of a token (1, or one for each key/value head), J index heads of a choice, I index head size, C queries of a chunk, X
chosen keys, M measurements: KL, entropy of the index in nats, mean distance of the chosen keys in tokens.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from osler.ops.precision import wide

# Elements of the largest tensor of a chunk. On a CPU larger ones leave its caches. On a GPU, where no size was measured, small
# ones cost more in calls than in arithmetic.
CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**26}
RECENCY = 2.0**-40  # added to a score for each position, so that among keys without a hit every path chooses the latest ones
RECALL_QUERIES = 64  # queries of a row whose attention to all keys is computed, to know how much of it falls on the chosen ones
NUM_MEASURED = 3


class Index(NamedTuple):
    """What the index knows of a row: queries and weights of the tokens that attend, and keys of the tokens attended to."""

    q_BRTJI: Tensor
    k_BSI: Tensor
    weight_BRTJ: Tensor  # fp32; may be negative


class Choice(NamedTuple):
    """How many keys are chosen, and how many of the latest are always among them."""

    top_k: int
    window: int


# -- choosing ----------------------------------------------------------------------------------------------------------


def index_scores(index: Index) -> Tensor:
    """Return the scores of every key, also of keys after the query, fp32 [B, R, T, S]."""
    q_B11MI, keys_B11SI = index.q_BRTJI.flatten(1, 3)[:, None, None], index.k_BSI[:, None, None]
    return _scores(q_B11MI, keys_B11SI, index.weight_BRTJ)[0]


def _scores(q: Tensor, keys: Tensor, weight_BRCJ: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores and the hits relu(q . k).

    Queries are [B, R, C, J, I] where each has keys of its own, [B, 1, 1, R * C * J, I] where all have the same keys.
    """
    hits = (q @ keys.transpose(-1, -2)).relu()
    return (weight_BRCJ[..., None, :] @ wide(hits).view(*weight_BRCJ.shape, -1)).squeeze(-2), hits


def best_keys(scores_BRCS: Tensor, place: Tensor, first: Tensor, choice: Choice) -> Tensor:
    """Return the keys that each query attends to, [B, R, C, X]; slots without a key are -1.

    ``place`` is the place of each query among the keys and ``first`` that of the first token of its document; both broadcast
    against the scores.
    """
    key_S = torch.arange(scores_BRCS.shape[-1], device=scores_BRCS.device)
    always = (key_S > place - choice.window) | (key_S == first)
    scores_BRCS = (scores_BRCS + key_S * RECENCY).masked_fill(always, torch.inf)
    scores_BRCS = scores_BRCS.masked_fill((key_S > place) | (key_S < first), -torch.inf)
    best = scores_BRCS.topk(min(choice.top_k, len(key_S)), sorted=False)
    return best.indices.masked_fill(best.values == -torch.inf, -1)


def choose(index: Index, first_BT: Tensor, choice: Choice) -> Tensor:
    """Return the keys that each query attends to, int32 [B, R, T, X]; see ``best_keys``. It has no gradient."""
    chosen: Tensor = _choose(*(part.detach() for part in index), first_BT, *choice)
    return chosen


@torch.library.custom_op("osler::choose", mutates_args=())
def _choose(q_BRTJI: Tensor, k_BSI: Tensor, weight_BRTJ: Tensor, first_BT: Tensor, top_k: int, window: int) -> Tensor:
    keys = k_BSI.shape[1]
    past = keys - q_BRTJI.shape[2]  # keys before the first query
    chosen_BRTX = _empty_choice(q_BRTJI, k_BSI, weight_BRTJ, first_BT, top_k, window).fill_(-1)
    for part in _chunks(q_BRTJI.shape[2], q_BRTJI[:, :, 0, :, 0].numel() * keys, k_BSI.device):
        seen = past + part.stop  # no query of the chunk sees a later key
        scores_BRCS = index_scores(Index(q_BRTJI[:, :, part], k_BSI[:, :seen], weight_BRTJ[:, :, part]))
        place_C1 = torch.arange(past + part.start, seen, device=k_BSI.device)[:, None]
        best = best_keys(scores_BRCS, place_C1, first_BT[:, None, part, None], Choice(top_k, window))
        chosen_BRTX[:, :, part, : best.shape[-1]] = best
    return chosen_BRTX


@_choose.register_fake
def _empty_choice(q_BRTJI: Tensor, k_BSI: Tensor, weight_BRTJ: Tensor, first_BT: Tensor, top_k: int, window: int) -> Tensor:
    return q_BRTJI.new_empty(*q_BRTJI.shape[:3], min(top_k, k_BSI.shape[1]), dtype=torch.int32)


def _chunks(queries: int, elements_per_query: int, device: torch.device) -> Iterator[slice]:
    size = max(1, CHUNK_ELEMENTS[device.type] // elements_per_query)
    yield from (slice(start, min(start + size, queries)) for start in range(0, queries, size))


# -- attention to the chosen keys --------------------------------------------------------------------------------------


def mask_attention(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, index: Index, chosen_BRTX: Tensor) -> tuple[Tensor, Tensor]:
    """Return attention to the chosen keys, and measurements [B, T, M]; of these the KL has a gradient, to the index alone."""
    choices, groups = chosen_BRTX.shape[1], q_BNTH.shape[1] // k_BKSH.shape[1]
    keys = k_BKSH.shape[2]
    slots_BRTX = chosen_BRTX.long().masked_fill(chosen_BRTX < 0, keys)
    is_chosen_BRTS = torch.zeros(*chosen_BRTX.shape[:3], keys + 1, dtype=torch.bool, device=q_BNTH.device)
    is_chosen_BRTS = is_chosen_BRTS.scatter(3, slots_BRTX, True)[..., :keys]
    k_BNSH, v_BNSH = (x.repeat_interleave(groups, dim=1) for x in (k_BKSH, v_BKSH))
    scores_BNTS = wide(q_BNTH @ k_BNSH.transpose(-1, -2)) * q_BNTH.shape[-1] ** -0.5
    is_seen_BNTS = is_chosen_BRTS.repeat_interleave(q_BNTH.shape[1] // choices, dim=1)
    weights_BNTS = scores_BNTS.masked_fill(~is_seen_BNTS, -torch.inf).softmax(-1)
    p_BRTS = weights_BNTS.detach().unflatten(1, (choices, -1)).mean(2)
    measured_BTM = _measured(p_BRTS, index_scores(index), is_chosen_BRTS, _distances(chosen_BRTX, keys))
    return weights_BNTS.to(v_BKSH.dtype) @ v_BNSH, measured_BTM


def _measured(p_BRTS: Tensor, scores_BRTS: Tensor, is_chosen_BRTS: Tensor, distance_BRT: Tensor) -> Tensor:
    """Return the measurements [B, T, M], averaged over the choices, from attention and scores over the same keys."""
    log_BRTS = scores_BRTS.masked_fill(~is_chosen_BRTS, -torch.inf).log_softmax(-1).masked_fill(~is_chosen_BRTS, 0.0)
    kl_BRT = (torch.xlogy(p_BRTS, p_BRTS) - p_BRTS * log_BRTS).sum(-1)
    entropy_BRT = -(log_BRTS.exp().masked_fill(~is_chosen_BRTS, 0.0) * log_BRTS).sum(-1)
    return torch.stack([kl_BRT, entropy_BRT.detach(), distance_BRT.to(kl_BRT.dtype)], dim=-1).mean(1)


def _distances(chosen_BRTX: Tensor, keys: int) -> Tensor:
    """Return how many tokens back the chosen keys are on average."""
    queries = chosen_BRTX.shape[2]
    place_T1 = torch.arange(keys - queries, keys, device=chosen_BRTX.device)[:, None]
    is_key = chosen_BRTX >= 0
    return ((place_T1 - chosen_BRTX) * is_key).sum(-1) / is_key.sum(-1)


def gather_attention(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, index: Index, chosen_BRTX: Tensor) -> tuple[Tensor, Tensor]:
    """Compute :func:`mask_attention` with memory that is linear in length."""
    out_BNTH, _, measured_BTM = _gather(q_BNTH, k_BKSH, v_BKSH, *index, chosen_BRTX)
    return out_BNTH, measured_BTM


class _Chunk(NamedTuple):
    """Queries of a chunk with the keys that they chose."""

    q_BKCGH: Tensor
    k_BKCXH: Tensor
    v_BKCXH: Tensor
    q_BRCJI: Tensor
    k_BRCXI: Tensor
    weight_BRCJ: Tensor
    row_BKCX: Tensor  # where the keys are in [B * K * S]
    index_row_BRCX: Tensor  # where the keys of the index are in [B * S]
    is_key_BRCX: Tensor

    @property
    def scores_BKCGX(self) -> Tensor:
        scores = wide(self.q_BKCGH @ self.k_BKCXH.transpose(-1, -2)) * self.q_BKCGH.shape[-1] ** -0.5
        return scores.masked_fill(~self.is_key_BRCX[..., None, :], -torch.inf)

    def averaged(self, weights_BKCGX: Tensor) -> Tensor:
        """Return attention averaged over the heads of each choice, [B, R, C, X]."""
        return weights_BKCGX.unflatten(1, (self.is_key_BRCX.shape[1], -1)).mean((2, 4))


def _gathered_chunks(tensors: list[Tensor]) -> Iterator[tuple[slice, _Chunk]]:
    q_BNTH, k_BKSH, v_BKSH, q_BRTJI, k_BSI, weight_BRTJ, chosen_BRTX = tensors
    batch, kv_heads, keys, size = k_BKSH.shape
    choices, num_chosen = chosen_BRTX.shape[1], chosen_BRTX.shape[3]
    q_BKTGH = q_BNTH.unflatten(1, (kv_heads, -1)).transpose(2, 3)
    k_rows, v_rows, index_rows = (x.reshape(-1, x.shape[-1]) for x in (k_BKSH, v_BKSH, k_BSI))
    head_BK11 = torch.arange(0, batch * kv_heads * keys, keys, device=k_BSI.device).view(batch, kv_heads, 1, 1)
    row_B111 = torch.arange(0, batch * keys, keys, device=k_BSI.device).view(batch, 1, 1, 1)
    widest = max(kv_heads * size, choices * k_BSI.shape[-1])
    for part in _chunks(q_BNTH.shape[2], batch * num_chosen * widest, k_BSI.device):
        chosen_BRCX = chosen_BRTX[:, :, part].long()
        row_BKCX, index_row_BRCX = (chosen_BRCX.clamp_min(0) + start for start in (head_BK11, row_B111))
        yield part, _Chunk(
            q_BKTGH[:, :, part],
            k_rows.index_select(0, row_BKCX.flatten()).view(*row_BKCX.shape, size),
            v_rows.index_select(0, row_BKCX.flatten()).view(*row_BKCX.shape, size),
            q_BRTJI[:, :, part],
            index_rows.index_select(0, index_row_BRCX.flatten()).view(*index_row_BRCX.shape, -1),
            weight_BRTJ[:, :, part],
            row_BKCX,
            index_row_BRCX,
            chosen_BRCX >= 0,
        )


@torch.library.custom_op("osler::gather_attention", mutates_args=())
def _gather(
    q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, q_BRTJI: Tensor, k_BSI: Tensor, weight_BRTJ: Tensor, chosen_BRTX: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, the logarithm of each head's softmax denominator, [B, K, T, G], and the measurements."""
    tensors = [q_BNTH, k_BKSH, v_BKSH, q_BRTJI, k_BSI, weight_BRTJ, chosen_BRTX]
    out_BNTH, log_sum_BKTG, measured_BTM = _empty_results(*tensors)
    out_BKTGH = out_BNTH.unflatten(1, (k_BKSH.shape[1], -1)).transpose(2, 3)
    distance_BRT = _distances(chosen_BRTX, k_BKSH.shape[2])
    for part, chunk in _gathered_chunks(tensors):
        scores_BKCGX = chunk.scores_BKCGX
        log_sum_BKTG[:, :, part] = scores_BKCGX.logsumexp(-1)
        weights_BKCGX = (scores_BKCGX - log_sum_BKTG[:, :, part, :, None]).exp_()
        out_BKTGH[:, :, part] = weights_BKCGX.to(v_BKSH.dtype) @ chunk.v_BKCXH
        scores_BRCX, _ = _scores(chunk.q_BRCJI, chunk.k_BRCXI, chunk.weight_BRCJ)
        measured = _measured(chunk.averaged(weights_BKCGX), scores_BRCX, chunk.is_key_BRCX, distance_BRT[:, :, part])
        measured_BTM[:, part] = measured
    return out_BNTH, log_sum_BKTG, measured_BTM


@_gather.register_fake
def _empty_results(q_BNTH: Tensor, k_BKSH: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, queries = q_BNTH.shape[:3]
    dtype, kv_heads = torch.promote_types(q_BNTH.dtype, torch.float32), k_BKSH.shape[1]
    log_sum_BKTG = q_BNTH.new_empty(batch, kv_heads, queries, heads // kv_heads, dtype=dtype)
    return q_BNTH.new_empty(q_BNTH.shape), log_sum_BKTG, q_BNTH.new_empty(batch, queries, NUM_MEASURED, dtype=dtype)


@torch.library.custom_op("osler::gather_attention_backward", mutates_args=())
def _gather_backward(grad_BNTH: Tensor, grad_kl_BT: Tensor, saved: list[Tensor]) -> list[Tensor]:
    *tensors, out_BNTH, log_sum_BKTG = saved
    q_BNTH, k_BKSH, v_BKSH, q_BRTJI, k_BSI, weight_BRTJ, _ = tensors
    kv_heads, choices, scale = k_BKSH.shape[1], q_BRTJI.shape[1], q_BNTH.shape[-1] ** -0.5
    wide_type, dtype = log_sum_BKTG.dtype, q_BNTH.dtype
    grad_q, grad_q_index, grad_weight = (x.new_empty(x.shape) for x in (q_BNTH, q_BRTJI, weight_BRTJ))
    # Many queries choose the same key, so its gradient is summed in fp32.
    grad_k, grad_v, grad_k_index = (torch.zeros(x.shape, dtype=wide_type, device=x.device) for x in (k_BKSH, v_BKSH, k_BSI))
    grad_q_BKTGH, grad_BKTGH, out_BKTGH = (x.unflatten(1, (kv_heads, -1)).transpose(2, 3) for x in (grad_q, grad_BNTH, out_BNTH))
    for part, chunk in _gathered_chunks(tensors):
        weights_BKCGX = (chunk.scores_BKCGX - log_sum_BKTG[:, :, part, :, None]).exp_()
        grad_out = grad_BKTGH[:, :, part]
        shift_BKCG1 = (wide(grad_out) * wide(out_BKTGH[:, :, part])).sum(-1, keepdim=True)
        grad_weights = wide(grad_out @ chunk.v_BKCXH.transpose(-1, -2))
        grad_scores = (weights_BKCGX * (grad_weights - shift_BKCG1) * scale).to(dtype)
        grad_q_BKTGH[:, :, part] = grad_scores @ chunk.k_BKCXH
        _add_rows(grad_k, chunk.row_BKCX, grad_scores.transpose(-1, -2) @ chunk.q_BKCGH)
        _add_rows(grad_v, chunk.row_BKCX, weights_BKCGX.to(dtype).transpose(-1, -2) @ grad_out)
        scores_BRCX, hits = _scores(chunk.q_BRCJI, chunk.k_BRCXI, chunk.weight_BRCJ)
        share_BRCX = scores_BRCX.masked_fill(~chunk.is_key_BRCX, -torch.inf).softmax(-1)
        grad_index = (share_BRCX - chunk.averaged(weights_BKCGX)) * grad_kl_BT[:, None, part, None] / choices
        gradients = _scores_backward(grad_index, chunk.q_BRCJI, chunk.k_BRCXI, chunk.weight_BRCJ, hits)
        grad_q_index[:, :, part], grad_k_rows, grad_weight[:, :, part] = gradients
        _add_rows(grad_k_index, chunk.index_row_BRCX, grad_k_rows)
    return [grad_q, grad_k.to(dtype), grad_v.to(dtype), grad_q_index, grad_k_index.to(dtype), grad_weight]


@_gather_backward.register_fake
def _empty_gradients(grad_BNTH: Tensor, grad_kl_BT: Tensor, saved: list[Tensor]) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in saved[:6]]


def _add_rows(total: Tensor, rows: Tensor, values: Tensor) -> None:
    """Add values [..., H] to the rows of a total of the same last dimension."""
    total.view(-1, total.shape[-1]).index_add_(0, rows.flatten(), values.flatten(0, -2).to(total.dtype))


def _scores_backward(
    grad_BRCX: Tensor, q: Tensor, keys: Tensor, weight_BRCJ: Tensor, hits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and weights of ``_scores``."""
    grad_weight = (wide(hits).view(*weight_BRCJ.shape, -1) @ grad_BRCX[..., None]).squeeze(-1)
    grad_hits = (weight_BRCJ[..., None] * grad_BRCX[..., None, :]).reshape(hits.shape).masked_fill_(hits <= 0, 0.0).to(q.dtype)
    return grad_hits @ keys, grad_hits.transpose(-1, -2) @ q, grad_weight


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[:2])


def _gather_gradients(ctx: Any, grad_BNTH: Tensor, _: Tensor, grad_BTM: Tensor) -> tuple[Tensor | None, ...]:
    return *_gather_backward(grad_BNTH, grad_BTM[..., 0], list(ctx.saved_tensors)), None


_gather.register_autograd(_gather_gradients, setup_context=_save)


# -- the index compared with attention to all keys ---------------------------------------------------------------------


def index_measured(q_BNTH: Tensor, k_BKTH: Tensor, index: Index, first_BT: Tensor) -> Tensor:
    """Compare an index with attention to every key: return measurements [B, T, M]; the KL has a gradient to the index alone.

    Some queries are computed at a time, so memory is linear in length, though time is not.
    """
    measured: Tensor = _all_keys(q_BNTH.detach(), k_BKTH.detach(), *index, first_BT)
    return measured


class _Compared(NamedTuple):
    """For some queries: the attention to all keys up to the last query, averaged over the heads of a choice, and index scores."""

    part: slice
    p_BRCS: Tensor
    scores_BRCS: Tensor
    hits: Tensor
    is_seen_B1CS: Tensor


def _compared(tensors: list[Tensor]) -> Iterator[_Compared]:
    q_BNTH, k_BKTH, q_BRTJI, k_BTI, weight_BRTJ, first_BT = tensors
    batch, heads, queries, _ = q_BNTH.shape
    widest = batch * max(heads, q_BRTJI.shape[1] * q_BRTJI.shape[3]) * queries
    for part in _chunks(queries, widest, k_BTI.device):
        place_C1 = torch.arange(part.start, part.stop, device=q_BNTH.device)[:, None]
        is_seen_B1CS = is_seen(place_C1, first_BT[:, None, part, None], part.stop)
        p_BRCS = attention_shares(q_BNTH[:, :, part], k_BKTH[:, :, : part.stop], is_seen_B1CS, q_BRTJI.shape[1])
        q_B11MI, k_B11SI = q_BRTJI[:, :, part].flatten(1, 3)[:, None, None], k_BTI[:, None, None, : part.stop]
        yield _Compared(part, p_BRCS, *_scores(q_B11MI, k_B11SI, weight_BRTJ[:, :, part]), is_seen_B1CS)


def is_seen(place: Tensor, first: Tensor, keys: int) -> Tensor:
    """Return which keys are in the query's document and not after the query; see ``best_keys``."""
    key_S = torch.arange(keys, device=place.device)
    return (key_S <= place) & (key_S >= first)


def attention_shares(q_BNCH: Tensor, k_BKSH: Tensor, is_seen_B1CS: Tensor, choices: int) -> Tensor:
    """Return the attention of queries to keys, averaged over the heads of each choice, fp32 [B, R, C, S]."""
    q_BKMH = q_BNCH.unflatten(1, (k_BKSH.shape[1], -1)).flatten(2, 3)
    scores_BNCS = wide(q_BKMH @ k_BKSH.transpose(-1, -2)).view(*q_BNCH.shape[:3], -1) * q_BNCH.shape[-1] ** -0.5
    weights_BNCS = scores_BNCS.masked_fill(~is_seen_B1CS, -torch.inf).softmax(-1)
    return weights_BNCS.unflatten(1, (choices, -1)).mean(2)


@torch.library.custom_op("osler::index_all_keys", mutates_args=())
def _all_keys(
    q_BNTH: Tensor, k_BKTH: Tensor, q_BRTJI: Tensor, k_BTI: Tensor, weight_BRTJ: Tensor, first_BT: Tensor
) -> Tensor:
    measured_BTM = _empty_measured(q_BNTH)
    place_T = torch.arange(q_BNTH.shape[2], device=q_BNTH.device)
    distance_B1T = (place_T - first_BT)[:, None] / 2
    for each in _compared([q_BNTH, k_BKTH, q_BRTJI, k_BTI, weight_BRTJ, first_BT]):
        distance_BRC = distance_B1T[..., each.part].expand(each.p_BRCS.shape[:3])
        measured_BTM[:, each.part] = _measured(each.p_BRCS, each.scores_BRCS, each.is_seen_B1CS, distance_BRC)
    return measured_BTM


@_all_keys.register_fake
def _empty_measured(q_BNTH: Tensor, *_: Tensor) -> Tensor:
    dtype = torch.promote_types(q_BNTH.dtype, torch.float32)
    return q_BNTH.new_empty(q_BNTH.shape[0], q_BNTH.shape[2], NUM_MEASURED, dtype=dtype)


@torch.library.custom_op("osler::index_all_keys_backward", mutates_args=())
def _all_keys_backward(grad_kl_BT: Tensor, saved: list[Tensor]) -> list[Tensor]:
    _, _, q_BRTJI, k_BTI, weight_BRTJ, _ = saved
    grad_q, grad_weight = (x.new_empty(x.shape) for x in (q_BRTJI, weight_BRTJ))
    grad_k = torch.zeros(k_BTI.shape, dtype=weight_BRTJ.dtype, device=k_BTI.device)
    for part, p_BRCS, scores_BRCS, hits, is_seen_B1CS in _compared(saved):
        share_BRCS = scores_BRCS.masked_fill(~is_seen_B1CS, -torch.inf).softmax(-1)
        grad_BRCS = (share_BRCS - p_BRCS) * grad_kl_BT[:, None, part, None] / q_BRTJI.shape[1]
        q_B11MI, k_B11SI = q_BRTJI[:, :, part].flatten(1, 3)[:, None, None], k_BTI[:, None, None, : part.stop]
        gradients = _scores_backward(grad_BRCS, q_B11MI, k_B11SI, weight_BRTJ[:, :, part], hits)
        grad_q_B11MI, grad_k_B11SI, grad_weight[:, :, part] = gradients
        grad_q[:, :, part] = grad_q_B11MI.view_as(q_BRTJI[:, :, part])
        grad_k[:, : part.stop] += grad_k_B11SI[:, 0, 0]
    return [grad_q, grad_k.to(k_BTI.dtype), grad_weight]


@_all_keys_backward.register_fake
def _empty_index_gradients(grad_kl_BT: Tensor, saved: list[Tensor]) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in saved[2:5]]


def _all_keys_gradients(ctx: Any, grad_BTM: Tensor) -> tuple[Tensor | None, ...]:
    return None, None, *_all_keys_backward(grad_BTM[..., 0], list(ctx.saved_tensors)), None


_all_keys.register_autograd(_all_keys_gradients, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


@torch.no_grad()
def recall(q_BNTH: Tensor, k_BKTH: Tensor, index: Index, first_BT: Tensor, choice: Choice) -> Tensor:
    """Return for each token the share of its attention to all keys that falls on the keys that the index chooses, [B, T].

    About ``RECALL_QUERIES`` queries of a row are measured; each stands for those between it and the one before.
    """
    queries = q_BNTH.shape[2]
    step = max(1, queries // RECALL_QUERIES)
    place_C = torch.arange(step - 1, queries, step, device=q_BNTH.device)
    first_B1C1 = first_BT[:, None, place_C, None]
    scores_BRCT = index_scores(Index(index.q_BRTJI[:, :, place_C], index.k_BSI, index.weight_BRTJ[:, :, place_C]))
    chosen_BRCX = best_keys(scores_BRCT, place_C[:, None], first_B1C1, choice)
    is_seen_B1CT = is_seen(place_C[:, None], first_B1C1, queries)
    p_BRCT = attention_shares(q_BNTH[:, :, place_C], k_BKTH, is_seen_B1CT, scores_BRCT.shape[1])
    recall_BC = (p_BRCT.gather(-1, chosen_BRCX.clamp_min(0)) * (chosen_BRCX >= 0)).sum(-1).mean(1)
    return recall_BC[:, (torch.arange(queries, device=q_BNTH.device) // step).clamp_max(len(place_C) - 1)]
