"""What a training run needs before its first step: checks of its config, the model, the tokenizer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from osler.checkpoint import store
from osler.config.schema import decode, encode
from osler.data.config import (
    FIRST_SHARD_TOKENS,
    FIRST_WINDOW_TOKENS,
    VALIDATION_TOKENS,
    ClinicData,
    FilesData,
    PreparedData,
)
from osler.data.curriculum import rows_per_micro_batch
from osler.data.loader import Loader
from osler.data.order import WINDOW_SHARDS
from osler.data.packing import torn_lengths
from osler.data.prepared import Prepared, tokenizer_of_shards
from osler.data.preparer import GIGABYTE, SHARDS_SHARE
from osler.data.shard_set import ShardSet
from osler.data.shards import SHARD_TOKENS, token_dtype
from osler.data.sources import at_known_commits, open_corpora, train_tokenizer
from osler.data.stream import wait_together
from osler.inference.load import described_model, load_start, tokenizer_of, trained_seq_len_of
from osler.model.bigrams import Factors, bigram_factors, rank_for, start_from_bigrams
from osler.model.config import ModelConfig
from osler.model.init import init_indexers, is_of_indexer
from osler.model.transformer import Transformer
from osler.parallel.config import DeepSpeedConfig, FsdpConfig
from osler.parallel.deepspeed import read_settings
from osler.parallel.fp8 import float8_linear
from osler.parallel.parallelize import check_strategy
from osler.runs.process import Machine
from osler.runs.resume import config_in
from osler.runtime.device import pick_device
from osler.runtime.errors import UserError
from osler.runtime.sharded import load_whole, whole
from osler.runtime.world import World
from osler.tokenizer.bpe import Tokenizer
from osler.tokenizer.round_trip import Losses, refuse_missing_bytes
from osler.train.config import TrainConfig
from osler.train.teacher import check_teacher, described_teacher

logger = logging.getLogger(__name__)

DATA = "data"  # the folder of the run's own shards
ROUND_LENGTH = 64  # a proposed row length is a multiple of this
# A run that reads its data more often than this says so at its start. Muennighoff et al. 2023, arXiv 2305.16264, found up to 4
# passes over text nearly as good as new text, and hardly a gain after 16. Fine-tuning often repeats few examples many times.
WORTHWHILE_EPOCHS = {"pretrain": 4, "sft": 16}
ROUND_TRIPS = 64  # documents that are encoded and decoded before a run begins, to see what its tokenizer loses
BIGRAM_TOKENS = 1 << 24  # counted for embeddings that start from bigrams
WINDOWS_AT_HAND = 3  # that being read, the one before, in which its first row begins, and the one being written


def check_plan(config: TrainConfig, *, is_new: bool) -> None:
    """Raise UserError when something that a run needs besides data is missing: device, disk budget, packages, tokenizer."""
    device = pick_device(config.device)
    check_disk_budget(config)
    if config.precision == "fp8":
        float8_linear(device.type != "cuda")
    if isinstance(config.parallel, DeepSpeedConfig):
        read_settings(config.parallel)
    if is_new and config.init_from is None and (tokenizer := tokenizer_at_hand(config)) is not None:
        fitted(config.model, refuse_missing_bytes(tokenizer))
        for corpus in open_corpora(config.text).values() if config.text else ():
            first = islice(corpus.documents(), ROUND_TRIPS)
            Losses().look(tokenizer, (text for document in first for text in document.texts))


def check_distillation(config: TrainConfig, start: store.Loaded | None) -> None:
    """Raise UserError when the teacher is missing or does not fit; ``start`` is the checkpoint to continue from."""
    if config.teacher is None:
        return
    if start is None and config.init_from is not None:
        start = load_start(config.init_from)
    tokenizer = tokenizer_at_hand(config) if start is None else tokenizer_of(start)
    assert tokenizer is not None  # a run that names no tokenizer takes the teacher's
    student = fitted(config.model if start is None else described_model(start), tokenizer)
    check_teacher(described_teacher(config.teacher), student, tokenizer.fingerprint, config.seq_len)


def check_disk_budget(config: TrainConfig) -> None:
    """Raise UserError when the disk budget cannot hold the data that a run needs at once."""
    if config.text is None or config.text.disk_budget_gb is None:
        return
    sources, checkpoint, budget = list(config.sources.values()), config.checkpoint, config.text.disk_budget_gb
    kept = (checkpoint.keep_last + 1) * checkpoint.every_tokens  # tokens between the oldest checkpoint and the present step
    tokens: float = min(2 * config.total_tokens, kept + len(sources) * WINDOWS_AT_HAND * WINDOW_SHARDS * SHARD_TOKENS)
    tokens = max(tokens, FIRST_WINDOW_TOKENS) + len(sources) * SHARD_TOKENS
    weights = sum(source.weight for source in sources)
    num_sets = sum(isinstance(source, ClinicData) or source.holdout_fraction > 0 for source in sources)
    # An evaluation waits until this much of a source is held out: the tokens that it reads, and one more shard.
    held_out = min(config.evaluated_tokens(max(1, num_sets)) + FIRST_SHARD_TOKENS, VALIDATION_TOKENS)
    ahead = [  # tokens that are prepared before an evaluation begins
        held_out / source.holdout_fraction * weights / source.weight
        for source in sources
        if not (config.validation or isinstance(source, ClinicData)) and source.holdout_fraction
    ]
    tokens += max(ahead, default=0.0)
    may_have_masks = not all(isinstance(source, FilesData) for source in sources)
    least = tokens * (token_dtype(config.model.vocab_size).itemsize + may_have_masks) / SHARDS_SHARE / GIGABYTE
    if budget < least:
        waits = ", and until enough is held out for an evaluation (with sets in `validation` that is nothing)" if ahead else ""
        raise UserError(
            f"data.disk_budget_gb={budget:g} is too small: what lies between the oldest of "
            f"checkpoint.keep_last={checkpoint.keep_last} checkpoints and {WINDOWS_AT_HAND} windows of shards{waits} takes up to "
            f"{least:.3g} GB: set it to that."
        )


def check_branch(config: TrainConfig, start: store.Loaded) -> None:
    """Raise UserError when a run with this config cannot take over steps and rows from a checkpoint of another run."""
    there = decode(TrainConfig, config_in(start), source=str(start.path))
    if config.trains != there.trains:
        raise UserError(
            f"trains is {config.trains} here and {there.trains} in {start.path}, whose optimizer holds the state of other "
            f"weights: start a new run with init_from={start.path}."
        )
    tokens, seen = config.timeline.tokens_before(start.step), start.state["tokens"]
    until = f"leave them as they were there; a curriculum may change them after a first stage with until_tokens={seen}"
    if tokens != seen:
        raise UserError(
            f"Step {start.step:,} of {start.path} is {seen:,} tokens into its run, and with the batches given here it would be "
            f"{tokens:,}: {until}."
        )
    if (config.context, config.model.attention) != (there.context, there.model.attention):
        raise UserError(
            f"A branch keeps the model of {start.path}: to extend its context or change its attention, start a new run with "
            f"init_from={start.path}."
        )
    if config.packs_whole != there.packs_whole or (config.packs_whole and config.seq_len != there.seq_len):
        raise UserError(
            f"With another packing, or documents kept whole in rows of another seq_len, step {start.step:,} is another place in "
            f"the data: leave packing and seq_len as they are in {start.path}, or start a new run with init_from={start.path}."
        )
    if _shares_until(config, seen) != _shares_until(there, seen):
        raise UserError(
            f"With other weights of the sources, step {start.step:,} of {start.path} is another place in the data: {until}."
        )
    if config.max_minutes is not None and start.state["seconds"] >= 60 * config.max_minutes:
        raise UserError(
            f"{start.path} has trained for {start.state['seconds'] / 60:.1f} minutes, from which a branch counts on, and "
            f"max_minutes is {config.max_minutes:g}: set max_minutes higher, or null for a run by total_tokens alone."
        )
    if tokens >= config.total_tokens:
        raise UserError(f"{start.path} has seen {seen:,} tokens, so nothing is left to train: set total_tokens higher.")


def _shares_until(config: TrainConfig, tokens: int) -> list[dict[str, float]]:
    """Return the share of each source in every stage that begins before ``tokens``; {} where only the shards know the sources."""
    of_data = {name: source.weight for name, source in config.sources.items()}
    reached = len(config.timeline.shares(tokens))
    weights = [stage.weights or of_data for stage in config.curriculum[:reached]] or [of_data]
    return [{name: weight / sum(stage.values()) for name, weight in stage.items()} for stage in weights]


def make_model(
    config: TrainConfig, machine: Machine, checkpoint: store.Loaded | None, *, processes: int = 1
) -> tuple[Transformer, Tokenizer | None, Callable[[], None]]:
    """Return the model to train and its tokenizer: from ``checkpoint``, from ``init_from``, or new (no tokenizer).

    The weights of ``checkpoint`` are loaded later, by ``Loop.restore``. A model that FSDP will shard is on ``meta``; call the
    third result after the sharding to fill in its weights. For any other model this function does nothing.
    """
    source = checkpoint
    if checkpoint is None and config.init_from is not None:
        source = load_start(config.init_from, ["model"])
    shape, tokenizer = (config.model, None) if source is None else (described_model(source), tokenizer_of(source))
    trained_seq_len = config.timeline.spans[0].seq_len if source is None else trained_seq_len_of(source)
    if source is not None and checkpoint is None:
        there, shape = shape, config.model_from(shape, trained_seq_len)  # there: the shape in ``init_from``
        if shape.attention.type != there.attention.type:
            logger.info(
                f"{source.path} has no indexers. New ones are drawn, and this run teaches them what attention looks at; all "
                "other weights stay as they are."
            )
        else:
            here, before = encode(shape.attention), encode(there.attention)
            if changes := [f"{name} {before[name]} → {here[name]}" for name in here if here[name] != before[name]]:
                logger.info(f"The attention differs from that of {source.path}: {', '.join(changes)}.")
    if checkpoint is not None:
        config.check_rows(shape)
    starts_on_meta = processes > 1 and isinstance(config.parallel, FsdpConfig)
    with torch.device("meta" if starts_on_meta else "cpu"):
        model = Transformer(shape, compute_dtype=machine.dtype)
    model.trained_seq_len = trained_seq_len
    if config.trains == "indexers":
        model.warm_up_indexers()

    def fill() -> None:
        if source is None:
            model.init_weights(config.seed)
        elif checkpoint is None:
            init_indexers(model, shape, config.seed)  # the start may have none
            drawn = {name: whole(weight) for name, weight in model.state_dict().items() if is_of_indexer(name)}
            load_whole(model, {**drawn, **source.tensors["model"]})

    if starts_on_meta:
        return model, tokenizer, fill
    fill()
    return model.to(machine.device), tokenizer, lambda: None


def start_embeddings(
    model: Transformer, prepared: Prepared, seed: int, world: World, tend: Callable[[float], None]
) -> None:
    """Let embedding and head start from the bigrams of the first shards of each source; the ranks do so together."""
    weights = sum(source.weight for source in prepared.sources)

    def first_shards() -> list[ShardSet]:
        return [source.train.head_within(int(BIGRAM_TOKENS * source.weight / weights)) for source in prepared.sources]

    heads = wait_together(first_shards, world, "The start of the embeddings", tend)

    def count() -> Factors:
        began = time.monotonic()
        texts = [shards.shard(number).tokens for shards in heads for number in range(shards.num_shards)]
        rows, rank = model.config.padded_vocab_size, rank_for(model.config)
        factors = bigram_factors(texts, rows=rows, rank=rank, seed=seed)
        tokens, seconds = sum(map(len, texts)), time.monotonic() - began
        logger.info(f"Embedding and head start from the bigrams of {tokens:,} tokens, counted in {seconds:.1f} s.")
        return factors

    start_from_bigrams(model, world.broadcast_from_first(count))


def check_processes(config: TrainConfig, processes: int) -> None:
    """Raise UserError for a config that this number of processes cannot train together."""
    check_strategy(config.parallel, processes)
    config.check_processes(processes)


def pass_tokens(config: TrainConfig, processes: int) -> list[int]:
    """Return the tokens of a forward pass of one process, in each stage."""
    return [
        rows_per_micro_batch(span.rows_per_batch // processes, span.seq_len, config.micro_batch_tokens) * span.seq_len
        for span in config.timeline.spans
    ]


def make_tokenizer(config: TrainConfig, given: Tokenizer | None, kept: Path) -> Tokenizer:
    """Return the run's tokenizer: the model's (``given``), or the one in ``kept``, or ``tokenizer_at_hand``, or a new one."""
    if given is not None:
        return given
    if kept.exists():
        return Tokenizer.load(kept)
    if (at_hand := tokenizer_at_hand(config)) is not None:
        return at_hand
    assert config.text is not None
    data, validation = at_known_commits(config.text, config.validation, kept.parent / DATA)
    return train_tokenizer(data, config.tokenizer, validation)


def tokenizer_at_hand(config: TrainConfig) -> Tokenizer | None:
    """Return the tokenizer of the shards, of ``tokenizer.path`` or of the teacher; None when a new one is to be trained."""
    if isinstance(config.data, PreparedData):
        return tokenizer_of_shards(config.data.path, config.tokenizer.path)
    if config.tokenizer.path is not None:
        return Tokenizer.load(config.tokenizer.path).with_specials()
    return None if config.teacher is None else tokenizer_of(described_teacher(config.teacher))


def fitted(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """Return the config of a model with rows for all tokens of a tokenizer.

    Special tokens beyond the model's vocabulary take rows of its padding. Raises UserError for a larger tokenizer.
    """
    beyond = range(model.vocab_size, tokenizer.vocab_size)
    if not beyond:
        return model
    if tokenizer.vocab_size > model.padded_vocab_size or not tokenizer.special_ids.issuperset(beyond):
        raise UserError(
            f"The tokenizer has {tokenizer.vocab_size:,} tokens, the model only {model.vocab_size:,}: set "
            f"model.vocab_size={tokenizer.vocab_size}."
        )
    logger.info(
        f"{len(beyond)} special tokens come after the {model.vocab_size:,} of the model: they take rows of its padding to "
        f"{model.padded_vocab_size:,}, so it keeps its size."
    )
    return replace(model, vocab_size=tokenizer.vocab_size)


def check_prepared(config: TrainConfig, prepared: Prepared, max_seq_len: int) -> None:
    """Raise UserError for examples whose answers would be cut from their questions, or warn how many ``too_long=drop`` drops.

    ``max_seq_len`` is the limit of the model. Also raises UserError when nothing would be left of the training data or of a
    validation set, or when early stopping is asked for and nothing is held out to measure progress on.
    """
    if config.early_stopping_patience is not None and not prepared.validation_sets:
        raise UserError(
            "early_stopping_patience counts evaluations on text that is held out, and nothing is: give validation=[...] or a "
            "holdout_fraction above 0, or leave early_stopping_patience out."
        )
    if config.kind != "sft" or not config.packs_whole or not prepared.is_complete:
        return
    splits = [*prepared.train, *prepared.validation]
    torn = [torn_lengths(shards, config.seq_len) for shards in splits]
    count = sum(map(len, torn))
    if not count:
        return
    longest = max(length for lengths in torn for length in lengths)
    needed = -(-(longest - 1) // ROUND_LENGTH) * ROUND_LENGTH
    wanted = min(max_seq_len, needed)
    what = (
        f"{count:,} of {sum(shards.num_documents for shards in splits):,} examples are longer than a row of seq_len "
        f"{config.seq_len} (the longest has {longest:,} tokens), so that answers would be cut from their questions"
    )
    more = f"the model reads no more than {max_seq_len} tokens (context.max_seq_len={needed} extends it in a run with init_from)"
    if wanted > config.seq_len:
        more = f"set seq_len={wanted} batch_tokens={-(-config.batch_tokens // wanted) * wanted}"
    if any(len(lengths) == shards.num_documents for shards, lengths in zip(splits, torn, strict=True)):
        raise UserError(f"{what}, and too_long=drop leaves nothing to train on or to hold out: {more}.")
    if config.too_long == "refuse":
        raise UserError(f"{what}: {more}, or leave these examples out with too_long=drop.")
    logger.warning(f"{what}; they are left out (too_long=drop).")


def tell_of_repeats(config: TrainConfig, prepared: Prepared, loader: Loader) -> None:
    """Warn when the data are less than one row; log a note when the run repeats them so often that repeats teach little."""
    if not prepared.is_complete:  # the number of tokens becomes known later
        return
    tokens = prepared.num_tokens
    most = WORTHWHILE_EPOCHS[config.kind]
    if tokens < config.seq_len:
        logger.warning(
            f"the data are {tokens:,} tokens, less than one row of seq_len {config.seq_len}. Give more data, or set a "
            "smaller seq_len."
        )
    planned = loader.planned_tokens(config.total_tokens)
    by_source = {source.name: planned[source.name] / source.train.num_tokens for source in prepared.sources}
    name, epochs = max(by_source.items(), key=lambda item: item[1])
    if config.max_minutes is None and epochs > most:
        what = f"its {tokens:,} tokens" if len(by_source) == 1 else f"the source {name}"
        logger.info(
            f"Note: the run reads {what} {epochs:.1f} times. Up to about 4 times repeats are worth nearly what new data are, and "
            f"after 16 hardly anything. Give more data, or set total_tokens={int(config.total_tokens * most / epochs)}."
        )
