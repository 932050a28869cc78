"""Statistics of the gradients, the weights, one update, and the activations of a few rows.

Every function here maps tensors to a handful of numbers that stay on the device, so that it costs arithmetic and never a wait.
The activations come from a probe: one more forward pass, eager and without gradients. It goes through a copy of the model that
shares the weights (``Transformer.eager_copy``) and carries hooks, so the model that trains is not touched. Sharded tensors are
put together one at a time, so functions over them are collective. Positions after the last learned token of a row do not count.

Attention entropy: Zhai et al. 2023, arXiv 2303.06296. Effective rank: the participation ratio of the squared singular values.

Shapes: B rows, T tokens, D hidden, F units of a feed-forward layer, N query heads, K key/value heads, G query heads of one
key/value head, H head size, Q chosen queries, S keys, C tokens of a chunk, V vocabulary; M, N rows and columns of a matrix.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from osler.model.attention import Attention
from osler.model.transformer import Block, Transformer
from osler.ops.attention import is_within
from osler.ops.cross_entropy import default_chunk_tokens
from osler.ops.labels import IGNORED
from osler.runtime.sharded import whole

PROBE_TOKENS = 2048  # tokens of the batch that a probe takes, in whole rows where a row fits
ENTROPY_QUERIES = 256  # queries, over all rows, whose attention is measured
DEAD = 0.01  # a unit whose largest activation is at most this share of its layer's rms is dead
RANKED = ("self_attn.o_proj.weight", "mlp.down_proj.weight")  # the matrices that write into the residual stream


class ProbeRows(NamedTuple):
    """The rows of a probe: ids, labels (-100 is not learned), and document ids where attention stays inside a document."""

    ids_BT: Tensor
    labels_BT: Tensor
    document_BT: Tensor | None = None

    def few(self) -> ProbeRows:
        """Return at most ``PROBE_TOKENS`` tokens. Rows with a token to learn come first. The rows must be on the CPU."""
        count = max(1, PROBE_TOKENS // self.ids_BT.shape[1])
        chosen = (self.labels_BT[:, :PROBE_TOKENS] == IGNORED).all(1).sort(stable=True).indices[:count]
        return ProbeRows(*(None if part is None else part[chosen, :PROBE_TOKENS] for part in self))  # type: ignore[arg-type]

    def on(self, device: torch.device) -> ProbeRows:
        """Return the same rows on a device."""
        return ProbeRows(*(None if part is None else part.to(device, non_blocking=True) for part in self))  # type: ignore[arg-type]

    @property
    def learns(self) -> bool:
        """Whether any token is learned. The rows must be on the CPU."""
        return bool((self.labels_BT != IGNORED).any())

    @property
    def counts_BT(self) -> Tensor:
        """True up to the last learned token of a row, False after it."""
        return (self.labels_BT != IGNORED).flip(1).cumsum(1).flip(1) > 0


# -- gradients, weights, an update -------------------------------------------------------------------------------------


def part_of(name: str) -> str:
    """Return the part of the model that a parameter is in: its layer's number, or another name.

    The others are ``embed``, ``values``, ``norm``, ``head`` and ``copy_head``. All value embeddings are one part, because they
    would outweigh the matrices of their layers.
    """
    first, *rest = name.split(".")
    if "value_embed" in rest:
        return "values"
    return rest[0] if first == "layers" else {"embed_tokens": "embed", "embed_proj": "embed", "lm_head": "head"}.get(first, first)


def norms(squares: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the norm of each part of the model, from the sums of squares of its tensors."""
    parts: defaultdict[str, list[Tensor]] = defaultdict(list)
    for name, square in squares.items():
        parts[part_of(name)].append(square)
    return {part: torch.stack(each).sum().sqrt() for part, each in parts.items()}


