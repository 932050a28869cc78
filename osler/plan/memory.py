"""The peak memory of one process of a run, part by part, from the config alone. Torch-free.

A part is what lies in memory at the peak. That is where a step turns from forward to backward, with all activations, or at its
end, with all gradients. On a GPU the memory is what torch's allocator holds and the driver takes. On a CPU it is the resident
memory of the process with its libraries, as ``perf/memory_peak_bytes`` counts it.

What a layer keeps of a token follows from its operators (``layer_elements``) and was compared with ``bench_recompute.py`` and
``plan_vs_actual.py`` on a CPU. Nothing was compared with a GPU yet. A row is never split over processes, so all of a row's tokens
must fit.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace

from osler.model.config import ModelConfig, SparseAttentionConfig
from osler.ops.pieces import causal_pieces
from osler.plan.estimate import Estimate, exact, total
from osler.plan.speed import Arithmetic, Mode

MODES: tuple[Mode, ...] = ("off", "selective", "full")
MOST_ROWS = 4096
INDEX_BYTES = 4  # the size of a chosen key's number
# The most tokens and bytes of a chunk of logits, as ops/cross_entropy.py has them: uncompiled, and compiled on a CPU for a
# vocabulary of at most ``TILE_WORDS`` and for a larger one; and the logits that an evaluation on a CPU computes at a time.
UNTILED, WHOLE, TILED = (2048, 1 << 28), (1024, 400 << 20), (4096, 400 << 20)
TILE_WORDS, CACHED_LOGITS = 12_800, 1 << 19
COMPILED_AGAIN = {"selective": 0.5, "full": 2.0}  # layers that are whole at a time (by hand, two layers x 256 on a CPU)
TABLES_OF_TWO = {"none": 0, "alternate": 1, "all": 2}  # value embeddings in two layers that follow each other
COPY_SCORE, COMPILED_COPY_SCORE = 8.0, 5.5  # bytes of a copy head for each token and place (by hand, rows of 2,048)
EVALUATED_TOKENS = 16_384  # tokens of a forward pass in an evaluation (eval/likelihood.py)

CUDA = Estimate(0.5e9, 0.8e9, 1.6e9, "assumed: CUDA's context, libraries and code; not measured by Osler")
CPU_EAGER = Estimate(0.28e9, 0.33e9, 0.40e9, "measured: Python, torch and the run's other libraries")
CPU_COMPILED = Estimate(0.42e9, 0.46e9, 0.55e9, "measured: Python, torch with its compiler, and the run's other libraries")
CPU_LAYER = Estimate(0.005e9, 0.01e9, 0.02e9, CPU_COMPILED.source)
GPU_GAPS = Estimate(0.02, 0.08, 0.20, "assumed: 2 to 20 % of what a step takes, as gaps between tensors and workspace")
CPU_GAPS = Estimate(0.10, 0.32, 0.55, "measured: 10 to 55 % of what a step allocates, as gaps that the C library keeps")
LOGIT_COPIES = Estimate(4, 5, 6, "computed: 4 to 6 tensors of a chunk's fp32 logits, of this chunk and the last")
LOOSE = {
    "activations": Estimate(0.9, 1.0, 1.15, "computed from the operators of a layer, give or take 15 %"),
    "loss head": Estimate(0.8, 1.0, 1.2, "computed: a chunk of logits, the head and its gradient, give or take 20 %"),
    "copy head": Estimate(0.9, 1.0, 1.2, "computed: 5 to 10 bytes for each token and place of its row"),
}


@dataclass(frozen=True)
class Pass:
    """A forward and backward pass of ``rows`` rows on one process, and what lies in memory beside it."""

    model: ModelConfig
    rows: int
    seq_len: int
    arithmetic: Arithmetic
    on_cpu: bool = False
    optimizer: str = "adamw"
    accumulates: bool = False  # whether gradients of earlier passes lie in memory
    document_mask: bool = False
    shards: int = 1  # processes that share weights, gradients and optimizer (FSDP)
    copies: bool = False  # whether a copy for a checkpoint lies in the process's memory
    evaluates: bool = False  # whether the process also evaluates
    teacher: ModelConfig | None = None  # a teacher that lies in memory, too

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_len

    @property
    def compiled(self) -> bool:
        return self.arithmetic.compiled

    @property
    def width(self) -> int:
        return self.arithmetic.width


def parameters_of(model: ModelConfig) -> tuple[int, int, int]:
    """Return how many numbers the matrices of the layers, the input and value embeddings and the head have, with padding rows.

    A head that is the embedding counts as 0.
    """
    rank = model.embed_rank
    padded = model.padded_vocab_size
    width, values = rank or model.hidden_size, model.value_embedding_size
    embedding = padded * (width + values) + (rank or 0) * model.hidden_size
    head = 0 if model.tie_embeddings else padded * model.hidden_size
    plain = model.num_parameters - (model.vocab_size * (width + values) + (rank or 0) * model.hidden_size)
    return plain - (0 if model.tie_embeddings else model.vocab_size * model.hidden_size), embedding, head


def state_bytes(model: ModelConfig, optimizer: str, precision: str) -> tuple[int, int, int]:
    """Return the bytes of weights, of gradients and of the optimizer's moments of a whole model."""
    layers, embedding, head = parameters_of(model)
    parameters, width = layers + embedding + head, 2 if precision == "pure-bf16" else 4
    moments = layers + 2 * (embedding + head) if optimizer == "muon" else 2 * parameters  # a matrix has one in Muon
    return width * parameters, width * parameters, width * moments


