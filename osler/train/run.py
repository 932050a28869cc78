"""From a recipe to a finished run folder: ``osler pretrain`` and ``osler sft``.

A run folder that already holds this run goes on from its newest good checkpoint; one that holds another run is refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from osler.checkpoint import store
from osler.config import decode, load_recipe, parse_overrides
from osler.data.config import ClinicData
from osler.data.loader import Loader, make_batch
from osler.data.order import Order
from osler.data.packing import StreamPacking, WholePacking
from osler.data.prepare import Prepared
from osler.data.shards import ShardSet
from osler.data.sources import prepare_source
from osler.eval.exams import score_by_generation
from osler.eval.perplexity import batches, measure, windows
from osler.inference.engine import Engine
from osler.inference.load import TOKENIZER_FILE, describing_files
from osler.model.config import ModelConfig
from osler.model.transformer import Transformer
from osler.optim.build import build_optimizer
from osler.parallel.activation_checkpoint import set_recompute
from osler.runtime.device import keep_freed_memory
from osler.runtime.files import RunFolder, write_atomic
from osler.runtime.log import say
from osler.tasks.clinic import load as load_clinic_exam
from osler.tasks.item import ExamItem
from osler.tokenizer.bpe import Tokenizer
from osler.train.config import ExamProbe, TrainConfig
from osler.train.folder import (
    VERSIONS,
    claim,
    describe_plan,
    newest_checkpoint,
    refuse_another,
    starting_model,
    stored_config,
    stored_precision,
    work,
)
from osler.train.setup import (
    COMPILE_MIN_STEPS,
    check_vocabulary,
    choose_machine,
    describe_run,
    make_model,
    make_tokenizer,
    set_precision,
)
from osler.train.step import TrainStep, summed_loss
from osler.train.trainer import Trainer

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
) -> int:
    """The verbs ``pretrain`` and ``sft``; returns the process's exit code."""
    if resume:
        config, folder = stored_config(TrainConfig, run_dir, overrides), RunFolder(Path(str(run_dir)))
    else:
        given = load_recipe(recipe, overrides) if recipe else parse_overrides(overrides)
        config = decode(TrainConfig, {**given, "kind": kind}, source=recipe or "")
        folder = RunFolder(Path(run_dir) if run_dir else own_folder(recipe, config))
    if config.init_from is not None and any(override.startswith("model.") for override in overrides):
        say("Warning: model.* changes nothing here, because the model comes from init_from.")
    if dry_run:
        start = starting_model(folder, config)
        print(describe_plan(config, folder, start, planned_numbers(config, start[1] if start else config.model)))
        return 0
    return work(kind, folder, lambda run: train(config, run), lambda: next_steps(config, folder))


def own_folder(recipe: str | None, config: TrainConfig) -> Path:
    """Where a run goes without --run: named by its recipe, or else by its data."""
    if recipe:
        name = Path(recipe).stem
    else:
        name = "clinic" if isinstance(config.data, ClinicData) else Path(config.data.path).stem or "own"
    return Path("runs") / f"{name}-{config.kind}"


def train(config: TrainConfig, run: RunFolder) -> bool:
    """Set up and train (or continue) one supervised run in its folder; False when it was asked to stop before the end."""
    started = time.monotonic()
    refuse_another(run, config)
    exam = exam_items(config.exam)
    keep_freed_memory()
    newest = newest_checkpoint(run)
    checkpoint = store.load(newest) if newest is not None else None
    precision = stored_precision(newest, config.precision)
    # A run by the clock takes as many steps as it can: from a minute on compiling pays.
    steps = config.total_steps if config.max_minutes is None else int(config.max_minutes * COMPILE_MIN_STEPS)
    machine = choose_machine(config.device, precision, config.compile, steps=steps)
    model, tokenizer = make_model(config, machine, checkpoint)
    set_precision(model, config, machine.device)
    set_recompute(model, config.recompute)
    tokenizer_path = run.root / TOKENIZER_FILE
    tokenizer = make_tokenizer(config, tokenizer, tokenizer_path)
    check_vocabulary(model.config, tokenizer, is_new=checkpoint is None and config.init_from is None)
    prepared = prepare_source(config.data, tokenizer, run.root / "data")
    claim(run, config)
    if not tokenizer_path.exists():
        write_atomic(tokenizer_path, tokenizer.to_bytes())
    optimizer = build_optimizer(model, config.optim, seed=config.seed)
    loss = summed_loss(model)
    train_step = TrainStep(
        model,
        optimizer,
        torch.compile(loss, fullgraph=True, dynamic=False) if machine.compile else loss,
        rows_per_micro_batch=config.rows_per_micro_batch,
        clip_norm=config.clip_norm,
        document_mask=config.document_mask,
        device=machine.device,
    )
    loader = Loader(packing_of(config, prepared.train), config.rows_per_batch, workers=config.loader_workers)
    files = {"config.yaml": run.config.read_bytes(), VERSIONS: describe_run(run, machine)}
    trainer = Trainer(
        config,
        model=model,
        optimizer=optimizer,
        train_step=train_step,
        batches=loader.batches,
        evaluate=validation(config, model, prepared, machine.eager_dtype),
        probe=exam_probe(exam, model, tokenizer, machine.eager_dtype),
        run=run,
        files={**describing_files(model.config, tokenizer), **files},
        fingerprints={"tokenizer": tokenizer.fingerprint, "data": prepared.train.fingerprint},
        started=started,
    )
    if checkpoint is not None:
        trainer.restore(checkpoint)
        say(f"Continuing {run.root} from step {trainer.step:,} ({trainer.tokens:,} tokens).")
    else:
        warn_of_endless_warmup(config)
        say(
            f"{config.kind}: {model.config.num_parameters:,} parameters, {prepared.train.num_tokens:,} tokens of data, "
            f"{length_of(config)} to train on; {machine.dtype} on {machine.device}{', compiled' if machine.compile else ''}."
        )
    del checkpoint  # weights and moments were copied out of it; a second set need not lie in memory while training
    return trainer.fit()


