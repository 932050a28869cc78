"""Writes a checkpoint in a form that other programs read: the command ``export``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from osler.checkpoint.store import write_tensors
from osler.config.schema import encode
from osler.export import gguf, huggingface, onnx
from osler.export.folder import check_finite
from osler.export.huggingface import Export, standard_form
from osler.inference.load import MADE_BY, LoadedModel, load_model
from osler.runtime.errors import UserError
from osler.runtime.files import appearing
from osler.runtime.log import say


class Form(NamedTuple):
    """A form to write: the function, which returns the name of what it wrote, and the types of weights, the usual one first."""

    write: Callable[[Export, Path], str]
    dtypes: tuple[str, ...]
    windows: bool = False  # whether it holds attention with a window


def write_safetensors(export: Export, path: Path) -> str:
    """Write one file: the weights as Osler names them, and in its metadata the model's config and its tokenizer.json."""
    model, tokenizer = export.loaded.model, export.loaded.tokenizer
    described = {"model": json.dumps(encode(model.config)), "tokenizer": tokenizer.to_bytes().decode()}
    dtype = huggingface.DTYPES[export.dtype]
    write_tensors(path, {name: weight.to(dtype) for name, weight in model.state_dict().items()}, metadata=described)
    return "one safetensors file"


FORMS = {
    "hf": Form(huggingface.write, ("fp32", "bf16"), windows=True),
    "gguf": Form(gguf.write, gguf.DTYPES),
    "onnx": Form(onnx.write, onnx.DTYPES),
    "safetensors": Form(write_safetensors, ("fp32", "bf16")),
}


def run(checkpoint: str, out: str, to: str = "hf", dtype: str | None = None, max_tokens: int | None = None) -> int:
    """Write a checkpoint's model and tokenizer at ``out``, which must be new.

    ``max_tokens`` shortens the context, which a model with sparse attention or a window may need (``standard_form``). Raises
    UserError for what no form holds.
    """
    form = FORMS[to]
    if dtype not in (None, *form.dtypes):
        raise UserError(f"--dtype {dtype} is none of --to {to}, which has {', '.join(form.dtypes)}.")
    with appearing(out) as place:
        loaded = load_model(checkpoint)
        dtype = dtype or usual_dtype(loaded, form)
        config = loaded.model.config
        check_finite(loaded.model.state_dict(), loaded.path)
        if max_tokens is not None and not 2 <= max_tokens <= config.max_seq_len:
            longest = f"{config.max_seq_len}, the context of {loaded.path} (max_seq_len)"
            raise UserError(f"--max-tokens {max_tokens} is not from 2 to {longest}.")
        if to != "safetensors":
            config = standard_form(config, max_tokens or config.max_seq_len, windows=form.windows)
        elif max_tokens is not None:
            raise UserError("--to safetensors writes a model as it is, so there is no --max-tokens for it.")
        what = form.write(Export(loaded, config, dtype), place)
    written_out = f", whose {loaded.quantized} weights are written out as they are computed with" if loaded.quantized else ""
    say(f"{out}: {config.num_parameters:,} parameters of {loaded.path}{written_out}, as {what} in {dtype}")
    return 0


def usual_dtype(loaded: LoadedModel, form: Form) -> str:
    """Return the type of weights where none is asked for: the first of a form, but bf16 for fp32 if ``quantize`` made bf16."""
    is_bf16 = loaded.state.get(MADE_BY, {}).get("to") == "bf16"
    return "bf16" if is_bf16 and form.dtypes[0] == "fp32" and "bf16" in form.dtypes else form.dtypes[0]