def keys_of(seq_len: int, on_cpu: bool, window: int | None) -> float:
    """Return how many attention weights a head keeps for a token, on average, on a CPU; a GPU's kernel keeps none."""
    if not on_cpu:
        return 0.0
    if window is not None and seq_len > window:
        return 2 * window
    return sum((piece.stop - piece.start) * piece.stop for piece in causal_pieces(seq_len)) / seq_len


def layer_elements(model: ModelConfig, mode: Mode, *, compiled: bool, weights_of_head: float = 0.0) -> float:
    """Return how many numbers a layer keeps for the backward pass of one token.

    ``weights_of_head`` are the attention weights of a head. Compiled code keeps less, because it recomputes what is cheap.
    """
    hidden, wide = model.hidden_size, model.intermediate_size
    queries, keys = model.query_size, model.kv_size
    if mode == "full":
        return hidden
    if mode == "selective":  # the results of matrix products, and of a fused attention
        return 3 * hidden + 2 * (queries + keys) + 2 * wide
    attention = model.num_heads * weights_of_head
    if compiled:
        return 3 * hidden + 4 * queries + 3 * keys + 3 * wide + attention
    return 6 * hidden + 4 * queries + 3 * keys + 4 * wide + attention


def activation_bytes(one: Pass, mode: Mode) -> tuple[float, float]:
    """Return the bytes that the layers keep for the backward pass, and those of what is recomputed at a time.

    That is one layer; compiled code begins the next one early with `full`, and needs only a part of one with `selective`.
    """
    heads = 0.0 if chooses(one) else keys_of(one.seq_len, one.on_cpu, one.model.window)
    whole = layer_elements(one.model, "off", compiled=one.compiled, weights_of_head=heads)
    kept = one.model.num_layers * layer_elements(one.model, mode, compiled=one.compiled, weights_of_head=heads)
    again = 0.0 if mode == "off" else COMPILED_AGAIN[mode] if one.compiled else 1.0
    return one.tokens * kept * one.width, one.tokens * again * whole * one.width


def chooses(one: Pass) -> bool:
    """Return whether sparse attention chooses keys in rows of this length."""
    return isinstance(one.model.attention, SparseAttentionConfig) and one.seq_len > one.model.attention.top_k


