"""The options that several commands share, and the longer help texts. Nothing heavy is imported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from osler.runtime.errors import UserError

if TYPE_CHECKING:
    from osler.ops.sampling_params import SamplingParams

Option = tuple[tuple[str, ...], dict[str, Any]]


def option(*flags: str, **settings: Any) -> Option:
    """Return an option as ``ArgumentParser.add_argument`` takes it."""
    return flags, settings


OVERRIDES = option("items", nargs="*", metavar="key.path=value", help="fields to change")
RECIPE = option(
    "items",
    nargs="*",
    metavar="RECIPE | key.path=value",
    help="a recipe of `osler recipes` or a YAML file, and fields to change; without a recipe the defaults apply; "
    "`osler show RECIPE --explain` says what each field means",
)
RUN_FOLDER = (
    option("--run", "--run-dir", metavar="DIR", help="the run folder (default: below runs/); torchrun takes --run for its own"),
    option("--resume", action="store_true", help="go on from the newest good checkpoint of --run DIR"),
    option("--dry-run", action="store_true", help="check the configuration and say what would happen, then stop"),
)
ORIGIN = (
    option("--from-step", type=int, metavar="N", help="go back to the checkpoint of step N; what came after it is set aside"),
    option(
        "--branch",
        metavar="CHECKPOINT",
        help="start a new run, --run DIR, from a checkpoint of another: with its optimizer, place in the data and configuration",
    ),
)
CHECKPOINT = option("checkpoint", metavar="CHECKPOINT", help="a run folder, or a checkpoint in it")
RUN = option("run", metavar="DIR", help="a run folder")
SAMPLING = (
    option("--max-new-tokens", type=int, default=200, metavar="N", help="stop after so many tokens (default: 200)"),
    option("--temperature", type=float, default=0.7, metavar="T", help="0 always takes the likeliest (default: 0.7)"),
    option("--top-p", type=float, default=0.95, metavar="P", help="leave out the unlikely rest (default: 0.95)"),
    option("--seed", type=int, default=0, metavar="S", help="the same seed gives the same text (default: 0)"),
)

EVAL_HELP = """\
  osler eval runs/clinic-sft task.split=validation task.limit=100
  osler eval runs/mine task.type=medqa task.path=test.jsonl     (or medmcqa, pubmedqa, gsm8k)
  osler eval runs/mine text=notes/     (bits per byte; text that it was not trained on)

With neither task nor text a model is examined on what it was trained for. Other fields: method=likelihood (or generation,
both), permutations=4 (orders of the options), reasoning=false, max_new_tokens=, temperature=, which=best, device=cpu.
`osler show eval --explain` says what each means."""

WATCH_HELP = """\
  osler watch runs/mine --once | less     (also where no terminal is: a log, a cron job)

q or Ctrl-C leaves; the run goes on. A run that is finished or was stopped can be watched as well."""


def split_items(items: Sequence[str]) -> tuple[str | None, list[str]]:
    """Separate the recipe, if there is one, from the overrides: those have an equals sign."""
    recipes = [item for item in items if "=" not in item]
    if len(recipes) > 1:
        raise UserError(f"one recipe at a time, not {' and '.join(recipes)}; fields are changed with key.path=value.")
    return recipes[0] if recipes else None, [item for item in items if "=" in item]


def only_overrides(items: Sequence[str]) -> list[str]:
    """Return the overrides of a command that takes no recipe."""
    recipe, overrides = split_items(items)
    if recipe is not None:
        raise UserError(f"`{recipe}`: this command takes no recipe, only key.path=value.")
    return overrides


def run_folder(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of ``RUN_FOLDER`` as arguments of a ``run`` function."""
    return {"run_dir": arguments.run, "resume": arguments.resume, "dry_run": arguments.dry_run}


def sampling(arguments: argparse.Namespace) -> SamplingParams:
    """Return the options of ``SAMPLING``. Raises UserError for a number that is out of its range."""
    from osler.config.decode import decode
    from osler.ops.sampling_params import SamplingParams

    names = ("max_new_tokens", "temperature", "top_p", "seed")
    return decode(SamplingParams, {name: getattr(arguments, name) for name in names}, source="the command line")
