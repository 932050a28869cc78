"""The table of commands, and the function that each calls. Nothing heavy is imported before one of them runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from osler.cli.options import (
    CHECKPOINT,
    EVAL_HELP,
    ORIGIN,
    OVERRIDES,
    RECIPE,
    RUN,
    RUN_FOLDER,
    SAMPLING,
    WATCH_HELP,
    Option,
    only_overrides,
    option,
    run_folder,
    sampling,
    split_items,
)

if TYPE_CHECKING:
    from osler.runs.command import Request


SHORTER = """\
a shorter one, that learns less:
  osler quickstart pretrain.total_tokens=400000 sft.total_tokens=200000 grpo.steps=5 exam_items=50 --run runs/short
  osler show quickstart --explain     every field, and what it means"""


class Command(NamedTuple):
    """A command: its name, what it does in one line, an example, the function that runs it, its options, more for its help."""

    name: str
    line: str
    example: str
    run: Callable[[argparse.Namespace], int]
    options: tuple[Option, ...] = ()
    more: str = ""


# -- what each command calls ------------------------------------------------------------------------------------------------


def run_quickstart(arguments: argparse.Namespace) -> int:
    from osler.quickstart.run import run

    return run(only_overrides(arguments.items), **run_folder(arguments))


def run_recipes(_: argparse.Namespace) -> int:
    from osler.cli.show import list_recipes

    print(list_recipes())
    return 0


def run_show(arguments: argparse.Namespace) -> int:
    from osler.cli.show import show_recipe

    print(show_recipe(*split_items(arguments.items), explain=arguments.explain))
    return 0


def run_metrics(arguments: argparse.Namespace) -> int:
    from osler.monitor.metrics import table

    print(table(arguments.word))
    return 0


def run_tokenizer_train(arguments: argparse.Namespace) -> int:
    from osler.data.from_recipe import tokenizer_train

    return tokenizer_train(*split_items(arguments.items), arguments.out)


def run_tokenizer_inspect(arguments: argparse.Namespace) -> int:
    from osler.data.from_recipe import tokenizer_inspect

    return tokenizer_inspect(arguments.tokenizer, arguments.text)


def run_data_prepare(arguments: argparse.Namespace) -> int:
    from osler.data.from_recipe import data_prepare

    return data_prepare(*split_items(arguments.items), arguments.tokenizer, arguments.out)


def run_data_inspect(arguments: argparse.Namespace) -> int:
    from osler.data.from_recipe import data_inspect

    return data_inspect(arguments.folder, arguments.tokenizer)


def request(arguments: argparse.Namespace, kind: str) -> Request:
    """Return what a person asks of a command that trains."""
    from osler.runs.command import Request

    recipe, overrides = split_items(arguments.items)
    more = {"from_step": arguments.from_step, "branch": arguments.branch}
    return Request(kind=kind, recipe=recipe, overrides=overrides, **run_folder(arguments), **more)


def run_pretrain(arguments: argparse.Namespace) -> int:
    from osler.train.run import run

    return run(request(arguments, "pretrain"))


def run_sft(arguments: argparse.Namespace) -> int:
    from osler.train.run import run

    return run(request(arguments, "sft"))


def run_grpo(arguments: argparse.Namespace) -> int:
    from osler.rl.run import run

    return run(request(arguments, "grpo"))


def run_eval(arguments: argparse.Namespace) -> int:
    from osler.eval.run import run

    return run(arguments.checkpoint, only_overrides(arguments.items))


def run_generate(arguments: argparse.Namespace) -> int:
    from osler.inference.chat import generate

    return generate(arguments.checkpoint, arguments.prompt, sampling(arguments))


def run_chat(arguments: argparse.Namespace) -> int:
    from osler.inference.chat import chat

    return chat(arguments.checkpoint, sampling(arguments), reasoning=False if arguments.no_reasoning else None)


def run_checkpoint_list(arguments: argparse.Namespace) -> int:
    from osler.runs.checkpoints import list_checkpoints

    return list_checkpoints(arguments.run)


def run_checkpoint_verify(arguments: argparse.Namespace) -> int:
    from osler.runs.checkpoints import verify_checkpoints

    return verify_checkpoints(arguments.checkpoint)


def run_checkpoint_prune(arguments: argparse.Namespace) -> int:
    from osler.runs.checkpoints import prune_checkpoints

    kept = {name: getattr(arguments, name) for name in ("keep_last", "keep_best", "keep_milestones")}
    return prune_checkpoints(arguments.run, **kept, dry_run=arguments.dry_run)


def run_report(arguments: argparse.Namespace) -> int:
    from osler.report.page import build_report
    from osler.report.read import read_run
    from osler.report.words import summary_text

    run = read_run(arguments.run)
    print(summary_text(run, build_report(run, arguments.out)))
    return 0


def run_watch(arguments: argparse.Namespace) -> int:
    from osler.watch.screen import run

    return run(arguments.run, every_seconds=arguments.every, once=arguments.once)


def run_compare(arguments: argparse.Namespace) -> int:
    from osler.report.compare import build_comparison

    text, path = build_comparison(arguments.runs, arguments.out)
    print(f"{text}\n\n{path}")
    return 0


def run_bench(arguments: argparse.Namespace) -> int:
    from osler.bench.run import run

    given = {name: getattr(arguments, name) for name in ("rounds", "steps", "out")}
    return run(*split_items(arguments.items), peers=arguments.peer, **given)


def run_doctor(arguments: argparse.Namespace) -> int:
    from osler.doctor import run

    return run(as_json=arguments.json, folder=arguments.folder)


COMMANDS: tuple[Command, ...] = (
    Command(
        "quickstart",
        "Train, examine and report a small model on this machine, in minutes",
        "osler quickstart --run runs/first",
        run_quickstart,
        (OVERRIDES, *RUN_FOLDER),
        SHORTER,
    ),
    Command("recipes", "List the recipes: name, parameters, what it is", "osler recipes", run_recipes),
    Command(
        "show",
        "Print a recipe with every default filled in; --explain says what each field means",
        "osler show text-10min --explain",
        run_show,
        (RECIPE, option("--explain", action="store_true", help="say behind each field what it means")),
    ),
    Command(
        "metrics",
        "Show what every logged number means, its unit, and what it takes",
        "osler metrics grad",
        run_metrics,
        (option("word", nargs="?", default="", metavar="WORD", help="only metrics whose name or meaning has it"),),
    ),
    Command(
        "tokenizer train",
        "Train a tokenizer on a recipe's data, or on a file or folder of text",
        "osler tokenizer train notes/ tokenizer.vocab_size=8192 --out tokenizer.json",
        run_tokenizer_train,
        (RECIPE, option("--out", required=True, metavar="FILE", help="the tokenizer.json to write")),
    ),
    Command(
        "tokenizer inspect",
        "Show a tokenizer, and how it cuts a text",
        "osler tokenizer inspect tokenizer.json 'fever and a stiff neck'",
        run_tokenizer_inspect,
        (
            option("tokenizer", metavar="FILE", help="a tokenizer.json, GPT-2's vocab.bpe, or a folder with one"),
            option("text", nargs="?", metavar="TEXT", help="text to cut into tokens"),
        ),
    ),
    Command(
        "data prepare",
        "Tokenise a recipe's data, or a file or folder of text, into shards",
        "osler data prepare notes/ data.holdout_fraction=0.1 --tokenizer tokenizer.json --out shards/",
        run_data_prepare,
        (
            RECIPE,
            option("--tokenizer", required=True, metavar="FILE", help="the tokenizer to cut the text with"),
            option("--out", required=True, metavar="DIR", help="the folder to write, or to reuse if it is the same"),
        ),
        "`osler pretrain data.type=prepared data.path=shards/` trains on them, with the tokenizer that they were cut with.",
    ),
    Command(
        "data inspect",
        "Show what a folder of shards holds, and check every byte",
        "osler data inspect shards/ --tokenizer tokenizer.json",
        run_data_inspect,
        (
            option("folder", metavar="DIR", help="a folder that `osler data prepare` wrote"),
            option("--tokenizer", metavar="FILE", help="show how each split begins"),
        ),
    ),
    Command(
        "pretrain",
        "Train a model from scratch on text",
        "osler pretrain text-10min data.path=notes/ --run runs/notes",
        run_pretrain,
        (RECIPE, *RUN_FOLDER, *ORIGIN),
    ),
    Command(
        "sft",
        "Teach a pretrained model to reason and answer",
        "osler sft init_from=runs/clinic-pretrain data.type=turns data.path=cases.jsonl",
        run_sft,
        (RECIPE, *RUN_FOLDER, *ORIGIN),
    ),
    Command(
        "grpo",
        "Improve a model by its own tries at exam questions (reinforcement learning)",
        "osler grpo init_from=runs/clinic-sft algorithm.samples_per_prompt=16",
        run_grpo,
        (RECIPE, *RUN_FOLDER, *ORIGIN),
    ),
    Command(
        "eval",
        "Sit an exam with a model: the score and its confidence interval",
        "osler eval runs/clinic-sft",
        run_eval,
        (CHECKPOINT, OVERRIDES),
        EVAL_HELP,
    ),
    Command(
        "generate",
        "Let a model continue a text",
        "osler generate runs/clinic-pretrain --prompt 'A patient with fever'",
        run_generate,
        (CHECKPOINT, option("--prompt", required=True, metavar="TEXT", help="the text to continue"), *SAMPLING),
    ),
    Command(
        "chat",
        "Ask a model questions in the terminal",
        "osler chat runs/clinic-sft",
        run_chat,
        (
            CHECKPOINT,
            option("--no-reasoning", action="store_true", help="ask for the answer without the thinking before it"),
            *SAMPLING,
        ),
    ),
    Command(
        "report",
        "Write the report of a run, and print its summary",
        "osler report runs/quickstart",
        run_report,
        (RUN, option("--out", metavar="FILE", help="the page to write (default: report.html in the run folder)")),
    ),
    Command(
        "checkpoint list",
        "List the checkpoints of a run: step, tokens, size, which is the best",
        "osler checkpoint list runs/notes",
        run_checkpoint_list,
        (RUN,),
    ),
    Command(
        "checkpoint verify",
        "Check every byte of a run's checkpoints, or of one; exit code 1 when one is damaged",
        "osler checkpoint verify runs/notes",
        run_checkpoint_verify,
        (CHECKPOINT,),
    ),
    Command(
        "checkpoint prune",
        "Delete checkpoints, never the last good one",
        "osler checkpoint prune runs/notes --keep-last 1 --keep-best --dry-run",
        run_checkpoint_prune,
        (
            RUN,
            option("--keep-last", type=int, required=True, metavar="N", help="keep the last N that are good"),
            option("--keep-best", action="store_true", help="also keep the best"),
            option("--keep-milestones", action="store_true", help="also keep those of checkpoint.keep_every_tokens or _steps"),
            option("--dry-run", action="store_true", help="only say what would be deleted"),
        ),
    ),
    Command(
        "watch",
        "Show a run in the terminal while it runs: state, curves, newest values, events, checkpoints",
        "osler watch runs/mine",
        run_watch,
        (
            option("run", metavar="DIR", help="a run folder; of a quickstart the stage that is at work is shown"),
            option("--every", type=float, default=2.0, metavar="SECONDS", help="between two pictures (default: 2)"),
            option("--once", action="store_true", help="print one picture as plain text, and end"),
        ),
        WATCH_HELP,
    ),
    Command(
        "compare",
        "Compare runs: one HTML page, and a table in the terminal",
        "osler compare runs/mine runs/mine-lower-lr --out lower-lr.html",
        run_compare,
        (
            option("runs", nargs="+", metavar="DIR", help="two run folders or more"),
            option("--out", default="compare.html", metavar="FILE", help="the page to write (default: compare.html)"),
        ),
    ),
    Command(
        "bench",
        "Time a recipe's training step on this machine, alone or beside nanochat and Hugging Face",
        "osler bench pure-tiny seq_len=512 batch_tokens=4096 --peer hf --peer ../nanochat",
        run_bench,
        (
            RECIPE,
            option("--peer", action="append", default=[], metavar="PATH | hf", help="a checkout of nanochat, or hf for Qwen3"),
            option("--rounds", type=int, default=3, metavar="N", help="fresh processes for each, in turns (default: 3)"),
            option("--steps", type=int, default=12, metavar="N", help="timed steps in each (default: 12)"),
            option("--out", metavar="FILE", help="also write the JSON here"),
        ),
    ),
    Command(
        "doctor",
        "Find out what this machine can do",
        "osler doctor --json",
        run_doctor,
        (
            option("--json", action="store_true", help="print one JSON object instead of a table"),
            option("--folder", default=".", metavar="DIR", help="where runs will be written (default: here)"),
        ),
    ),
)
