"""The path that ``osler pretrain``, ``sft`` and ``grpo`` share, from the command line to a finished run folder.

A run folder that already holds this run continues from its newest good checkpoint; a folder with another run is refused.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

from osler.checkpoint import store
from osler.checkpoint.folders import refuse_checkpoint
from osler.config.recipe import as_comments, dump_yaml, load_recipe, override, run_name
from osler.config.schema import decode, encode, hints
from osler.inference.load import described_model, load_start, trained_seq_len_of
from osler.records.jsonl import EventLog
from osler.runs.config import RunConfig
from osler.runs.folder import refuse_another, stored_config, taken
from osler.runs.process import Run
from osler.runs.resume import branch_config, describe_branch, find_start, go_back
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder
from osler.runtime.stop import EXIT_STOPPED
from osler.runtime.world import World, joined

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of a command that trains."""

    kind: str  # the command
    recipe: str | None = None
    overrides: Sequence[str] = ()
    run_dir: str | None = None
    resume: bool = False
    dry_run: bool = False
    from_step: int | None = None
    eval_only: bool = False
    branch: str | None = None  # run folder or checkpoint of another run
    at_end: Callable[[RunFolder], None] = lambda folder: None  # called with the run's folder when its process ends well

    @property
    def back_to(self) -> int | None:
        """The step that the run goes back to; ``from_step`` means another thing for a branch and for --eval-only."""
        return self.from_step if self.branch is None and not self.eval_only else None


@dataclass(frozen=True, kw_only=True)
class Job:
    """A kind of training, as the command line knows it. The functions that check raise UserError."""

    config_class: type[RunConfig]
    default_name: Callable[[Any], str]  # the name of a run whose config has no recipe
    check: Callable[[Any, RunFolder, store.Loaded | None], None]  # checks a start, from the checkpoint if there is one
    check_branch: Callable[[Any, store.Loaded], None]  # checks that this config can continue from another run's checkpoint
    check_processes: Callable[[Any, int], None]  # checks that this number of processes can share the run
    train: Callable[[Any, RunFolder, World], bool]  # returns False when the run was asked to stop
    next_steps: Callable[[Any, RunFolder], str]  # says what to do with a finished run
    # measures the checkpoint of a step (None: the newest) and returns what to print
    evaluate: Callable[[Any, RunFolder, int | None, World], str] | None = None


def carry_out(job: Job, request: Request) -> int:
    """Train as a person asks, with --dry-run print the plan, or with --eval-only measure a checkpoint; return the exit code."""
    config = config_of(job.config_class, request)
    name = run_name(request.recipe, request.kind) if request.recipe else job.default_name(config)
    folder = RunFolder(Path(request.run_dir or Path("runs") / name))
    refuse_checkpoint(folder.root)
    has_origin = config.init_from is not None or config.branch_from is not None
    model_overrides = [given for given in request.overrides if given.startswith(("model.", "model="))]
    is_sparse = bool(model_overrides) and config.model.attention.type == "sparse"
    if has_origin and not all(is_sparse and given.startswith("model.attention") for given in model_overrides):
        logger.warning(
            "model.* changes nothing here but a sparse model.attention, because the model comes from the checkpoint that the run "
            "starts from. (context.max_seq_len=... makes its context longer.)"
        )
    if request.dry_run:
        print(describe_plan(job, config, folder, request.back_to))
        return 0
    if request.eval_only:
        assert job.evaluate is not None
        with joined(config.device) as world:
            scores = job.evaluate(config, folder, request.from_step, world)
            if world.is_first:
                print(scores)
        return 0
    with joined(config.device) as world:  # connected before the checks, so that an error of all ranks is printed once
        job.check_processes(config, world.size)
        with taken(folder, world, request.at_end):
            if request.back_to is not None:
                refuse_another(folder, config)
                world.broadcast_from_first(partial(go_back, folder, request.back_to))
            finished = job.train(config, folder, world)
    if finished:
        logger.info(job.next_steps(config, folder))
        return 0
    same = "The same command, or " if request.back_to is None else ""  # with --from-step the same command would go back again
    resume = f"`osler {request.kind} --run {folder.root} --resume`"
    logger.info(f"Stopped and saved. {same}{resume}{',' if same else ''} goes on from there.")
    return EXIT_STOPPED


def config_of(cls: type[RunConfig], request: Request) -> Any:
    """Return the config of a start: from a recipe, from single fields, or from a run that exists."""
    recipe, run_dir, overrides = request.recipe, request.run_dir, request.overrides
    if request.eval_only and (recipe is not None or request.branch is not None or run_dir is None):
        raise UserError("--eval-only measures a checkpoint of --run FOLDER as that run is configured; give no recipe or branch.")
    if request.branch is not None:
        if recipe is not None or request.resume:
            raise UserError(
                f"--branch takes the configuration of the run that it branches from: leave out {recipe or '--resume'}. Fields "
                "are changed with key.path=value; to go on with a branch that has begun give --run and --resume alone."
            )
        if run_dir is None:
            raise UserError("--branch needs --run NEW_FOLDER: the new run.")
        return branch_config(cls, request.kind, request.branch, request.from_step, overrides, RunFolder(Path(run_dir)))
    if request.from_step is not None and run_dir is None:
        raise UserError("--from-step needs --run FOLDER: the run to go back in.")
    if request.resume or request.eval_only or (request.from_step is not None and recipe is None):
        return stored_config(cls, run_dir, overrides)
    given = load_recipe(recipe, overrides) if recipe else override({}, overrides)
    kind = given.get("kind", request.kind)
    if kind not in get_args(hints(cast(Any, cls))["kind"]):
        raise UserError(f"{recipe or 'This configuration'} is for `osler {kind}`, not for `osler {request.kind}`.")
    return decode(cls, {**given, "kind": request.kind}, source=recipe or "")


def describe_plan(job: Job, config: Any, folder: RunFolder, back_to: int | None) -> str:
    """Return what ``--dry-run`` prints: the resolved config, and as comments what follows from it. Nothing is changed.

    If the run takes its model from a checkpoint, that model is printed in place of the section ``model``, and the section
    ``tokenizer`` is left out, because the run uses neither. Raises UserError for anything that keeps the run from starting.
    """
    run = Run(folder, World())
    run.events = EventLog(os.devnull)
    found = find_start(config, run, job.check_branch, back_to)
    start = loaded = found.load(names=[])
    if loaded is None and config.init_from is not None:
        start = load_start(config.init_from)
    has_origin = config.branch_from is not None or config.init_from is not None
    model = described_model(start) if start is not None and has_origin else None
    if model is not None and start is not None and loaded is None:
        model = config.model_from(model, trained_seq_len_of(start))
    if found.is_branch and loaded is not None:
        logger.info(describe_branch(config, loaded))
    job.check(config, folder, loaded)
    plan = encode(config)
    derived = {"run folder": str(folder.root)}
    if loaded is not None:
        derived["branches from" if found.is_branch else "goes on from"] = f"step {loaded.step:,}: {loaded.path}"
    elif start is not None:
        derived["starts from"] = f"{start.path}, its model and tokenizer"
    if model is not None:
        derived["model"] = (
            f"{model.num_parameters:,} parameters (num_layers {model.num_layers}, hidden_size {model.hidden_size}, "
            f"max_seq_len {model.max_seq_len})"
        )
        plan |= {"model": encode(model)} if "model" in plan else {}
        plan.pop("tokenizer", None)
    return "\n".join([dump_yaml(plan).rstrip(), *as_comments(derived | config.numbers(model))])
