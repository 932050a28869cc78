"""From a recipe to a finished run folder: ``osler pretrain`` and ``osler sft``.

A run folder that already holds this run goes on from its newest good checkpoint; one that holds another run is refused.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from osler.checkpoint import store
from osler.checkpoint.root import refuse_checkpoint
from osler.data.config import ClinicData
from osler.data.consumed import ConsumedData
from osler.data.curriculum import Span, rows_per_micro_batch
from osler.data.loader import Loader, StagedLoader, make_batch
from osler.data.order import Order
from osler.data.packing import StreamPacking, WholePacking
from osler.data.prepare import Prepared, open_prepared
from osler.data.shards import ShardSet
from osler.decode import decode
from osler.errors import UserError
from osler.eval.exams import greedy, score_by_generation
from osler.eval.perplexity import batches, measure, windows
from osler.inference.engine import InferenceEngine
from osler.inference.load import TOKENIZER_FILE, describing_files
from osler.model.config import ModelConfig
from osler.model.transformer import Transformer
from osler.monitor.logger import check_trackers
from osler.optim.build import build_optimizer
from osler.parallel.compile import COMPILE_MIN_STEPS
from osler.parallel.config import ParallelConfig
from osler.parallel.engine import ParallelEngine
from osler.parallel.parallelize import parallelize
from osler.recipe import load_recipe, parse_overrides
from osler.runtime.device import keep_freed_memory, pick_device
from osler.runtime.files import RunFolder
from osler.runtime.stop import AskedToStop, asked
from osler.runtime.world import World, joined
from osler.tasks.clinic import load as load_clinic_exam
from osler.tasks.item import ExamItem
from osler.tokenizer.bpe import Tokenizer
from osler.train.config import ExamProbe, TrainConfig
from osler.train.folder import (
    VERSIONS,
    default_name,
    describe_plan,
    newest_checkpoint,
    refuse_another,
    starting_model,
    stored_precision,
    work,
)
from osler.train.origin import announce_branch, branch_point, config_of_run, describe_branch, planned_start, taken_back
from osler.train.setup import (
    Machine,
    check_branch,
    check_plan,
    check_processes,
    choose_machine,
    describe_run,
    fit_vocabulary,
    left_out,
    make_model,
    make_tokenizer,
    pass_tokens,
    tell_of_repeats,
    warn_of_small_passes,
)
from osler.train.shards import begin, check_data, shards_of
from osler.train.step import TrainStep
from osler.train.trainer import Trainer

logger = logging.getLogger(__name__)

VALIDATION_SEED = 0  # the held-out rows are the same in every run over the same shards
EXAM_NEW_TOKENS = 64
EVAL_BATCH_TOKENS = 16_384


def run(
    kind: str,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    *,
    run_dir: str | None = None,
    resume: bool = False,
    dry_run: bool = False,
    from_step: int | None = None,
    branch: str | None = None,
) -> int:
    """The commands ``pretrain`` and ``sft``; returns the process's exit code."""
    config = config_of_run(TrainConfig, kind, recipe, overrides, run_dir, resume=resume, from_step=from_step, branch=branch)
    if config is None:
        given = load_recipe(recipe, overrides) if recipe else parse_overrides(overrides)
        config = decode(TrainConfig, {**given, "kind": kind}, source=recipe or "")
    folder = RunFolder(Path(run_dir) if run_dir else own_folder(recipe, config))
    refuse_checkpoint(folder.root)
    back = from_step if branch is None else None
    is_given = config.init_from is not None or config.branch_from is not None
    if is_given and any(override.startswith("model.") for override in overrides):
        logger.warning("model.* changes nothing here, because the model comes from the checkpoint that the run starts from.")
    if dry_run:
        refuse_another(folder, config)
        newest, aside = planned_start(folder, back)
        start = starting_model(newest, config)
        checkpoint = newest or branch_point(config)
        loaded = None if checkpoint is None else store.load(checkpoint, names=[])
        if newest is None and loaded is not None:
            check_branch(config, loaded)
            logger.info(describe_branch(config, loaded))
        check_plan(config, is_new=loaded is None)
        check_data(config, folder, loaded)
        numbers = planned_numbers(config, start[1] if start else config.model)
        print(describe_plan(config, folder, newest, start, {**aside, **numbers}))
        return 0
    with joined(config.device) as world:  # connected first: then what all ranks find wrong is told once
        check_processes(config, world.size)
        warn_of_small_passes(config, world.size)

        def start_from(run: RunFolder) -> bool:
            return train(config, taken_back(run, config, back, world), world)

        return work(kind, folder, start_from, lambda: next_steps(config, folder), goes_back=back is not None)


