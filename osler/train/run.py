"""The commands ``osler pretrain`` and ``osler sft``, from a recipe to a finished run; GRPO shares ``runs/command.py``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path

from osler.checkpoint import store
from osler.config.schema import encode
from osler.data.loader import Loader
from osler.data.named import check_task, load_task
from osler.data.prepared import open_prepared
from osler.data.preparer import Preparer
from osler.data.stream import DiskBudget, untended, wait_together
from osler.eval.exams import Form, greedy, score_by_generation, score_by_likelihood, shared_exam
from osler.eval.score import ScoredExam
from osler.inference.engine import InferenceEngine
from osler.inference.load import TOKENIZER_FILE, types_of
from osler.model.transformer import SummedLoss, Transformer
from osler.optim.build import build_optimizer
from osler.parallel.parallelize import parallelize
from osler.runs.command import Job, Request, carry_out
from osler.runs.loop import Loop
from osler.runs.process import Learner, Run, agree_on_machine, place_of
from osler.runs.resume import find_start, resume, warn_of_endless_warmup
from osler.runtime import format as fmt
from osler.runtime.files import RunFolder
from osler.runtime.world import World
from osler.tasks.item import ExamItem
from osler.tasks.needle import Context
from osler.tasks.registry import load_clinic
from osler.tokenizer.bpe import Tokenizer
from osler.tokenizer.round_trip import refuse_missing_bytes
from osler.train import setup
from osler.train.batches import make_loader
from osler.train.config import TrainConfig
from osler.train.evaluation import as_metrics, evaluate_checkpoint, held_out_scores
from osler.train.shards import check_data, exams_in_data, fingerprints_of, prepare_run, shards_of
from osler.train.teacher import DistilledLoss, open_teacher
from osler.train.trainer import SupervisedTrainer

logger = logging.getLogger(__name__)


def run(request: Request) -> int:
    """Run the command ``pretrain`` or ``sft``; return the exit code."""
    return carry_out(JOB, request)


def train(config: TrainConfig, folder: RunFolder, world: World | None = None) -> bool:
    """Set up and train (or continue) one supervised run in its folder. Return False when it was asked to stop before the end."""
    world = world or World(device=config.device)
    run = Run(folder, world)
    start = find_start(config, run, setup.check_branch)
    checkpoint = start.load()
    steps = config.steps_to_compile_for
    machine = agree_on_machine(world, start.checkpoint, precision=config.precision, compile_mode=config.compile, steps=steps)
    model, tokenizer, fill = setup.make_model(config, machine, checkpoint, processes=world.size)
    kept = folder.root / TOKENIZER_FILE
    tokenizer = world.broadcast_from_first(lambda: refuse_missing_bytes(setup.make_tokenizer(config, tokenizer, kept)))
    model.config = setup.fitted(model.config, tokenizer)
    # Exams are read before training, so that a split or file that does not exist fails now.
    exams = probe_items(config, tokenizer, model.config.max_seq_len) if config.exam.every_tokens else {}
    teacher = open_teacher(config, machine, model.config, tokenizer, None if start.is_branch else checkpoint)
    engine = parallelize(
        model,
        config.parallel,
        world,
        precision=config.precision,
        pass_tokens=setup.pass_tokens(config, world.size),
        recompute=config.recompute,
        compile=machine.compile,
        loss_of=SummedLoss if config.teacher is None else partial(DistilledLoss, config=config.teacher),
    )
    fill()
    del fill  # frees the weights that it loaded
    prepared, preparer = prepare_run(config, folder, tokenizer, checkpoint, model.config) if world.is_first else (None, None)
    world.barrier()  # the other ranks read what rank 0 wrote
    prepared = prepared or open_prepared(shards_of(config, folder), tokenizer, growing=config.streams)
    optimizer = build_optimizer(model, config.optim, seed=config.seed, process_group=world.group)
    loader = make_loader(config, prepared, world, pin_memory=machine.device.type == "cuda")
    run.describe(machine, model.config, tokenizer)
    run.more_files = exams_in_data(config, prepared.folder, checkpoint)
    tend = tending(config, folder, preparer, loader)
    if checkpoint is None and config.init_from is None and model.config.embedding_init == "bigrams":
        setup.start_embeddings(model, prepared, config.seed, world, tend)
    run.fingerprints = wait_together(partial(fingerprints_of, prepared, tokenizer, checkpoint), world, "The run", tend)

    def held_out() -> dict[str, float]:
        plain_model = partial(engine.plain_model, model, machine.eager_dtype)
        return as_metrics(config, prepared, held_out_scores(config, prepared, plain_model, world, tend))

    trainer = SupervisedTrainer(
        config,
        run,
        Learner(model, optimizer, engine, config.clip_norm),
        loader,
        held_out=held_out,
        exam=exam_probe(config, exams, tokenizer, partial(engine.plain_model, model, machine.eager_dtype), world),
        tend=tend,
        teacher=teacher,
    )
    if checkpoint is not None:
        loop = resume(trainer, start, checkpoint)
        if start.is_branch:
            trainer.total = config.total_tokens  # max_minutes may have lowered the total in the checkpoint of the other run
    else:
        loop = Loop(trainer)
        warn_of_plan(config)
        setup.tell_of_repeats(config, prepared, trainer.loader)
        logger.info(
            f"{config.kind}: {model.config.num_parameters:,} parameters, {prepared.size}, "
            f"{config.length} to train on; {machine.dtype} on {place_of(machine, config.parallel, world)}."
        )
    del checkpoint  # its weights and moments were copied; do not keep a second set in memory while training
    with closing(preparer) if preparer is not None else nullcontext():
        return loop.fit()


def tending(
    config: TrainConfig, folder: RunFolder, preparer: Preparer | None, loader: Loader
) -> Callable[[float], None]:
    """Return a function that looks after data that are still prepared, if this process prepares them; see ``wait_together``."""
    if preparer is None or config.text is None or config.text.disk_budget_gb is None:
        return untended if preparer is None else preparer.tend
    checkpoint = config.checkpoint
    spare_tokens = config.recovery.max_rollbacks * checkpoint.every_tokens
    plan = {"keep_last": checkpoint.keep_last, "total_tokens": config.total_tokens, "spare_tokens": spare_tokens}
    budget = DiskBudget(preparer.folder, config.text.disk_budget_gb, loader, folder.checkpoints, **plan)

    def tend(waited: float) -> None:
        preparer.tend(waited)
        budget.make_room(waited)

    return tend


def warn_of_plan(config: TrainConfig) -> None:
    """Warn if a run ends inside its warm-up, or before a stage of its curriculum begins: perhaps it was shortened."""
    timeline, total = config.timeline, config.total_tokens
    if config.max_minutes is None:
        warn_of_endless_warmup(config.schedule, total)
    unreached = timeline.spans[len(timeline.shares(total)) :]
    for lost in unreached[:1]:  # one warning is enough
        logger.warning(
            f"stage {lost.number} of the curriculum would begin at {lost.first_token:,} tokens, but total_tokens is {total:,}: "
            f"the run never sees rows of {lost.seq_len} tokens. Lower the stages' until_tokens."
        )


def probe_items(config: TrainConfig, tokenizer: Tokenizer, max_seq_len: int) -> dict[str, list[ExamItem]]:
    """Return the questions of each exam that is sat during training, by the exam's name in metrics."""
    probe = config.exam
    root = getattr(config.data, "root", "")
    if not probe.tasks:
        return {split: load_clinic(split=split, limit=probe.items) for split in probe.splits}
    new_tokens = probe.max_new_tokens if probe.method in ("auto", "generation") else 0
    context = Context(tokenizer, max_seq_len, new_tokens, template=config.kind == "sft")
    return {
        "_".join(filter(None, (task.exam, task.split))): load_task(task, f"exam.tasks[{number}]", root, context)
        for number, task in enumerate(probe.tasks)
    }


