"""How much of a GPU's memory a training step takes, estimated from the config alone. Torch-free.

Counted are weights, gradients and moments, what the backward pass needs of the layers, the document mask, and instead of it the
keys that sparse attention chose. The coefficients fit ``benchmarks/results/bench_recompute.json``, which was measured on a CPU,
and were never compared with a GPU. Compiled code keeps less. The loss, which takes up to 0.7 GB more (``bench_loss_head.py``), is
not counted. A row is never split over processes, so all of a row's tokens must fit.
"""

from __future__ import annotations

from typing import Literal

from osler.model.config import ModelConfig, SparseAttentionConfig

Mode = Literal["off", "selective", "full"]
MODES: tuple[Mode, ...] = ("off", "selective", "full")
STATE_BYTES = {"pure-bf16": 8}  # of a parameter: weight, gradient, two moments; otherwise all are fp32
FP32_STATE_BYTES = 16
INDEX_BYTES = 4  # of the number of a key
GIGABYTE = 10**9


def layer_elements(model: ModelConfig, mode: Mode) -> int:
    """Return how many numbers a layer keeps of a token for its backward pass."""
    hidden, wide = model.hidden_size, model.intermediate_size
    queries, keys = model.query_size, model.kv_size
    if mode == "full":
        return hidden
    if mode == "selective":
        return 4 * hidden + 2 * (queries + keys) + 2 * wide
    return 6 * (hidden + queries) + 5 * (keys + wide)


def activation_bytes(model: ModelConfig, rows: int, seq_len: int, mode: Mode, width: int) -> int:
    """Return the bytes that a forward pass of ``rows`` rows keeps in numbers of ``width`` bytes; one block is computed again."""
    kept = model.num_layers * layer_elements(model, mode)
    again = 0 if mode == "off" else layer_elements(model, "off")
    return rows * seq_len * (kept + again) * width


def mask_bytes(model: ModelConfig, rows: int, seq_len: int, mode: Mode, width: int) -> int:
    """Return the bytes of the document mask: one of a byte for the model, and for each layer that keeps it the kernel's copy."""
    copies = model.num_layers if mode == "off" else 1
    return rows * seq_len**2 * (1 + copies * width)


def choice_bytes(model: ModelConfig, rows: int, seq_len: int, mode: Mode) -> int:
    """Return the bytes of the numbers of the chosen keys, which every layer keeps unless all is computed again."""
    assert isinstance(model.attention, SparseAttentionConfig)
    choices = model.num_kv_heads if model.attention.selection == "per_kv_group" else 1
    return (1 if mode == "full" else model.num_layers) * rows * seq_len * choices * model.attention.top_k * INDEX_BYTES


def estimated(model: ModelConfig, *, rows: int, seq_len: int, precision: str, document_mask: bool) -> dict[str, str]:
    """Return the estimate in words, for forward passes of ``rows`` rows in each mode of recomputation."""
    width = 4 if precision == "fp32" else 2
    chooses = isinstance(model.attention, SparseAttentionConfig) and seq_len > model.attention.top_k
    state = model.num_parameters * STATE_BYTES.get(precision, FP32_STATE_BYTES)

    def total(mode: Mode) -> str:
        of_keys = 0
        if chooses:
            of_keys = choice_bytes(model, rows, seq_len, mode)
        elif document_mask:
            of_keys = mask_bytes(model, rows, seq_len, mode, width)
        return f"{(state + activation_bytes(model, rows, seq_len, mode, width) + of_keys) / GIGABYTE:.3g} GB"

    off, selective, full = map(total, MODES)
    masked = " and the chosen keys" if chooses else " and their masks" if document_mask else ""
    return {
        "GPU memory": f"about {off} with recompute=off, {selective} with selective, {full} with full (an estimate)",
        "of it": f"{state / GIGABYTE:.3g} GB for weights and optimizer, the rest for {rows:,} x {seq_len:,} tokens{masked}",
    }
