"""From a recipe to a finished run folder: ``osler pretrain`` and ``osler sft``.

A run folder that already holds this run goes on from its newest good checkpoint; one that holds another run is refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import yaml
from torch import Tensor

from osler.checkpoint import store
from osler.config import decode, encode, load_recipe, parse_overrides
from osler.data.loader import Loader, make_batch
from osler.data.order import Order
from osler.data.packing import StreamPacking, WholePacking
from osler.data.prepare import Prepared
from osler.data.shards import ShardSet
from osler.data.sources import prepare_source
from osler.errors import UserError
from osler.eval.exams import score_by_generation
from osler.eval.perplexity import batches, measure, windows
from osler.inference.engine import Engine
from osler.inference.load import TOKENIZER_FILE, describing_files
from osler.model.transformer import Transformer
from osler.optim.build import build_optimizer
from osler.runtime.device import keep_freed_memory
from osler.runtime.files import RunFolder, write_atomic
from osler.runtime.log import say
from osler.runtime.stop import EXIT_STOPPED
from osler.tasks.clinic import load as load_clinic_exam
from osler.tokenizer.bpe import Tokenizer
from osler.train.config import ExamProbe, TrainConfig
from osler.train.setup import check_vocabulary, choose_machine, describe_run, make_model, make_tokenizer
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
        config, folder = stored_config(run_dir, overrides), RunFolder(Path(str(run_dir)))
    else:
        config = decode(TrainConfig, {**(load_recipe(recipe, overrides) if recipe else load_overrides(overrides)), "kind": kind})
        folder = RunFolder(Path(run_dir or Path("runs") / f"{Path(recipe).stem if recipe else 'clinic'}-{kind}"))
    if dry_run:
        print(describe_plan(config, folder))
        return 0
    finished = train(config, RunFolder.create(folder.root))
    if not finished:
        say(f"Stopped and saved. The same command, or `osler {kind} --run {folder.root} --resume`, goes on from there.")
        return EXIT_STOPPED
    say(next_steps(config, folder))
    return 0


def load_overrides(overrides: Sequence[str]) -> dict[str, object]:
    """The mapping that overrides alone describe, for a run without a recipe."""


    return parse_overrides(overrides)


def stored_config(run_dir: str | None, overrides: Sequence[str]) -> TrainConfig:
    """The config that a run folder was started with, for ``--resume``."""
    if run_dir is None:
        raise UserError("--resume needs --run FOLDER: the run to go on with.")
    if overrides:
        raise UserError(f"--resume continues a run as it was configured; leave out {' '.join(overrides)}.")
    path = RunFolder(Path(run_dir)).config
    if not path.exists():
        raise UserError(f"{run_dir} holds no run to resume: {path} is missing.")
    return decode(TrainConfig, yaml.safe_load(path.read_text()), source=str(path))


def train(config: TrainConfig, run: RunFolder) -> bool:
    """Set up and train (or continue) one supervised run in its folder; False when it was asked to stop before the end."""
    started = time.monotonic()
    claim(run, encode(config))
    keep_freed_memory()
    machine = choose_machine(config.device, config.precision, config.compile, steps=config.total_steps)
    model, tokenizer, config = make_model(config, machine)
    tokenizer_path = run.root / TOKENIZER_FILE
    if tokenizer is None:
        tokenizer = make_tokenizer(config, tokenizer_path)
    else:
        write_atomic(tokenizer_path, tokenizer.to_bytes())
    check_vocabulary(model.config, tokenizer)
    prepared = prepare_source(config.data, tokenizer, run.root / "data")
    describe_run(run, machine)
    optimizer = build_optimizer(model, config.optim)
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
    packing = packing_of(config, prepared.train)
    loader = Loader(packing, config.rows_per_batch, workers=config.loader_workers)
    trainer = Trainer(
        config,
        model=model,
        optimizer=optimizer,
        train_step=train_step,
        batches=loader.batches,
        evaluate=validation(config, model, prepared, machine.eager_dtype),
        probe=exam_probe(config.exam, model, tokenizer, machine.eager_dtype),
        run=run,
        files={**describing_files(model.config, tokenizer), "config.yaml": run.config.read_bytes()},
        fingerprints={"tokenizer": tokenizer.fingerprint, "data": prepared.train.fingerprint},
        started=started,
    )
    checkpoint, skipped = store.newest_good(run.checkpoints) if run.checkpoints.is_dir() else (None, [])
    if skipped:
        say(f"Warning: {store.describe_skipped(skipped)}; going on from {checkpoint or 'the start'}.")
    if checkpoint is not None:
        trainer.restore(store.load(checkpoint))
        say(f"Continuing {run.root} from step {trainer.step:,} ({trainer.tokens:,} tokens).")
    else:
        say(
            f"{config.kind}: {model.config.num_parameters:,} parameters, {prepared.train.num_tokens:,} tokens of data, "
            f"{config.total_tokens:,} to train on; {machine.dtype} on {machine.device}{', compiled' if machine.compile else ''}."
        )
    return trainer.fit()


def claim(run: RunFolder, config: dict[str, object]) -> None:
    """Write ``config.yaml``, or check that the folder's own is the same: a run folder holds one run."""
    if run.config.exists():
        stored = yaml.safe_load(run.config.read_text())
        if stored != config:
            changed = sorted(key for key in {*stored, *config} if stored.get(key) != config.get(key))
            raise UserError(
                f"{run.root} holds another run: {', '.join(changed)} differ from its config.yaml. Choose another folder with "
                "--run, or delete that one to start over."
            )
        return
    write_atomic(run.config, yaml.safe_dump(config, sort_keys=False))