def exam_probe(
    config: TrainConfig,
    exams: Mapping[str, Sequence[ExamItem]],
    tokenizer: Tokenizer,
    plain_model: Callable[[], Transformer],
    world: World,
) -> Callable[[], dict[str, float]]:
    """Return a function that lets the current model sit exams; the ranks share the questions."""
    probe = config.exam
    template = config.kind == "sft" or not probe.tasks

    def sit() -> dict[str, float]:
        model = plain_model()
        engine = InferenceEngine(model)
        sampling = greedy(probe.max_new_tokens)

        def score(shown: Sequence[ExamItem]) -> ScoredExam:
            has_options = all(item.options for item in shown)
            if probe.method == "generation" or (probe.method == "auto" and (template or not has_options)):
                reasoning = probe.reasoning
                return score_by_generation(engine, tokenizer, shown, sampling, reasoning=reasoning, template=template)
            form: Form = "letters" if probe.method == "letters" else "cloze"
            return score_by_likelihood(model, tokenizer, shown, form=form, template=template)

        return {f"eval/{name}_accuracy": shared_exam(score, items, world)[0] for name, items in exams.items()}

    return sit


def next_steps(config: TrainConfig, folder: RunFolder) -> str:
    """Return suggestions for the next steps after a finished run."""
    run = folder.root
    if config.trains == "indexers":
        return fmt.next_steps(run, [
            (f"osler report {run}", "the run as a page"),
            (f"osler {config.kind} RECIPE init_from={run}", "train all weights with sparse attention (trains=all)"),
        ])  # fmt: skip
    steps, types = [(f"osler report {run}", "the run as a page")], types_of(encode(config.data))
    if config.kind == "pretrain":
        steps += [
            (f'osler generate {run} --prompt "..."', "let it write"),
            (f"osler sft init_from={run}", "teach it to reason and answer"),
        ]
    elif types == {"clinic"}:
        steps += [(f"osler eval {run}", "sit the exam"), (f"osler grpo init_from={run}", "improve it by its own tries")]
    else:
        exam = "questions" if types == {"turns"} else "medqa"
        steps.append((f"osler eval {run} task={exam}:FILE", "sit an exam"))
    return fmt.next_steps(run, [*steps, (f"osler chat {run}", "talk to it")])


def check_start(config: TrainConfig, folder: RunFolder, start: store.Loaded | None) -> None:
    """Raise UserError when a start lacks something; ``start`` is the checkpoint to continue from."""
    setup.check_plan(config, is_new=start is None)
    for number, task in enumerate(config.exam.tasks):
        check_task(task, f"exam.tasks[{number}]", getattr(config.data, "root", ""))
    setup.check_distillation(config, start)
    check_data(config, folder, start)


JOB = Job(
    config_class=TrainConfig,
    default_name=lambda config: f"{'-'.join(config.sources) or Path(config.data.path).stem or 'own'}-{config.kind}",
    check=check_start,
    check_branch=setup.check_branch,
    check_processes=setup.check_processes,
    train=train,
    next_steps=next_steps,
    evaluate=evaluate_checkpoint,
)