@torch.no_grad()
def gradient_stats(gradients: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return norms by part, and over the whole model the mean, spread, maximum, and shares of zeros and non-finite values."""
    rows: dict[str, Tensor] = {}
    count = 0
    for name, shard in gradients:
        gradient = whole(shard).float()
        zeros, nonfinite = (gradient == 0).sum().float(), (~gradient.isfinite()).sum().float()
        rows[name] = torch.stack([gradient.square().sum(), gradient.sum(), gradient.abs().amax(), zeros, nonfinite])
        count += gradient.numel()
    square, total, peak, zeros, nonfinite = torch.stack(list(rows.values())).unbind(1)
    mean = total.sum() / count
    return {
        **{f"grad/norm/{part}": norm for part, norm in norms({name: row[0] for name, row in rows.items()}).items()},
        "grad/mean": mean,
        "grad/std": (square.sum() / count - mean.square()).clamp_min(0).sqrt(),
        "grad/max_abs": peak.amax(),
        "grad/zero_frac": zeros.sum() / count,
        "grad/nonfinite_frac": nonfinite.sum() / count,
    }


@torch.no_grad()
def weight_stats(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return norms by part of the model, and the effective rank of ``RANKED`` matrices in the first, middle and last layer."""
    parts = norms({name: weight.float().square().sum() for name, weight in weights.items()})
    layers = [int(part) for part in parts if part.isdigit()]
    chosen = sorted({layers[0], layers[len(layers) // 2], layers[-1]})
    ranked = [(f"{layer}.{name.split('.')[1]}", weights[f"layers.{layer}.{name}"]) for layer in chosen for name in RANKED]
    return {
        **{f"model/weight_norm/{part}": norm for part, norm in parts.items()},
        **{f"model/effective_rank/{name}": effective_rank(matrix) for name, matrix in ranked},
    }


def effective_rank(matrix_MN: Tensor) -> Tensor:
    """Return (Σ s²)² / Σ s⁴ over the singular values s: how many directions share the energy; 0 for a matrix of zeros.

    It is computed from the smaller Gram matrix, whose eigenvalues are s², so nothing is decomposed.
    """
    x_MN = matrix_MN.float()
    x_MN = x_MN / torch.linalg.vector_norm(x_MN).clamp_min(1e-30)
    gram = x_MN.mT @ x_MN if x_MN.shape[0] > x_MN.shape[1] else x_MN @ x_MN.mT
    return gram.trace().square() / gram.square().sum().clamp_min(1e-30)


@torch.no_grad()
def update_stats(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return how far an update moved the weights, as a share of their norm ``before``; 0 for a skipped step."""
    moved = {name: whole(after[name].detach() - old).float().square().sum() for name, old in before.items()}
    size = {name: whole(old).float().square().sum() for name, old in before.items()}
    all_moved, all_size = (torch.stack(list(squares.values())).sum() for squares in (moved, size))
    sizes = norms(size)
    return {
        "update/ratio": (all_moved / all_size).sqrt(),
        **{f"update/part_ratio/{part}": norm / sizes[part] for part, norm in norms(moved).items()},
    }


# -- inside the model --------------------------------------------------------------------------------------------------


@torch.no_grad()
def activation_stats(model: Transformer, weights: Mapping[str, Tensor], rows: ProbeRows) -> dict[str, Tensor]:
    """Return statistics of each layer and of the predictions on a few rows, for the model with these whole weights.

    On a CPU the probe computes in fp32, because eager bf16 is slow there.
    """
    dtype = None if rows.ids_BT.is_cuda else torch.float32
    copy = model.eager_copy(weights, dtype)
    seen: dict[str, Tensor] = {}
    for layer, block in enumerate(copy.layers):
        assert isinstance(block, Block)
        _add_hooks(block, layer, rows, seen)
    hidden_BTD = copy(rows.ids_BT, document_BT=rows.document_BT)
    return {**seen, **prediction_stats(copy, hidden_BTD, rows)}


def _add_hooks(block: Block, layer: int, rows: ProbeRows, seen: dict[str, Tensor]) -> None:
    """Add hooks to a block; they put their measurements into ``seen``. The entropy is of attention that chooses no keys."""
    places_BT = rows.counts_BT
    mask = None if rows.document_BT is None else Attention.mask_of(rows.document_BT)

    def attention_begins(module: Any, args: Any) -> None:
        q_BTNH, k_BSKH, _ = module.project(*args)
        seen[f"model/attention_entropy/{layer}"] = attention_entropy(q_BTNH, k_BSKH, places_BT, mask=mask, window=module.window)

    def units(module: Any, args: Any) -> None:
        seen[f"model/dead_units_frac/{layer}"] = dead_share(args[0], places_BT)

    def block_ends(module: Any, args: Any, out: tuple[Tensor, Tensor | None]) -> None:
        x_BTD, rms = at_places(out[0], places_BT)
        seen[f"model/activation_rms/{layer}"] = rms
        seen[f"model/activation_outlier/{layer}"] = x_BTD.abs().amax() / rms

    block.self_attn.register_forward_pre_hook(attention_begins)
    block.mlp.down_proj.register_forward_pre_hook(units)
    block.register_forward_hook(block_ends)


def at_places(x_BTX: Tensor, places_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values in fp32, with zeros outside ``places_BT``, and the rms of the values inside."""
    x_BTX = x_BTX.float().masked_fill(~places_BT[..., None], 0.0)
    return x_BTX, (x_BTX.square().sum() / (places_BT.sum() * x_BTX.shape[-1])).sqrt()


def attention_entropy(
    q_BTNH: Tensor, k_BSKH: Tensor, places_BT: Tensor, *, mask: Tensor | None = None, window: int | None = None
) -> Tensor:
    """Return the mean entropy, in nats, of the attention of a few queries of every row and head.

    The queries are spread evenly over a row: at most ``ENTROPY_QUERIES`` of all rows together, at least the last of each. Queries
    outside ``places_BT`` do not count.
    """
    batch, length, _, size = q_BTNH.shape
    count = max(1, min(length, ENTROPY_QUERIES // batch))
    place_Q = (torch.arange(1, count + 1, device=q_BTNH.device) * length) // count - 1
    q_BQKGH = q_BTNH[:, place_Q].float().unflatten(2, (k_BSKH.shape[2], -1))
    scores_BKGQS = torch.einsum("bqkgh,bskh->bkgqs", q_BQKGH, k_BSKH.float()) * size**-0.5
    is_causal = torch.arange(length, device=q_BTNH.device) <= place_Q[:, None]
    is_visible = is_causal if mask is None else mask[:, :, None, place_Q]
    if window is not None:
        is_visible = is_visible & is_within(window, length, length, q_BTNH.device)[place_Q]
    share_BKGQS = scores_BKGQS.masked_fill(~is_visible, float("-inf")).softmax(-1)
    entropy_BQ = torch.special.entr(share_BKGQS).sum(-1).mean((1, 2))
    counts_BQ = places_BT[:, place_Q]
    return entropy_BQ.masked_fill(~counts_BQ, 0.0).sum() / counts_BQ.sum()


def dead_share(units_BTF: Tensor, places_BT: Tensor) -> Tensor:
    """Return the share of units that no token moves: their largest activation is at most ``DEAD`` times the layer's rms."""
    units_BTF, rms = at_places(units_BTF, places_BT)
    return (units_BTF.abs().amax((0, 1)) <= DEAD * rms).float().mean()


def prediction_stats(model: Transformer, hidden_BTD: Tensor, rows: ProbeRows) -> dict[str, Tensor]:
    """Return accuracy, entropy and confidence of the model at the learned tokens; logits are computed a chunk at a time."""
    chunk = default_chunk_tokens(model.config.padded_vocab_size)
    flat = (hidden_BTD.flatten(0, 1), rows.labels_BT.flatten(), rows.counts_BT.flatten())
    copies = model.copies(hidden_BTD, rows.ids_BT, rows.document_BT)
    sums, peaks, start = [], [], 0
    for hidden_CD, label_C, place_C in zip(*(part.split(chunk) for part in flat), strict=True):
        logits_CV = model.logits(hidden_CD, None if copies is None else copies.of(slice(start, start + chunk)))
        start += chunk
        peaks.append(logits_CV.masked_fill(~place_C[:, None], float("-inf")).amax())
        log_CV = logits_CV.log_softmax(-1)
        top_C, word_C = log_CV.max(-1)
        label_log_C = log_CV.gather(1, label_C.clamp_min(0)[:, None]).squeeze(1)
        entropy_C = torch.special.entr(log_CV.exp()).sum(-1)
        counts_C = (label_C != IGNORED).float()
        measured = torch.stack([(word_C == label_C).float(), entropy_C, label_log_C.exp(), top_C.exp(), torch.ones_like(top_C)])
        sums.append((measured * counts_C).sum(1))
    right, entropy, label, top, count = torch.stack(sums).sum(0).unbind()
    return {
        "train/token_accuracy": right / count,
        "train/entropy": entropy / count,
        "train/label_probability": label / count,
        "train/top_probability": top / count,
        "model/logit_max": torch.stack(peaks).amax(),
    }
