"""``osler grpo``: from a recipe to a finished run folder. ``runs/command.py`` does what all kinds of training share.

A checkpoint holds model, reference, tokenizer and optimizer, so a moved run folder needs neither recipe nor ``init_from``.

A new run begins with a preflight: before the first step the policy answers that step's questions, at the run's own sampling
settings. If a model never saw the template, it earns nothing and every advantage is zero. The run would end without an error and
without having learned. So such a model is refused before the run takes its folder. Random numbers belong to (seed, row,
position), so the first step draws the same completions again, and a run is the same with and without its preflight.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import zip_longest
from typing import Any

from osler.checkpoint import store
from osler.checkpoint.folders import TENSORS_SUFFIX
from osler.data.exams import ExamsInData
from osler.data.named import check_task, load_task
from osler.eval.exams import grade
from osler.inference.engine import InferenceEngine
from osler.inference.load import LoadedModel, load_model, load_start
from osler.optim.build import build_optimizer
from osler.parallel.parallelize import check_strategy, parallelize
from osler.records import jsonl
from osler.rl.config import GrpoConfig, ServerRollout
from osler.rl.rollout import Group, RewardTerm, RlTask, RolloutWorker, Sample, rollout_metrics, task_shares
from osler.rl.servers import RolloutServers
from osler.rl.step import PolicyLoss
from osler.rl.trainer import GrpoTrainer
from osler.runs.command import Job, Request, carry_out
from osler.runs.folder import check_fingerprints, claim
from osler.runs.loop import Loop
from osler.runs.process import Learner, Run, agree_on_machine, place_of
from osler.runs.resume import find_start, resume, warn_of_endless_warmup
from osler.runtime import format as fmt
from osler.runtime.device import pick_device
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder, fingerprint, write_or_warn
from osler.runtime.world import World
from osler.tasks.item import ExamItem, render_answer, render_question, shared_questions
from osler.tasks.rewards import check_reward, label_of, reward_of
from osler.tokenizer.bpe import ANSWER
from osler.tokenizer.chat import encode_prompt

logger = logging.getLogger(__name__)

SELDOM = ("cluster", "aliases", "tests", "is_story", "shots")  # fields that enter the fingerprint only for items that have them
SAMPLES_SHOWN = 4  # completions that the preflight shows
MOST_CUT = 0.9  # with a larger share of cut completions, the model is taken not to end by itself


def run(request: Request) -> int:
    """Run the command ``grpo``; return the exit code."""
    return carry_out(JOB, request)


def train(config: GrpoConfig, folder: RunFolder, world: World | None = None) -> bool:
    """Set up and train (or continue) one GRPO run in its folder. Return False when it was asked to stop before the end."""
    world = world or World(device=config.device)
    run = Run(folder, world)
    start = find_start(config, run, check_branch)
    check_start(config)
    machine = agree_on_machine(world, start.checkpoint, precision=config.precision, compile_mode="never", steps=config.steps)
    loaded = load_model(start.checkpoint or load_start(config.init_from).path, device=machine.device, compute_dtype=machine.dtype)
    model, tokenizer = loaded.model.train(), loaded.tokenizer
    tasks = load_tasks(config, loaded)
    eval_items = load_exam(config, loaded)
    check_held_out(tasks, eval_items)
    sampler = InferenceEngine(model, max_rows=config.rollout_rows)
    servers = None
    if isinstance(config.rollout, ServerRollout):
        servers = RolloutServers(config.rollout, sampler, folder.root, world)
    worker = RolloutWorker(sampler, tokenizer, tasks, config.algorithm, config.seed, world, servers=servers)
    sample_lines = ""
    if world.broadcast_from_first(lambda: start.checkpoint is None) and config.preflight != "off":
        sample_lines = preflight(worker.ask(0), config)
    run.fingerprints = {"tokenizer": tokenizer.fingerprint, "data": fingerprint_of(tasks)}
    described = start.load(names=[])
    if described is not None and not config.allow_data_change:  # if allowed, the resumed run records the change
        check_fingerprints(described, run.fingerprints)
    world.broadcast_from_first(lambda: claim(folder, config))
    if sample_lines and world.is_first:
        write_or_warn(folder.samples, sample_lines)  # a new start in the same folder replaces the file
    trained_on = frozenset(item.id for task in tasks for item in task.items)
    exams = ExamsInData.from_files(loaded.files)
    run.describe(machine, model.config, tokenizer)
    run.files = {**run.files, **replace(exams, found=exams.found | trained_on).as_files()}
    engine = parallelize(model, config.parallel, world, recompute=config.recompute, loss_of=PolicyLoss)
    optimizer = build_optimizer(model, config.optim, process_group=world.group)
    learner = Learner(model, optimizer, engine, config.clip_norm)
    trainer = GrpoTrainer(config, run, learner, worker, eval_items)
    checkpoint = start.load()
    if checkpoint is not None:
        loop = resume(trainer, start, checkpoint)
    else:
        loop = Loop(trainer)
        warn_of_endless_warmup(config.schedule, config.budget_tokens, "steps x completions x max_new_tokens =")
        algorithm = config.algorithm
        questions = ", ".join(f"{len(task.items):,} of {task.name}" for task in tasks)
        logger.info(
            f"grpo: {model.config.num_parameters:,} parameters from {loaded.path}; questions: {questions}; "
            f"{config.steps:,} steps of {algorithm.prompts_per_step} x {algorithm.samples_per_prompt} completions; "
            f"{model.compute_dtype} on {place_of(machine, config.parallel, world)}."
        )
    del checkpoint  # weights and moments were copied out of it
    return loop.fit()


def check_branch(config: GrpoConfig, start: store.Loaded) -> None:
    """Raise UserError when a run with this config cannot continue from a checkpoint of another run."""
    if start.step >= config.steps:
        raise UserError(f"{start.path} is at step {start.step:,}, and steps is {config.steps:,}: set steps higher.")
    if config.algorithm.beta > 0.0 and not (start.path / f"reference{TENSORS_SUFFIX}").is_file():
        raise UserError(
            f"algorithm.beta={config.algorithm.beta:g} needs the reference that the run began with, and {start.path} holds none, "
            f"because beta was 0 there: leave it at 0, or start a new run with init_from={start.path}."
        )


def check_start(config: GrpoConfig, folder: RunFolder | None = None, start: store.Loaded | None = None) -> None:
    """Raise UserError when the device, a reward or the file of an exam is missing; the file is named with its key."""
    pick_device(config.device)
    for number, entry in enumerate(config.tasks):
        check_task(entry.task, f"tasks[{number}].task")
        for name in entry.rewards:
            check_reward(name)
    check_task(config.eval_task, "eval_task")


def load_exam(config: GrpoConfig, start: LoadedModel) -> list[ExamItem]:
    """Return the items of the exam that the run sits, if any."""
    context = start.context(config.algorithm.max_new_tokens)
    return [] if config.eval_task is None else load_task(config.eval_task, "eval_task", context=context)


def load_tasks(config: GrpoConfig, start: LoadedModel) -> list[RlTask]:
    """Return the items and rewards to train on. Questions that do not fit into the model's context are left out and counted."""
    room = start.model.config.max_seq_len - config.algorithm.max_new_tokens
    context = start.context(config.algorithm.max_new_tokens)
    tasks = []
    for number, entry in enumerate(config.tasks):
        items = load_task(entry.task, f"tasks[{number}].task", context=context)
        # When options change their order, other letters meet at their borders, where a token more may be needed for each option.
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
            first = next(item.id for item, kept in zip_longest(items, fitting) if item is not kept)
            what = f"{len(items) - len(fitting)} of {len(items)} questions are too long, the first is {first}"
            logger.warning(f"Task {entry.label}: {what}. They are left out.")
        functions = {name: reward_of(name, entry.reward_seconds) for name in entry.rewards}
        terms = tuple(RewardTerm(label_of(name), functions[name], weight) for name, weight in entry.rewards.items())
        tasks.append(RlTask(entry.label, tuple(fitting), terms, entry.weight, entry.reasoning))
    task_shares(tasks, config.algorithm.prompts_per_step)  # raises UserError for a task whose weight gets no question
    return tasks


