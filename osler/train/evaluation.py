"""Evaluation of supervised runs on text that they do not learn: on each validation set, and on all sets together.

The config names the sets in `validation`; without it they are the held-out part of each source. An evaluation reads the first
shards of each set, up to `TrainConfig.evaluated_tokens`, so its result depends on the checkpoint alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from osler.checkpoint.folders import newest_checkpoint
from osler.data.prepared import Prepared, open_prepared
from osler.data.shard_set import NotPreparedYet, ShardSet
from osler.data.stream import untended, wait_together
from osler.eval.likelihood import TextScore, held_out_batches, measure
from osler.inference.load import load_model
from osler.model.transformer import Transformer
from osler.runs.process import agree_on_machine
from osler.runs.resume import find_step
from osler.runtime import format as fmt
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder, read_json, write_json
from osler.runtime.world import World
from osler.train.config import TrainConfig
from osler.train.shards import shards_of

logger = logging.getLogger(__name__)


def held_out_scores(
    config: TrainConfig,
    prepared: Prepared,
    plain_model: Callable[[], Transformer],
    world: World,
    tend: Callable[[float], None] = untended,
) -> dict[str, TextScore]:
    """Measure a model on each validation set that has a document. The ranks share the batches of a set."""
    sets = wait_together(lambda: heads(config, prepared.validation_sets), world, "The evaluation", tend)
    if not sets:
        return {}
    model, is_sft = plain_model(), config.kind == "sft"
    seq_len = config.seq_len if is_sft else model.config.usable_seq_len(config.seq_len)
    return {
        name: measure(
            model, held_out_batches(shards, seq_len, as_examples=is_sft, drop_torn=config.drops_torn), shards.num_bytes, world
        )
        for name, shards in sets.items()
    }


def heads(config: TrainConfig, sets: Mapping[str, ShardSet]) -> dict[str, ShardSet]:
    """Return the first shards of each set that has a document, also while later ones are being prepared.

    A set without a document is left out, because a rank that opens finished data does not see it, and all ranks must agree.
    """
    sets = {name: shards for name, shards in sets.items() if shards.head(1).num_documents}
    return {name: shards.head_within(config.evaluated_tokens(len(sets))) for name, shards in sets.items()}


def values_of(config: TrainConfig, score: TextScore) -> dict[str, float]:
    """Return the values of a score to report: no bits per byte in fine-tuning, where answers' bytes are not counted."""
    values = {"loss": score.loss, "bits_per_byte": score.bits_per_byte, "token_accuracy": score.token_accuracy}
    return {name: value for name, value in values.items() if config.kind == "pretrain" or name != "bits_per_byte"}


def as_metrics(config: TrainConfig, prepared: Prepared, scores: Mapping[str, TextScore]) -> dict[str, float]:
    """Return the metrics of an evaluation: `eval/loss` and the like for all sets together, `eval/SET/loss` for each set.

    A single set without a name has no metrics of its own, because they would be those of all sets.
    """
    if not scores:
        return {}
    places = {"eval": TextScore.of_all(scores.values())}
    if len(scores) > 1 or prepared.named_validation:
        places |= {f"eval/{name}": score for name, score in scores.items()}
    return {f"{place}/{name}": value for place, score in places.items() for name, value in values_of(config, score).items()}


def evaluate_checkpoint(config: TrainConfig, folder: RunFolder, step: int | None, world: World) -> str:
    """Measure a checkpoint of a run, write the scores into the run folder, and return a table of them.

    Without ``step`` it is the newest good checkpoint. Each rank loads the whole model. Nothing else in the folder changes, so the
    run may be training at the same time.
    """
    path = world.broadcast_from_first(
        lambda: newest_checkpoint(folder.checkpoints) if step is None else find_step(folder.checkpoints, step).path
    )
    if path is None:
        raise UserError(f"{folder.root} has no checkpoint to evaluate.")
    machine = agree_on_machine(world, path, precision=config.precision, compile_mode="never", steps=1)
    ready = load_model(path, device=machine.device, compute_dtype=machine.eager_dtype)
    prepared = open_prepared(shards_of(config, folder), ready.tokenizer, growing=config.streams)
    try:
        heads(config, prepared.validation_sets)
    except NotPreparedYet:
        needs = f"The validation data in {prepared.folder} are not prepared yet; `osler {config.kind}` does that."
        raise UserError(needs) from None
    scores = held_out_scores(config, prepared, lambda: ready.model, world)
    if not scores:
        raise UserError(f"{folder.root} holds nothing out: there is nothing to evaluate.")

    def row(score: TextScore) -> dict[str, float]:
        return {**values_of(config, score), "tokens": score.tokens}

    sets, together = {name: row(score) for name, score in scores.items()}, row(TextScore.of_all(scores.values()))
    if world.is_first:
        known = read_json(folder.evaluations) if folder.evaluations.exists() else {}
        write_json(folder.evaluations, {**known, path.name: {"together": together, "sets": sets}})
        logger.info(f"Saved to {folder.evaluations}.")
    lines = [[path.name, *(name.replace("_", " ") for name in together)]]
    for name, values in {**sets, **({"all together": together} if len(sets) > 1 else {})}.items():
        lines.append([name, *(f"{value:,}" if isinstance(value, int) else f"{value:.4f}" for value in values.values())])
    return fmt.table(lines)