def mask_bytes(one: Pass, mode: Mode) -> int:
    """Return the bytes of the document mask: one byte for each pair of tokens, and the kernel's copy in each layer that keeps it.

    Instead of a mask, sparse attention keeps the numbers of the chosen keys, in every layer unless ``mode`` is full.
    """
    layers = one.model.num_layers
    if chooses(one):
        assert isinstance(one.model.attention, SparseAttentionConfig)
        choices = one.model.num_kv_heads if one.model.attention.selection == "per_kv_group" else 1
        return (1 if mode == "full" else layers) * one.tokens * choices * one.model.attention.top_k * INDEX_BYTES
    if not one.document_mask:
        return 0
    copies = layers if mode == "off" else 1
    return one.rows * one.seq_len**2 * (1 + (0 if one.on_cpu else copies * one.width))


def copied_bytes(one: Pass) -> float:
    """Return the bytes of the copies that a pass makes of the layers' matrices.

    The copies have the dtype of the activations; in fp32 only matrices with the same input are copied, to join them.
    """
    model = one.model
    joined = model.hidden_size * (model.query_size + 2 * model.kv_size + 2 * model.intermediate_size) * model.num_layers
    return float(one.width * (joined if one.width == 4 else parameters_of(model)[0]))


def head_bytes(one: Pass) -> tuple[float, float]:
    """Return the bytes of a chunk of logits, and those of the head's gradient and of its copy in the dtype of the features."""
    rows = one.model.padded_vocab_size
    rank = (one.model.embed_rank or one.model.hidden_size) if one.model.tie_embeddings else one.model.hidden_size
    most_tokens, most_bytes = (TILED if rows > TILE_WORDS else WHOLE) if one.on_cpu and one.compiled else UNTILED
    chunk = min(one.tokens, max(64, min(most_tokens, most_bytes // (one.width * rows) // 64 * 64)))
    wide = 0.0 if one.on_cpu else 8.0  # a CPU widens few logits at a time
    if (most_tokens, most_bytes) == TILED:
        wide = one.width / 2  # exponentials stand beside the logits until tile by tile they have taken their place
    return chunk * rows * (one.width + wide), rows * rank * (8 + one.width % 4) + 2 * one.tokens * rank * one.width


def copy_bytes(one: Pass) -> float:
    """Return the bytes of a copy head's scores of all places for all tokens, and of what is computed from them."""
    if one.model.copy_head_dim is None:
        return 0.0
    return one.tokens * one.seq_len * (COMPILED_COPY_SCORE if one.compiled else COPY_SCORE)


def evaluation_bytes(one: Pass) -> float:
    """Return the bytes of a forward pass of an evaluation, which is not compiled, and on a CPU in fp32."""
    model, width = one.model, 4 if one.on_cpu else one.width
    seq_len = model.usable_seq_len(one.seq_len)
    tokens = max(EVALUATED_TOKENS, seq_len)
    feed_forward = 3 * model.hidden_size + 4 * model.intermediate_size
    scores = 3 * model.num_heads * keys_of(seq_len, one.on_cpu, model.window)
    attention = 3 * model.hidden_size + 3 * (model.query_size + 2 * model.kv_size) + scores
    logits = LOGIT_COPIES.value * logit_bytes(model, tokens, cached=one.on_cpu)
    copying = 0.0 if model.copy_head_dim is None else COPY_SCORE * tokens * seq_len
    return max(tokens * max(feed_forward, attention) * width, logits + copying)


def logit_bytes(model: ModelConfig, tokens: int, *, cached: bool = False) -> float:
    """Return the bytes of a chunk of fp32 logits of log-probabilities; ``cached`` are the small chunks without a gradient."""
    words = model.padded_vocab_size
    chunk = CACHED_LOGITS // words if cached else min(UNTILED[0], UNTILED[1] // (4 * words) // 64 * 64)
    return 4.0 * words * min(tokens, max(64, chunk))


def memory_of(one: Pass, mode: Mode) -> dict[str, Estimate]:
    """Return the parts of the peak memory of one process in bytes."""
    weights, gradients, moments = (
        number / one.shards for number in state_bytes(one.model, one.optimizer, one.arithmetic.precision)
    )
    layers, padded = one.model.num_layers, one.model.padded_vocab_size
    blocks = 2 * parameters_of(one.model)[0] / layers + TABLES_OF_TWO[one.model.value_embeddings] * padded * one.model.kv_size
    gathered = blocks * (one.width + 4) if one.shards > 1 else 0.0  # a block computes while the next one comes
    kept, recomputed = activation_bytes(one, mode)
    copies, (logits, of_head) = copied_bytes(one), head_bytes(one)
    turning = {
        "gradients": gradients if one.accumulates else 0.0,
        "weight copies": copies if mode == "off" else copies / layers,
        "activations": kept + max(0.0, recomputed - logits),  # the logits are gone when a layer is recomputed
        "mask": float(mask_bytes(one, mode)),
        "loss head": logits + of_head,
        "copy head": copy_bytes(one),
    }
    ending = {"gradients": gradients, "weight copies": copies / layers, "activations": kept / layers + recomputed}
    step = max(turning, ending, key=lambda parts: sum(parts.values()))
    # On a CPU the blocks of an evaluation are larger than what steps have freed, so they come on top.
    there = 0.0 if one.on_cpu else sum(step.values())
    beyond = max(0.0, evaluation_bytes(one) - there) if one.evaluates else 0.0
    churned = sum(turning.values()) + sum(activation_bytes(one, "off")) - kept - max(0.0, recomputed - logits)
    copied = weights + moments if one.copies else 0.0
    parts = {
        "process": process_bytes(one),
        "weights": exact(weights + gathered),
        "optimizer": exact(moments),
        **{name: LOOSE[name].times(number) if name in LOOSE else exact(number) for name, number in step.items()},
        "evaluation": Estimate(0.75 * beyond, 0.95 * beyond, 1.6 * beyond, "computed: what an evaluation takes beyond a step"),
        "saving": exact(copied, "computed: the copy that a checkpoint is written from"),
        "teacher": exact(0.0 if one.teacher is None else one.teacher.num_parameters * one.width),
        "gaps": CPU_GAPS.times(churned + beyond) if one.on_cpu else GPU_GAPS.times(sum(step.values()) + beyond),
    }
    return {name: part for name, part in parts.items() if part.high > 0}


def process_bytes(one: Pass) -> Estimate:
    """Return what a process takes before it has a model; a compiler keeps more the more layers it compiles."""
    if not one.on_cpu:
        return CUDA
    return total([CPU_COMPILED, CPU_LAYER.times(one.model.num_layers)]) if one.compiled else CPU_EAGER


def most_rows(
    one: Pass, mode: Mode, limit: float, *, beside: Mapping[str, Estimate] | None = None, measured: Estimate | None = None
) -> int:
    """Return the most rows of a pass that surely fit into ``limit`` bytes with ``beside``, at most ``MOST_ROWS``; 0: not one.

    Where a probe has ``measured`` the memory of ``one``, only what another pass takes more or less is computed.
    """

    def computed(rows: int, mode: Mode) -> float:
        return total([*memory_of(replace(one, rows=rows), mode).values(), *(beside or {}).values()]).high

    known = computed(one.rows, one.arithmetic.recompute)

    def fits(rows: int) -> bool:
        need = computed(rows, mode)
        if measured is not None:  # what is more grows as the measured pass does, but never less than computed
            beyond = need - known
            need = measured.high + max(beyond, beyond * measured.high / known)
        return need <= limit

    return bisect_left(range(1, MOST_ROWS + 1), True, key=lambda rows: not fits(rows))


def measured_memory(parts: Mapping[str, Estimate], measured: Estimate | None) -> dict[str, Estimate]:
    """Return the parts of the memory, scaled to the sum that a probe measured, if there is one."""
    if measured is None:
        return dict(parts)
    factor = measured.value / total(parts.values()).value
    low, high = measured.low / measured.value, measured.high / measured.value
    return {
        name: Estimate(part.value * factor * low, part.value * factor, part.value * factor * high, measured.source)
        for name, part in parts.items()
    }
