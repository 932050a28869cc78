"""``osler quantize`` writes a checkpoint with weights in int8, int4 or bf16, which every reader of checkpoints takes.

``osler/model/quantization.py`` has the formats. Loading the new checkpoint turns its weights back into full precision, so answers
are those of the rounded weights on any machine, and speed and memory are those of the original.
"""

from __future__ import annotations

import torch

from osler.checkpoint.folders import TENSORS_SUFFIX
from osler.export.folder import carried, check_finite, write_run
from osler.inference.load import MADE_BY, QUANTIZED, described_model, load_start, tokenizer_of
from osler.model.quantization import quantize_weights
from osler.runtime import format as fmt
from osler.runtime.errors import UserError
from osler.runtime.files import new_path
from osler.runtime.log import say

BITS = {"int8": 8, "int4": 4}


def quantize(checkpoint: str, to: str, out: str, group_size: int = 32) -> int:
    """Write a run folder with a checkpoint's model in smaller weights: the command ``quantize``."""
    folder = new_path(out)
    loaded = load_start(checkpoint, ["model"])
    weights, state = loaded.tensors["model"], carried(loaded.state)
    check_finite(weights, loaded.path)
    state[MADE_BY] = {"command": "quantize", "of": str(loaded.path.resolve()), "to": to}
    if to in BITS:
        largest = max(weights, key=lambda name: weights[name].abs().max().item())
        if weights[largest].abs().max() > torch.finfo(torch.float16).max:
            raise UserError(f"{largest} of {loaded.path} has numbers too large for the scales of {to}, fp16: use --to bf16.")
        state[QUANTIZED] = {"bits": BITS[to], "group_size": group_size}
        weights = quantize_weights(weights, BITS[to], group_size)
    else:
        weights = {name: weight.to(torch.bfloat16) for name, weight in weights.items()}
    written = write_run(folder, weights, described_model(loaded), tokenizer_of(loaded), state, loaded.files)
    before, after = ((path / f"model{TENSORS_SUFFIX}").stat().st_size for path in (loaded.path, written))
    say(f"{folder}: {loaded.path} in {to}, {fmt.size(after)} instead of {fmt.size(before)} ({after / before:.3f} ×).")
    return 0