def packing_of(config: TrainConfig, shards: ShardSet) -> StreamPacking | WholePacking:
    """How documents become rows: in pretraining every token is learned, in fine-tuning what the loss masks say."""
    if config.packing == "whole":
        return WholePacking(Order(shards, config.seed), config.seq_len, prompt_loss=config.kind == "pretrain")
    return StreamPacking(Order(shards, config.seed), config.seq_len, prompt_loss=config.kind == "pretrain")


def validation(
    config: TrainConfig, model: Transformer, prepared: Prepared, dtype: torch.dtype
) -> Callable[[], dict[str, float]]:
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


def exam_probe(
    probe: ExamProbe, model: Transformer, tokenizer: Tokenizer, dtype: torch.dtype
) -> Callable[[], dict[str, float]]:
    """A function that sits the clinic's exam with the model as it is."""
    engine = Engine(model, dtype=dtype)

    def sit() -> dict[str, float]:
        scores = {}
        for split in probe.splits:
            items = load_clinic_exam(split=split, limit=probe.items)
            score = score_by_generation(engine, tokenizer, items, max_new_tokens=EXAM_NEW_TOKENS)
            scores[f"eval/{split}_accuracy"] = score.accuracy
        return scores

    return sit


def describe_plan(config: TrainConfig, folder: RunFolder) -> str:
    """What ``--dry-run`` prints: the resolved config and the numbers that follow from it."""
    model = config.model
    derived = [
        f"# run folder        {folder.root}",
        f"# parameters        {model.num_parameters:,}",
        f"# steps             {config.total_steps:,} of {config.batch_tokens:,} tokens",
        f"# FLOPs             {config.total_tokens * model.flops_per_token(config.seq_len):.3g}",
    ]
    return "\n".join([yaml.safe_dump(encode(config), sort_keys=False).rstrip(), *derived])


def next_steps(config: TrainConfig, folder: RunFolder) -> str:
    """What to do with a finished run."""
    lines = [f"Done: {folder.root}", f"  osler report {folder.root}      the run as a page"]
    if config.kind == "pretrain":
        lines += [
            f'  osler generate {folder.root} --prompt "..."   let it write',
            f"  osler sft init_from={folder.root}   teach it to reason and answer",
        ]
    else:
        lines += [f"  osler eval {folder.root}   sit the exam", f"  osler grpo init_from={folder.root}   improve it by its own tries"]
    return "\n".join([*lines, f"  osler chat {folder.root}   talk to it"])