def own_folder(recipe: str | None, config: TrainConfig) -> Path:
    """Where a run goes without --run: named by its recipe, or else by its data."""
    if recipe:
        return Path("runs") / default_name(recipe, config.kind)
    name = "clinic" if isinstance(config.data, ClinicData) else Path(config.data.path).stem or "own"
    return Path("runs") / f"{name}-{config.kind}"


def train(config: TrainConfig, run: RunFolder, world: World | None = None) -> bool:
    """Set up and train (or continue) one supervised run in its folder; False when it was asked to stop before the end."""
    world = world or World(device=config.device)
    started = time.monotonic()
    refuse_another(run, config)
    check_trackers(config.monitor)
    exam = exam_items(config.exam)
    keep_freed_memory()
    newest = newest_checkpoint(run, record=world.is_first)
    start = newest or branch_point(config)
    checkpoint = store.load(start) if start is not None else None
    check_same_start(-1 if checkpoint is None else checkpoint.step, world)  # before ranks could wait for different things
    if newest is None and checkpoint is not None:
        check_branch(config, checkpoint)
    precision = stored_precision(start, config.precision)
    # A run by the clock takes as many steps as it can: from a minute on compiling pays.
    steps = config.total_steps if config.max_minutes is None else int(config.max_minutes * COMPILE_MIN_STEPS)
    # What `auto` comes to is a trial, which might end differently on another rank.
    machine = world.broadcast_from_first(lambda: choose_machine(world.device, precision, config.compile, steps=steps))
    machine = replace(machine, device=pick_device(world.device))
    model, tokenizer, fill = make_model(config, machine, checkpoint, processes=world.size)
    engine = parallelize(
        model, config.parallel, world, precision=config.precision, pass_tokens=pass_tokens(config, world.size),
        recompute=config.recompute, compile=machine.compile,
    )  # fmt: skip
    fill()
    del fill  # and what it loaded
    tokenizer_path = run.root / TOKENIZER_FILE
    tokenizer = world.broadcast_from_first(lambda: make_tokenizer(config, tokenizer, tokenizer_path))
    fit_vocabulary(model, tokenizer, is_new=checkpoint is None and config.init_from is None)
    shards, start_with = shards_of(config, run), partial(begin, config, run, tokenizer, checkpoint, model.config)
    prepared = start_with() if world.is_first else None  # what rank 0 writes, the others read
    world.barrier()
    prepared = prepared or open_prepared(shards, tokenizer)
    optimizer = build_optimizer(model, config.optim, seed=config.seed, process_group=world.group)
    train_step = TrainStep(
        model,
        optimizer,
        engine,
        micro_batch_tokens=config.micro_batch_tokens,
        clip_norm=config.clip_norm,
        document_mask=config.document_mask,
        device=machine.device,
    )
    loader = make_loader(config, prepared.train, world, pin_memory=machine.device.type == "cuda")
    files = {"config.yaml": run.config.read_bytes(), VERSIONS: world.broadcast_from_first(lambda: describe_run(run, machine))}
    trainer = Trainer(
        config,
        model=model,
        optimizer=optimizer,
        train_step=train_step,
        batches=loader.batches,
        consumed=ConsumedData(loader),
        evaluate=validation(config, model, prepared, machine.eager_dtype, engine),
        probe=exam_probe(exam, model, tokenizer, machine.eager_dtype, engine),
        run=run,
        files={**describing_files(model.config, tokenizer), **files},
        fingerprints={"tokenizer": tokenizer.fingerprint, "data": prepared.train.fingerprint},
        started=started,
    )
    if checkpoint is not None:
        trainer.restore(checkpoint)
        if newest is None:
            trainer.total_tokens = config.total_tokens  # what the clock had made of the other run's is no plan for this one
            announce_branch(config, checkpoint, trainer.incidents.events)
        logger.info(f"Continuing {run.root} from step {trainer.step:,} ({trainer.tokens:,} tokens).")
    else:
        if config.max_minutes is None:
            warn_of_endless_warmup(config.schedule.warmup_tokens, config.total_tokens)
        warn_of_stages_out_of_reach(config)
        tell_of_repeats(config, prepared.train, trainer.consumed)
        logger.info(
            f"{config.kind}: {model.config.num_parameters:,} parameters, {prepared.train.num_tokens:,} tokens of data, "
            f"{length_of(config)} to train on; {machine.dtype} on {place_of(machine, config.parallel, world)}."
        )
    del checkpoint  # weights and moments were copied out of it; a second set need not lie in memory while training
    return trainer.fit()


