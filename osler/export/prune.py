"""``osler prune`` makes a smaller dense model from a checkpoint: it removes the parts that matter least for the loss on text.

Depth: it removes the layer without which the loss is least, then the next, until ``--layers`` are left. Width: in every
feed-forward layer it keeps the neurons with the largest mean of |activation| times the norm of their column of ``down_proj``,
which is how far they move the residual stream (as Minitron does, arXiv 2407.14679). The new checkpoint is an ordinary one with
another shape: it trains, exports and serves like any other. It has forgotten something, so train it on: the message says how.
Shapes: B batch, T tokens, I neurons of a feed-forward layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from osler.checkpoint import store
from osler.checkpoint.folders import TENSORS_SUFFIX
from osler.data.prepared import held_out_so_far
from osler.data.readers import TextFiles
from osler.data.shards import DATA_MANIFEST
from osler.eval.likelihood import batches, held_out_batches, measure, windows
from osler.export.folder import carried, check_finite, write_run
from osler.inference.load import MADE_BY, LoadedModel, load_start, open_model, training_of
from osler.model.config import ModelConfig
from osler.model.transformer import Block, Transformer
from osler.ops.labels import IGNORED
from osler.runtime import format as fmt
from osler.runtime.errors import UserError
from osler.runtime.files import new_path
from osler.runtime.log import Progress, say

T = TypeVar("T")
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
Batches = Sequence[tuple[Tensor, ...]]  # each has ids, labels and perhaps document ids, as `measure` takes them


def prune(
    checkpoint: str,
    out: str,
    layers: int | None = None,
    intermediate_size: int | None = None,
    data: str | None = None,
    field: str = "text",
    tokens: int = 65_536,
) -> int:
    """Write a run folder with a smaller model: the command ``prune``. Depth goes first, then width.

    The loss is measured on the first ``tokens`` tokens of ``data``: files of text, or the held-out part of shards. Without
    ``data`` it is measured on what the checkpoint's run holds out.
    """
    folder = new_path(out)
    ready = open_model(load_start(checkpoint).path)
    config, model = ready.model.config, ready.model
    check_finite(model.state_dict(), ready.path)
    check_sizes(config, layers, intermediate_size)
    if tokens < 1:
        raise UserError(f"--tokens {tokens}: give the number of tokens to measure the loss on, such as 65536.")
    text = texts(ready, data, field, tokens)
    weights: Mapping[str, Tensor] = model.state_dict()
    say(f"{ready.describe()}; {_loss(model, text):.4f} nats per token of the text that decides.")
    made_by: dict[str, object] = {"command": "prune", "of": str(ready.path.resolve())}
    made_by |= {"intermediate_size": intermediate_size} if intermediate_size is not None else {}
    if layers is not None:
        removed = []
        for layer, loss in least_useful_layers(model, text, config.num_layers - layers):
            removed.append(layer)
            say(f"Without layer {layer} (counted from 0): {loss:.4f}, {config.num_layers - len(removed)} layers left.")
        made_by["removed_layers"] = removed
        weights = without_layers(weights, removed)
        config = replace(config, num_layers=layers, attention_init="independent")  # other starts may need two layers
        model = _model_of(config, weights, model)
    if intermediate_size is not None:
        worths = worth_of_neurons(model, text)
        weights = with_neurons(weights, [worth_I.topk(intermediate_size).indices.sort().values for worth_I in worths])
        config = replace(config, intermediate_size=intermediate_size)
        model = _model_of(config, weights, model)
        say(f"With {intermediate_size:,} neurons in every feed-forward layer: {_loss(model, text):.4f}.")
    state = {**carried(ready.state), MADE_BY: made_by, "trained_seq_len": ready.model.trained_seq_len}
    on_cpu = {name: weight.detach().cpu() for name, weight in weights.items()}
    written = write_run(folder, on_cpu, config, ready.tokenizer, state, ready.files)
    before, after = ready.model.config.num_parameters, config.num_parameters
    size = fmt.size((written / f"model{TENSORS_SUFFIX}").stat().st_size)
    say(f"{folder}: {after:,} of {before:,} parameters ({after / before:.0%}), {size}. To heal it, train it beside the original:")
    say(f"  {healing(ready, folder.as_posix(), data)}")
    return 0


def check_sizes(config: ModelConfig, layers: int | None, intermediate_size: int | None) -> None:
    """Raise UserError unless the sizes are smaller than the model's, and its layers can be removed where layers are asked for."""
    if layers is None and intermediate_size is None:
        raise UserError("What is to become smaller? Give --layers N or --intermediate-size M, or both: what is to stay.")
    for flag, asked, there in (
        ("--layers", layers, config.num_layers),
        ("--intermediate-size", intermediate_size, config.intermediate_size),
    ):
        if asked is not None and not 1 <= asked < there:
            raise UserError(f"{flag} {asked} is not from 1 to {there - 1}: the model has {there}, and this many are to stay.")
    if layers is not None and config.value_embeddings == "alternate":
        raise UserError(
            "The model has value embeddings in every second layer, and would not when layers are removed: give "
            "--intermediate-size alone, or train a model with model.value_embeddings=all or none."
        )


