"""From a recipe to a finished GRPO run folder: ``osler grpo``.

A run folder that already holds this run goes on from its newest good checkpoint; one that holds another run is
refused. The checkpoint brings model, reference, tokenizer and optimizer, so a moved run folder needs neither recipe
nor ``init_from``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict

from osler.checkpoint import store
from osler.checkpoint.folders import TENSORS_SUFFIX
from osler.inference.engine import InferenceEngine
from osler.inference.load import LoadedModel, load_model
from osler.model.config import ModelConfig
from osler.optim.build import build_optimizer
from osler.parallel.parallelize import check_strategy, parallelize
from osler.rl.config import GrpoConfig
from osler.rl.preflight import preflight
from osler.rl.prompts import RewardTerm, RlTask, task_shares
from osler.rl.rollout import RolloutWorker
from osler.rl.step import PolicyLoss
from osler.rl.trainer import GrpoTrainer
from osler.runs.command import Job, Request, carry_out
from osler.runs.folder import check_fingerprints, claim
from osler.runs.loop import Loop
from osler.runs.process import Learner, Run, agree_on_machine, place_of
from osler.runs.start import find_start, restored, warn_of_endless_warmup
from osler.runtime.device import pick_device
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder, fingerprint, write_or_warn
from osler.runtime.world import World
from osler.tasks.item import ExamItem, render_question, shared_questions
from osler.tasks.registry import check_task, load_task
from osler.tasks.rewards import REWARDS
from osler.tokenizer.chat import encode_prompt

logger = logging.getLogger(__name__)


def run(request: Request) -> int:
    """Run the command ``grpo``; return the exit code."""
    return carry_out(JOB, request)


def train(config: GrpoConfig, folder: RunFolder, world: World | None = None) -> bool:
    """Set up and train (or continue) one GRPO run in its folder. Return False when it was asked to stop before the end."""
    world = world or World(device=config.device)
    run = Run(folder, world)
    start = find_start(config, run, check_branch)
    check_exams(config)
    machine = agree_on_machine(
        world, start.checkpoint, precision=config.precision, compile_mode="never", steps=config.steps
    )
    loaded = load_model(start.checkpoint or config.init_from, device=machine.device, compute_dtype=machine.dtype)
    model, tokenizer = loaded.model.train(), loaded.tokenizer
    tasks = load_tasks(config, loaded)
    eval_items = load_task(config.eval_task) if config.eval_task is not None else []
    check_held_out(tasks, eval_items)
    sampler = InferenceEngine(model, max_rows=config.rollout_rows)
    worker = RolloutWorker(sampler, tokenizer, tasks, config.algorithm, config.seed, world)
    samples = ""
    if world.broadcast_from_first(lambda: start.checkpoint is None) and config.preflight != "off":
        samples = preflight(worker.ask(0), config)
    run.fingerprints = {"tokenizer": tokenizer.fingerprint, "data": fingerprint_of(tasks)}
    described = start.load(names=[])
    if described is not None and not config.allow_data_change:  # with it the change is recorded when the run goes on
        check_fingerprints(described, run.fingerprints)
    world.broadcast_from_first(lambda: claim(folder, config))
    if samples and world.is_first:
        write_or_warn(folder.samples, samples)  # a start over in the same folder replaces it
    run.describe(machine, model.config, tokenizer)
    engine = parallelize(model, config.parallel, world, recompute=config.recompute, loss_of=PolicyLoss)
    optimizer = build_optimizer(model, config.optim, process_group=world.group)
    learner = Learner(model, optimizer, engine, config.clip_norm)
    trainer = GrpoTrainer(config, run, learner, worker, eval_items)
    checkpoint = start.load()
    if checkpoint is not None:
        loop = restored(trainer, start, checkpoint)
    else:
        loop = Loop(trainer)
        if config.algorithm.prompts_per_step < world.size:  # one rank draws a whole group
            logger.warning(
                f"{world.size} processes share the {config.algorithm.prompts_per_step} questions of a step "
                "(algorithm.prompts_per_step), so some of them draw nothing and wait."
            )
        warn_of_endless_warmup(config.schedule.warmup_tokens, config.budget_tokens, "steps x completions x max_new_tokens =")
        logger.info(describe_start(config, loaded, tasks, place_of(machine, config.parallel, world)))
    del checkpoint  # weights and moments were copied out of it
    return loop.fit()


def check_branch(config: GrpoConfig, start: store.Loaded) -> None:
    """Raise UserError when a run with this config cannot go on from a checkpoint of another."""
    if start.step >= config.steps:
        raise UserError(f"{start.path} is at step {start.step:,}, and steps is {config.steps:,}: set steps higher.")
    if config.algorithm.beta > 0.0 and not (start.path / f"reference{TENSORS_SUFFIX}").is_file():
        raise UserError(
            f"algorithm.beta={config.algorithm.beta:g} needs the reference that the run began with, and {start.path} holds none, "
            f"because beta was 0 there: leave it at 0, or start a new run with init_from={start.path}."
        )


def check_start(config: GrpoConfig, folder: RunFolder, start: store.Loaded | None) -> None:
    """Raise UserError when the device or an exam is not there."""
    pick_device(config.device)
    check_exams(config)


def check_exams(config: GrpoConfig) -> None:
    """Raise UserError, naming the key, when the file of an exam to train on or to evaluate on is not there."""
    for number, entry in enumerate(config.tasks):
        check_task(entry.task, f"tasks[{number}].task")
    check_task(config.eval_task, "eval_task")


def load_tasks(config: GrpoConfig, start: LoadedModel) -> list[RlTask]:
    """Return the items and rewards to train on. Questions that do not fit into the model's context are left out and counted."""
    room = start.model.config.max_seq_len - config.algorithm.max_new_tokens
    tasks = []
    for entry in config.tasks:
        items = load_task(entry.task)
        # Another order of the options puts other letters at the seams between them, and a seam is worth a token at most.
        fitting = [
            item
            for item in items
            if len(encode_prompt(start.tokenizer, render_question(item), reasoning=entry.reasoning)) + len(item.options) <= room
        ]
        if not fitting:
            raise UserError(
                f"Task {entry.label}: none of its {len(items)} questions fits into the model's max_seq_len "
                f"{start.model.config.max_seq_len} beside {config.algorithm.max_new_tokens} new tokens; lower "
                "algorithm.max_new_tokens."
            )
        if len(fitting) < len(items):
            logger.warning(f"Task {entry.label}: {len(items) - len(fitting)} of {len(items)} questions are too long: left out.")
        terms = tuple(RewardTerm(name, REWARDS[name], weight) for name, weight in entry.rewards.items())
        tasks.append(RlTask(entry.label, tuple(fitting), terms, entry.weight, entry.reasoning))
    task_shares(tasks, config.algorithm.prompts_per_step)  # refuses weights that never come up before anything is trained
    return tasks