def check_same_start(step: int, world: World) -> None:
    """Refuse to train when the ranks found different checkpoints, as on machines whose run folders are not the same disk."""
    least, most = world.all_reduce_min(step, -step)
    if least != -most:
        raise UserError(
            f"The processes found different checkpoints to go on from (steps {least} to {-most}, -1 is none): the run folder "
            "must lie on a disk that all machines share."
        )


def place_of(machine: Machine, parallel: ParallelConfig, world: World) -> str:
    """On what a run computes, in words."""
    place = str(machine.device) if world.size == 1 else f"{world.size} x {machine.device.type} ({parallel.type})"
    return f"{place}, compiled" if machine.compile else place


def length_of(config: TrainConfig) -> str:
    """How long a run is, in words."""
    tokens = f"{config.total_tokens:,} tokens"
    return tokens if config.max_minutes is None else f"{config.max_minutes:g} minutes (at most {tokens})"


def warn_of_endless_warmup(warmup_tokens: int, total_tokens: int, total: str = "total_tokens") -> None:
    """A run shortened from the command line easily ends inside the warm-up it inherits, and learns next to nothing."""
    if warmup_tokens >= total_tokens:
        logger.warning(
            f"schedule.warmup_tokens {warmup_tokens:,} is not below {total} {total_tokens:,}, so the learning rate "
            "never reaches optim.lr; set schedule.warmup_tokens to a tenth of that or less."
        )


def warn_of_stages_out_of_reach(config: TrainConfig) -> None:
    """Borders of a curriculum are counted in tokens, so a shortened run may end before its long rows."""
    timeline = config.timeline
    reached = len(timeline.shares(config.total_tokens))
    if reached < len(timeline.spans):
        lost = timeline.spans[reached]
        logger.warning(
            f"stage {lost.number} of the curriculum would begin at {lost.first_token:,} tokens, but total_tokens is "
            f"{config.total_tokens:,}: the run never sees rows of {lost.seq_len} tokens. Lower the stages' until_tokens."
        )


def make_loader(
    config: TrainConfig,
    shards: ShardSet,
    world: World = World(),  # noqa: B008 - frozen
    *,
    pin_memory: bool = False,
) -> StagedLoader:
    """This rank's batches, with a packing and a loader for each stage."""
    timeline, order = config.timeline, Order(shards, config.seed)
    loaders = [
        Loader(
            packing_of(config, order, span),
            span.rows_per_batch,
            world.rank,
            world.size,
            workers=config.loader_workers,
            stage=span.number if config.curriculum else 0,
            pin_memory=pin_memory,
        )
        for span in timeline.spans
    ]
    return StagedLoader(timeline, loaders)


def packing_of(config: TrainConfig, order: Order, span: Span) -> StreamPacking | WholePacking:
    """How documents become rows: in pretraining every token is learned, in fine-tuning what the loss masks say."""
    prompt_loss = config.kind == "pretrain"
    if config.packs_whole:
        return WholePacking(order, span.seq_len, prompt_loss=prompt_loss, left_out=left_out(config, order.shards))
    return StreamPacking(order, span.seq_len, first_token=span.first_token, prompt_loss=prompt_loss)


def validation(
    config: TrainConfig, model: Transformer, prepared: Prepared, dtype: torch.dtype, engine: ParallelEngine
) -> Callable[[], dict[str, float]]:
    """A function that measures the held-out loss, and for text its bits per byte: every held-out token once, on one rank."""
    shards = prepared.validation

    def evaluate() -> dict[str, float]:
        if shards is None:
            return {}
        rows = text_batches if config.kind == "pretrain" else answer_batches
        plain = engine.plain_model(model)
        with plain.computing_in(dtype):
            held_out = measure(plain, rows(config, shards), shards.num_bytes, engine.world)
        if config.kind == "sft":
            return {"eval/loss": held_out.loss}
        return {"eval/loss": held_out.loss, "eval/bits_per_byte": held_out.bits_per_byte}

    return evaluate