def texts(ready: LoadedModel, data: str | None, field: str, tokens: int) -> Batches:
    """Return batches of about ``tokens`` tokens from text files, or from the held-out part of shards in ``data`` or of the run.

    Raises UserError where there is nothing to read, or where shards have another tokenizer.
    """
    seq_len, shards = ready.model.trained_seq_len, _shards(ready, data)
    if data is not None and shards is None:
        documents = (document for document in TextFiles(data, field, "--data", "--field") if not document.is_empty)
        ids = ([*ready.tokenizer.encode(document.text), ready.tokenizer.eos_id] for document in documents)
        rows = _first(windows(ids, seq_len=seq_len, start_id=ready.tokenizer.eos_id), tokens, lambda row: len(row[0]))
        found: list[tuple[Tensor, ...]] = list(batches(rows))
    else:
        sets = {} if shards is None else held_out_so_far(shards)
        if any(each.tokenizer_fingerprint != ready.tokenizer.fingerprint for each in sets.values()):
            raise UserError(f"{shards} was prepared with another tokenizer than the model's: give --data a file of text.")
        how = {"as_examples": ready.kind in ("sft", "grpo"), "drop_torn": ready.training.get("too_long") == "drop"}
        held_out = (batch for each in sets.values() for batch in held_out_batches(each, seq_len, **how))
        found = list(_first(held_out, tokens, lambda batch: int((batch[1] != IGNORED).sum())))
    if not found:
        raise UserError(
            f"{data or f'The run of {ready.path}'} has no text to measure the loss on: give --data FILE or FOLDER, of text or of "
            f"shards{_shards_of_start(ready)}."
        )
    return found


def _shards_of_start(ready: LoadedModel) -> str:
    """Return the shards of the run that the model's run started from, as words that end a sentence; "" where it has none."""
    start = _start(ready)
    found = None if start is None else replace(ready, path=start.path, training=training_of(start)).shards
    return "" if found is None or not (found / DATA_MANIFEST).is_file() else f", such as --data {found}"


def _shards(ready: LoadedModel, data: str | None) -> Path | None:
    """Return ``data``, or without it the data folder of the model's run, if that is a folder of shards."""
    folder = ready.shards if data is None else Path(data)
    return folder if folder is not None and (folder / DATA_MANIFEST).is_file() else None


def _first(items: Iterable[T], tokens: int, count: Callable[[T], int]) -> Iterator[T]:
    """Yield items until they have ``tokens`` tokens together; the last one may exceed it."""
    for item in items:
        yield item
        tokens -= count(item)
        if tokens <= 0:
            return


def _loss(model: Transformer, text: Batches) -> float:
    return measure(model, text, total_bytes=1).loss


def least_useful_layers(model: Transformer, text: Batches, count: int) -> Iterator[tuple[int, float]]:
    """Yield the ``count`` layers to remove, in this order, each with the loss after its removal. The model stays whole.

    Each is the layer without which the loss is least, once the earlier ones are gone. Numbers are those of the whole model.
    """
    blocks = list(model.layers)
    kept = list(range(len(blocks)))
    tries = sum(len(kept) - number for number in range(count))
    try:
        with Progress(tries, "layers left out", label="prune") as progress:
            tried = 0
            for _ in range(count):
                losses = {}
                for layer in kept:
                    model.layers = nn.ModuleList(blocks[other] for other in kept if other != layer)
                    losses[layer] = _loss(model, text)
                    progress.update(tried := tried + 1)
                least = min(losses, key=losses.__getitem__)
                kept.remove(least)
                yield least, losses[least]
    finally:
        model.layers = nn.ModuleList(blocks)