def check_held_out(tasks: Sequence[RlTask], eval_items: Sequence[ExamItem]) -> None:
    """Raise UserError when a question to train on is also in the evaluation."""
    for task in tasks:
        shared = shared_questions(task.items, eval_items)
        if shared:
            trained, examined = shared[0]
            raise UserError(
                f"{len(shared):,} of {len(task.items):,} questions of task {task.name} are also in eval_task (the first is "
                f"{trained.id}, there {examined.id}), whose score would mean nothing: use another split for one of them, or take "
                "these questions out of the file."
            )


def fingerprint_of(tasks: Sequence[RlTask]) -> str:
    """Return 16 hex digits that change with the questions, their answers and their order."""

    def content(item: ExamItem) -> dict[str, Any]:
        return {name: value for name, value in asdict(item).items() if value or name not in SELDOM}

    return fingerprint([[task.name, [content(item) for item in task.items]] for task in tasks])


def next_steps(config: GrpoConfig, folder: RunFolder) -> str:
    """Return suggestions for the next steps after a finished run."""
    run = folder.root
    return fmt.next_steps(run, [(f"osler eval {run}", "sit the exam"), (f"osler report {run}", "the run as a page")])


def preflight(groups: Sequence[Group], config: GrpoConfig) -> str:
    """Show the answers to the first step's questions and refuse a hopeless start. Return the lines of the samples file.

    If no completion earned a reward, and none keeps to the template with an answer that can be read, ``preflight=refuse`` raises
    UserError on every rank, and ``preflight=warn`` warns. (A model that draws at random sometimes hits a marker and a letter, but
    hardly ever the whole template.)
    """
    shown = [(group, group.samples[0]) for group in groups[:SAMPLES_SHOWN]]
    shown += [(groups[0], sample) for sample in groups[0].samples[1 : 1 + SAMPLES_SHOWN - len(shown)]]
    for number, (group, sample) in enumerate(shown, start=1):
        logger.info(f"Sample {number} before training: {render_question(group.prompt.item)}")
        logger.info(f"  thinking: {sample.completion.thinking or '(none)'}")
        logger.info(f"  answer:   {sample.completion.answer or '(none)'}")
        logger.info(f"  right:    {render_answer(group.prompt.item)}   (reward {sample.reward:g})")
    samples = [sample for group in groups for sample in group.samples]
    count = len(samples)
    found = rollout_metrics(groups)
    solved = sum(any(sample.reading.right for sample in group.samples) for group in groups)
    logger.info(
        f"Before training: pass@1 {found['answer/correct_frac']:.3f}, pass@{len(groups[0].samples)} {solved / len(groups):.3f} "
        f"over {len(groups)} questions; {found['answer/format_ok']:.0%} of the answers can be read, "
        f"{found['completions/clipped_ratio']:.0%} of the completions were cut; {found['groups/effective']:.0f} of {len(groups)} "
        "groups teach something."
    )
    if all(sample.reward <= 0.0 for sample in samples):
        if any(sample.completion.well_formed and sample.reading.readable for sample in samples):
            logger.warning(
                f"none of the {count} completions before training earned a reward, although some keep to the template: take "
                "easier questions, more algorithm.samples_per_prompt, or train the model longer on examples first."
            )
        elif config.preflight == "refuse":
            raise UserError(refusal(samples, config))
        else:
            logger.warning(refusal(samples, config))
    elif not found["groups/effective"]:
        cause = (
            "all of them are right: take harder questions"
            if found["answer/correct_frac"] == 1.0
            else "the samples of each question are alike: take more algorithm.samples_per_prompt, or other questions"
        )
        logger.warning(
            f"no question has samples with different rewards before training, so GRPO learns nothing from them; {cause}, or let "
            "algorithm.dynamic_sampling=true look for others."
        )
    results = (grade(group.prompt.item, sample.completion) for group, sample in shown)
    return "".join(jsonl.to_line(asdict(result.sample("grpo step 0"))) for result in results)


