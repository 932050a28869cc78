"""The verbs of the command line: their options, what each calls, one table. Nothing heavy is imported before one runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from osler.errors import UserError

Option = tuple[tuple[str, ...], dict[str, Any]]


class Verb(NamedTuple):
    """A command: what it does in one line, an example, the function that runs it, its options, and more for its help."""

    name: str
    line: str
    example: str
    run: Callable[[argparse.Namespace], int]
    options: tuple[Option, ...] = ()
    more: str = ""


# -- options -----------------------------------------------------------------------------------------------------------


def option(*flags: str, **settings: Any) -> Option:
    """Describe an option as ``ArgumentParser.add_argument`` takes it."""
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
CHECKPOINT = option("checkpoint", metavar="CHECKPOINT", help="a run folder, or a checkpoint in it")
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
    """Return the overrides of a verb that takes no recipe."""
    recipe, overrides = split_items(items)
    if recipe is not None:
        raise UserError(f"`{recipe}`: this verb takes no recipe, only key.path=value.")
    return overrides


def run_folder(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the options of ``RUN_FOLDER`` say, by the names that every ``run`` function takes."""
    return {"run_dir": arguments.run, "resume": arguments.resume, "dry_run": arguments.dry_run}


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the options of ``SAMPLING`` say."""
    return {name: getattr(arguments, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")}


# -- what each verb calls ----------------------------------------------------------------------------------------------


def run_quickstart(arguments: argparse.Namespace) -> int:
    from osler.quickstart.story import run

    return run(only_overrides(arguments.items), **run_folder(arguments))


def run_recipes(_: argparse.Namespace) -> int:
    from osler.show import list_recipes

    print(list_recipes())
    return 0


def run_show(arguments: argparse.Namespace) -> int:
    from osler.show import show_recipe

    print(show_recipe(*split_items(arguments.items), explain=arguments.explain))
    return 0


def run_metrics(arguments: argparse.Namespace) -> int:
    from osler.monitor.metrics import table

    print(table(arguments.word))
    return 0


def run_tokenizer_train(arguments: argparse.Namespace) -> int:
    from osler.data.verbs import tokenizer_train

    return tokenizer_train(*split_items(arguments.items), arguments.out)


def run_tokenizer_inspect(arguments: argparse.Namespace) -> int:
    from osler.data.verbs import tokenizer_inspect

    return tokenizer_inspect(arguments.tokenizer, arguments.text)


def run_data_prepare(arguments: argparse.Namespace) -> int:
    from osler.data.verbs import data_prepare

    return data_prepare(*split_items(arguments.items), arguments.tokenizer, arguments.out)


def run_data_inspect(arguments: argparse.Namespace) -> int:
    from osler.data.verbs import data_inspect

    return data_inspect(arguments.folder, arguments.tokenizer)


def run_pretrain(arguments: argparse.Namespace) -> int:
    from osler.train.run import run

    return run("pretrain", *split_items(arguments.items), **run_folder(arguments))


def run_sft(arguments: argparse.Namespace) -> int:
    from osler.train.run import run

    return run("sft", *split_items(arguments.items), **run_folder(arguments))


def run_grpo(arguments: argparse.Namespace) -> int:
    from osler.rl.run import run

    return run(*split_items(arguments.items), **run_folder(arguments))


def run_eval(arguments: argparse.Namespace) -> int:
    from osler.eval.run import run

    return run(arguments.checkpoint, only_overrides(arguments.items))


def run_generate(arguments: argparse.Namespace) -> int:
    from osler.inference.chat import generate

    return generate(arguments.checkpoint, arguments.prompt, **sampling(arguments))


def run_chat(arguments: argparse.Namespace) -> int:
    from osler.inference.chat import chat

    return chat(arguments.checkpoint, reasoning=False if arguments.no_reasoning else None, **sampling(arguments))


def run_report(arguments: argparse.Namespace) -> int:
    from osler.report.page import build_report
    from osler.report.text import summary_text

    path = build_report(arguments.run)
    print(f"{summary_text(arguments.run)}\n\n{path}")
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


VERBS: tuple[Verb, ...] = (
    Verb(
        "quickstart",
        "Train, examine and report a small model on this machine, in minutes",
        "osler quickstart --run runs/first",
        run_quickstart,
        (OVERRIDES, *RUN_FOLDER),
    ),
    Verb("recipes", "List the recipes: name, parameters, what it is", "osler recipes", run_recipes),
    Verb(
        "show",
        "Print a recipe with every default filled in; --explain says what each field means",
        "osler show text-10min --explain",
        run_show,
        (RECIPE, option("--explain", action="store_true", help="say behind each field what it means")),
    ),
    Verb(
        "metrics",
        "Show what every logged number means, its unit, and what it takes",
        "osler metrics grad",
        run_metrics,
        (option("word", nargs="?", default="", metavar="WORD", help="only metrics whose name or meaning has it"),),
    ),
    Verb(
        "tokenizer train",
        "Train a tokenizer on a recipe's data, or on a file or folder of text",
        "osler tokenizer train notes/ tokenizer.vocab_size=8192 --out tokenizer.json",
        run_tokenizer_train,
        (RECIPE, option("--out", required=True, metavar="FILE", help="the tokenizer.json to write")),
    ),
    Verb(
        "tokenizer inspect",
        "Show a tokenizer, and how it cuts a text",
        "osler tokenizer inspect tokenizer.json 'fever and a stiff neck'",
        run_tokenizer_inspect,
        (
            option("tokenizer", metavar="FILE", help="a tokenizer.json, GPT-2's vocab.bpe, or a folder with one"),
            option("text", nargs="?", metavar="TEXT", help="text to cut into tokens"),
        ),
    ),
    Verb(
        "data prepare",
        "Tokenise a recipe's data, or a file or folder of text, into shards",
        "osler data prepare notes/ data.holdout_fraction=0.1 --tokenizer tokenizer.json --out shards/",
        run_data_prepare,
        (
            RECIPE,
            option("--tokenizer", required=True, metavar="FILE", help="the tokenizer to cut the text with"),
            option("--out", required=True, metavar="DIR", help="the folder to write, or to reuse if it is the same"),
        ),
    ),
    Verb(
        "data inspect",
        "Show what a folder of shards holds, and check every byte",
        "osler data inspect shards/ --tokenizer tokenizer.json",
        run_data_inspect,
        (
            option("folder", metavar="DIR", help="a folder that `osler data prepare` wrote"),
            option("--tokenizer", metavar="FILE", help="show how each split begins"),
        ),
    ),
    Verb(
        "pretrain",
        "Train a model from scratch on text",
        "osler pretrain text-10min data.path=notes/ --run runs/notes",
        run_pretrain,
        (RECIPE, *RUN_FOLDER),
    ),
    Verb(
        "sft",
        "Teach a pretrained model to reason and answer",
        "osler sft init_from=runs/clinic-pretrain data.type=turns data.path=cases.jsonl",
        run_sft,
        (RECIPE, *RUN_FOLDER),
    ),
    Verb(
        "grpo",
        "Improve a model by its own tries at exam questions (reinforcement learning)",
        "osler grpo init_from=runs/clinic-sft algorithm.samples_per_prompt=16",
        run_grpo,
        (RECIPE, *RUN_FOLDER),
    ),
    Verb(
        "eval",
        "Sit an exam with a model: the score and its confidence interval",
        "osler eval runs/clinic-sft",
        run_eval,
        (CHECKPOINT, OVERRIDES),
        EVAL_HELP,
    ),
    Verb(
        "generate",
        "Let a model continue a text",
        "osler generate runs/clinic-pretrain --prompt 'A patient with fever'",
        run_generate,
        (CHECKPOINT, option("--prompt", required=True, metavar="TEXT", help="the text to continue"), *SAMPLING),
    ),
    Verb(
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
    Verb(
        "report",
        "Write the report of a run, and print its summary",
        "osler report runs/quickstart",
        run_report,
        (option("run", metavar="DIR", help="a run folder"),),
    ),
    Verb(
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
    Verb(
        "compare",
        "Lay runs over one another: one HTML page, and a table in the terminal",
        "osler compare runs/mine runs/mine-lower-lr --out lower-lr.html",
        run_compare,
        (
            option("runs", nargs="+", metavar="DIR", help="two run folders or more"),
            option("--out", default="compare.html", metavar="FILE", help="the page to write (default: compare.html)"),
        ),
    ),
    Verb(
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
    Verb(
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