def without_layers(weights: Mapping[str, Tensor], removed: Collection[int]) -> dict[str, Tensor]:
    """Return a state dict without some layers; the numbers of later layers move up."""
    kept = {}
    for name, weight in weights.items():
        if (match := _LAYER.fullmatch(name)) is None:
            kept[name] = weight
        elif (layer := int(match[1])) not in removed:
            kept[f"layers.{layer - sum(other < layer for other in removed)}.{match[2]}"] = weight
    return kept


@torch.no_grad()
def worth_of_neurons(model: Transformer, text: Batches) -> list[Tensor]:
    """Return for every layer [I]: each neuron's mean of |activation| times the norm of its column of ``down_proj``.

    The mean is over tokens whose prediction is scored.
    """
    blocks = [cast(Block, block) for block in model.layers]
    device = model.embed_tokens.weight.device
    sums = [torch.zeros(model.config.intermediate_size, device=device) for _ in blocks]
    count, is_scored_BT = 0, torch.empty(0)

    def add(sum_I: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sum_I.add_(inputs[0][is_scored_BT].float().abs().sum(0))

        return hook

    hooks = [block.mlp.down_proj.register_forward_pre_hook(add(sum_I)) for block, sum_I in zip(blocks, sums, strict=True)]
    try:
        for ids_BT, labels_BT, *documents in text:
            is_scored_BT = (labels_BT != IGNORED).to(device)
            count += int(is_scored_BT.sum())
            model(ids_BT.to(device), document_BT=documents[0].to(device) if documents else None)
    finally:
        for hook in hooks:
            hook.remove()
    return [sum_I / count * block.mlp.down_proj.weight.float().norm(dim=0) for sum_I, block in zip(sums, blocks, strict=True)]


def with_neurons(weights: Mapping[str, Tensor], kept: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return a state dict with only some neurons of every feed-forward layer; ``kept`` has their indices by layer."""
    smaller = dict(weights)
    for layer, neurons in enumerate(kept):
        for part, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            name = f"layers.{layer}.mlp.{part}.weight"
            smaller[name] = weights[name].index_select(dim, neurons)
    return smaller


def _model_of(config: ModelConfig, weights: Mapping[str, Tensor], like: Transformer) -> Transformer:
    """Return a model with these weights, on the device and in the compute dtype of another."""
    with torch.device(like.embed_tokens.weight.device):
        model = Transformer(config, compute_dtype=like.compute_dtype)
    model.load_state_dict(weights)
    return model.eval()


def healing(ready: LoadedModel, pruned: str, data: str | None = None) -> str:
    """Return the command that trains a pruned model with the original as its teacher, on the original's data where known.

    Rows are as long as in the training of the original, and the tokens a quarter. For a model that GRPO tuned, both come from
    the run that GRPO started from.
    """
    kind = "pretrain" if ready.kind in ("", "pretrain") else "sft"
    own = "data.type=files data.path=TEXT" if kind == "pretrain" else "data.type=turns data.path=QUESTIONS.jsonl"
    learned = own if (shards := _shards(ready, data)) is None else f"data.type=prepared data.path={shards}"
    training, state = ready.training, ready.state
    if ready.kind == "grpo" and (start := _start(ready)) is not None:
        training, state = training_of(start), start.state
    length = {key: training[key] for key in ("seq_len", "batch_tokens") if key in training}
    if "batch_tokens" in length:
        steps = max(1, state.get("total_tokens", training["total_tokens"]) // 4 // length["batch_tokens"])
        length["total_tokens"] = steps * length["batch_tokens"]
    fields = "".join(f" {key}={value}" for key, value in length.items())
    return f"osler {kind} init_from={pruned} teacher.path={ready.path} {learned}{fields} --run {pruned}-healed"


def _start(ready: LoadedModel) -> store.Loaded | None:
    """Return the checkpoint that the run of a model started from, without tensors; None where there is none."""
    with suppress(UserError, OSError):
        return store.load(store.resolve(ready.training.get("init_from") or ""), names=[])
    return None