def refusal(samples: Sequence[Sample], config: GrpoConfig) -> str:
    """Return why GRPO learns nothing when no completion earned a reward or kept to the template, and what to do."""
    count = len(samples)
    limit = config.algorithm.max_new_tokens
    cut = sum(not sample.completion.finished for sample in samples)
    answered = sum(sample.completion.answer is not None for sample in samples)
    if cut > MOST_CUT * count:
        cause = f"The model never ends: either it was not taught to, or algorithm.max_new_tokens={limit} is too small for it."
    elif answered < (1 - MOST_CUT) * count:
        cause = f"The model does not write the template, in which {ANSWER} stands between reasoning and answer: it never saw it."
    else:
        cause = "The model ends and writes the template, but its answers name no option, or no number where one is asked for."
    start = config.init_from
    return (
        f"GRPO would learn nothing from {start}: of {count} completions before training none earned a reward or kept to the "
        f"template with an answer that can be read; {cut} were cut at {limit} tokens, {answered} have an {ANSWER}. {cause} Teach "
        f"it the format first, with `osler sft usmle-2day/format init_from={start} --run NEW_FOLDER` (or, for a model that reads "
        f"fewer than 1,024 tokens, `osler sft init_from={start} --run NEW_FOLDER`), and start from there with "
        "init_from=NEW_FOLDER. To start all the same: preflight=warn."
    )


JOB = Job(
    config_class=GrpoConfig,
    default_name=lambda config: "clinic-grpo",
    check=check_start,
    check_branch=check_branch,
    check_processes=lambda config, processes: check_strategy(config.parallel, processes),
    train=train,
    next_steps=next_steps,
)