def length_of(config: TrainConfig) -> str:
    """How long a run is, in words."""
    tokens = f"{config.total_tokens:,} tokens"
    return tokens if config.max_minutes is None else f"{config.max_minutes:g} minutes (at most {tokens})"


def warn_of_endless_warmup(config: TrainConfig) -> None:
    """A run shortened from the command line easily ends inside the warm-up it inherits, and learns next to nothing."""
    warmup = config.schedule.warmup_tokens
    if config.max_minutes is None and warmup >= config.total_tokens:
        say(
            f"Warning: schedule.warmup_tokens {warmup:,} is not below total_tokens {config.total_tokens:,}, so the learning rate "
            "never reaches optim.lr; set schedule.warmup_tokens to a tenth of total_tokens or less."
        )


def packing_of(config: TrainConfig, shards: ShardSet) -> StreamPacking | WholePacking:
    """How documents become rows: in pretraining every token is learned, in fine-tuning what the loss masks say."""
    if config.packing == "whole" or (config.packing == "auto" and config.kind == "sft"):
        return WholePacking(Order(shards, config.seed), config.seq_len, prompt_loss=config.kind == "pretrain")
    return StreamPacking(Order(shards, config.seed), config.seq_len, prompt_loss=config.kind == "pretrain")


def validation(config: TrainConfig, model: Transformer, prepared: Prepared, dtype: torch.dtype) -> Callable[[], dict[str, float]]:
    """A function that measures the held-out loss, and for text its bits per byte: every held-out token once."""
    shards = prepared.validation

    def evaluate() -> dict[str, float]:
        if shards is None:
            return {}
        rows = text_batches if config.kind == "pretrain" else answer_batches
        with model.computing_in(dtype):
            held_out = measure(model, rows(config, shards), shards.num_bytes)
        if config.kind == "sft":
            return {"eval/loss": held_out.loss}
        return {"eval/loss": held_out.loss, "eval/bits_per_byte": held_out.bits_per_byte}

    return evaluate


def text_batches(config: TrainConfig, shards: ShardSet) -> Iterator[tuple[Tensor, Tensor]]:
    """Held-out documents one by one in windows of ``seq_len`` that do not overlap, each begun by the end-of-text token."""
    documents = (shards.document(index)[0].tolist() for index in range(shards.num_documents))
    rows = windows(documents, seq_len=config.seq_len, start_id=shards.eos_id)
    return batches(rows, batch_tokens=EVAL_BATCH_TOKENS)


def answer_batches(config: TrainConfig, shards: ShardSet) -> Iterator[tuple[Tensor, ...]]:
    """Held-out examples, whole and apart from each other; what is scored is what the loss masks say."""
    packing = WholePacking(Order(shards, VALIDATION_SEED), config.seq_len)
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
    exam: Mapping[str, Sequence[ExamItem]], model: Transformer, tokenizer: Tokenizer, dtype: torch.dtype
) -> Callable[[], dict[str, float]]:
    """A function that sits the clinic's exam with the model as it is."""
    engine = Engine(model, dtype=dtype)

    def sit() -> dict[str, float]:
        scores = {}
        for split, items in exam.items():
            score = score_by_generation(engine, tokenizer, items, max_new_tokens=EXAM_NEW_TOKENS)
            scores[f"eval/{split}_accuracy"] = score.accuracy
        return scores

    return sit


def planned_numbers(config: TrainConfig, model: ModelConfig) -> dict[str, str]:
    """What follows from a config and the model that it trains, for ``--dry-run``."""
    most = "" if config.max_minutes is None else "at most "
    return {
        "steps": f"{most}{config.total_steps:,} of {config.batch_tokens:,} tokens",
        "length": length_of(config),
        "parameters": f"{model.num_parameters:,}",
        "FLOPs": f"{most}{config.total_tokens * model.flops_per_token(config.seq_len):.3g}",
    }


def next_steps(config: TrainConfig, folder: RunFolder) -> str:
    """What to do with a finished run."""
    lines = [f"Done: {folder.root}", f"  osler report {folder.root}      the run as a page"]
    if config.kind == "pretrain":
        lines += [
            f'  osler generate {folder.root} --prompt "..."   let it write',
            f"  osler sft init_from={folder.root}   teach it to reason and answer",
        ]
    elif isinstance(config.data, ClinicData):
        lines += [
            f"  osler eval {folder.root}   sit the exam",
            f"  osler grpo init_from={folder.root}   improve it by its own tries",
        ]
    else:
        lines.append(f"  osler eval {folder.root} task.type=medqa task.path=FILE   sit an exam")
    return "\n".join([*lines, f"  osler chat {folder.root}   talk to it"])