def check_held_out(tasks: Sequence[RlTask], eval_items: Sequence[ExamItem]) -> None:
    """Raise UserError when a question to train on is also one of the evaluation."""
    for task in tasks:
        shared = shared_questions(task.items, eval_items)
        if shared:
            trained, examined = shared[0]
            raise UserError(
                f"{len(shared):,} of {len(task.items):,} questions of task {task.name} are also in eval_task (the first is "
                f"{trained.id}, there {examined.id}): a score on questions that were trained on means nothing. Use another split "
                "for one of them, or take the questions out of the file to train on."
            )


def fingerprint_of(tasks: Sequence[RlTask]) -> str:
    """Return 16 hex digits that change with the questions, their answers and their order."""
    return fingerprint([[task.name, [asdict(item) for item in task.items]] for task in tasks])


def describe_start(config: GrpoConfig, start: LoadedModel, tasks: Sequence[RlTask], place: str) -> str:
    """Return one line about a run that begins."""
    algorithm = config.algorithm
    questions = ", ".join(f"{len(task.items):,} of {task.name}" for task in tasks)
    return (
        f"grpo: {start.model.config.num_parameters:,} parameters from {start.path}; questions: {questions}; "
        f"{config.steps:,} steps of {algorithm.prompts_per_step} x {algorithm.samples_per_prompt} completions; "
        f"{start.model.compute_dtype} on {place}."
    )


def planned_numbers(config: GrpoConfig, model: ModelConfig | None) -> dict[str, str]:
    """Return what follows from a config, for ``--dry-run``."""
    completions = config.steps * config.algorithm.completions_per_step
    return {
        "completions": f"{completions:,} of at most {config.algorithm.max_new_tokens} tokens",
        "optimizer steps": f"{config.steps * config.algorithm.updates_per_batch:,}",
    }


def next_steps(config: GrpoConfig, folder: RunFolder) -> str:
    """Return what a person can do with a finished run."""
    return f"Done: {folder.root}\n  osler eval {folder.root}   sit the exam\n  osler report {folder.root}   the run as a page"


JOB = Job(
    config_class=GrpoConfig,
    default_name=lambda config: "clinic-grpo",
    check=check_start,
    check_branch=check_branch,
    check_processes=lambda config, processes: check_strategy(config.parallel, processes),
    numbers=planned_numbers,
    train=train,
    next_steps=next_steps,
)