def text_batches(config: TrainConfig, shards: ShardSet) -> Iterator[tuple[Tensor, Tensor]]:
    """Held-out documents one by one in windows of ``seq_len`` that do not overlap, each begun by the end-of-text token."""
    rows = windows(shards.documents(), seq_len=config.seq_len, start_id=shards.eos_id)
    return batches(rows, batch_tokens=EVAL_BATCH_TOKENS)


def answer_batches(config: TrainConfig, shards: ShardSet) -> Iterator[tuple[Tensor, ...]]:
    """Held-out examples, whole and apart from each other; what is scored is what the loss masks say."""
    packing = WholePacking(Order(shards, VALIDATION_SEED), config.seq_len, left_out=left_out(config, shards))
    size = max(1, EVAL_BATCH_TOKENS // config.seq_len)
    for start in range(0, packing.rows_per_epoch, size):
        batch = make_batch(packing, range(start, min(packing.rows_per_epoch, start + size)))
        yield batch.ids, batch.labels, batch.document_ids


def exam_items(probe: ExamProbe) -> dict[str, list[ExamItem]]:
    """The questions of the small exam by split, drawn before training so that a split that does not exist fails now."""
    if probe.every_tokens == 0:
        return {}
    return {split: load_clinic_exam(split=split, limit=probe.items) for split in probe.splits}


def exam_probe(
    exam: Mapping[str, Sequence[ExamItem]], model: Transformer, tokenizer: Tokenizer, dtype: torch.dtype, engine: ParallelEngine
) -> Callable[[], dict[str, float]]:
    """A function that sits the clinic's exam with the model as it is; each rank answers its share of the questions."""

    def sit() -> dict[str, float]:
        sampler, world = InferenceEngine(engine.plain_model(model), dtype=dtype), engine.world
        scores = {}
        for split, items in exam.items():
            share = items[world.rank :: world.size]
            score = score_by_generation(sampler, tokenizer, share, greedy(EXAM_NEW_TOKENS)) if share else None
            right, left = world.all_reduce_sum(round(score.accuracy * len(share)) if score else 0, asked())
            if left:
                raise AskedToStop
            scores[f"eval/{split}_accuracy"] = right / len(items)
        return scores

    return sit


def planned_numbers(config: TrainConfig, model: ModelConfig) -> dict[str, str]:
    """What follows from a config and the model that it trains, for ``--dry-run``."""
    most = "" if config.max_minutes is None else "at most "
    batches = f"{config.total_steps:,} of {config.batch_tokens:,} tokens" if not config.curriculum else f"{config.total_steps:,}"
    return {
        "steps": f"{most}{batches}",
        **(planned_stages(config) if config.curriculum else {}),
        "length": length_of(config),
        "parameters": f"{model.num_parameters:,}",
        "FLOPs": f"{most}{config.training_flops(model):.3g}",
    }


def planned_stages(config: TrainConfig) -> dict[str, str]:
    """A line for each stage that the run reaches: its tokens, its steps, and what a step is."""
    lines = {}
    for span, tokens in config.timeline.shares(config.total_tokens):
        micro = rows_per_micro_batch(span.rows_per_batch, span.seq_len, config.micro_batch_tokens)
        lines[f"stage {span.number}"] = (
            f"from {span.first_token:,} tokens: {-(-tokens // span.batch_tokens):,} steps of {span.rows_per_batch:,} rows of "
            f"{span.seq_len:,} tokens, {micro:,} rows at once"
        )
    return lines


def next_steps(config: TrainConfig, folder: RunFolder) -> str:
    """What to do with a finished run."""
    lines = [f"Done: {folder.root}", f"  osler report {folder.root}      the run as a page"]
    if config.kind == "pretrain":
        lines.append(f'  osler generate {folder.root} --prompt "..."   let it write')
        lines.append(f"  osler sft init_from={folder.root}   teach it to reason and answer")
    elif isinstance(config.data, ClinicData):
        lines.append(f"  osler eval {folder.root}   sit the exam")
        lines.append(f"  osler grpo init_from={folder.root}   improve it by its own tries")
    else:
        lines.append(f"  osler eval {folder.root} task.type=medqa task.path=FILE   sit an exam")
    return "\n".join([*lines, f"  osler chat {folder.root}   talk to it"])
