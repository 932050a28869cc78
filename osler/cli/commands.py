"""The table of commands: what each calls and which options it takes."""

from __future__ import annotations

from osler.cli.command import Command, option
from osler.cli.options import (
    CHECKPOINT,
    EVAL_ONLY,
    EXPORTED,
    ORIGIN,
    OVERRIDES,
    RECIPE,
    RUN,
    RUN_FOLDER,
    SAMPLING,
    SERVER,
    TOKENIZER,
)

EVAL_HELP = """\
  osler eval runs/mine task=medqa:test.jsonl     (or medmcqa, pubmedqa, gsm8k; task.type=medqa task.path=test.jsonl is the same)
  osler eval runs/mine task=medqa:test.jsonl,gsm8k:test.parquet,clinic subset=200     (200 random questions of each)
  osler eval runs/mine --needle task.lengths=[512,2048] task.limit=50     (a needle in a haystack, by length and depth)
  osler eval runs/mine --harness "--tasks hellaswag --limit 100"     (lm-evaluation-harness asks; `--harness --help`)
  osler eval runs/mine text=notes/     (bits per byte; text that it was not trained on)

With neither task nor text a model is examined on what it was trained for. Other fields are method=likelihood, permutations=4
(orders of the options), samples=8 temperature=0.7 (pass@k, majority vote) and more: `osler show eval --explain` has them all.

After an interruption the same command goes on, if checkpoint, questions and settings are the same. `osler report` shows answers,
the wrong ones first, and `osler compare` tests two models question by question."""

DISTILL_HELP = """\
  osler sft init_from=runs/small data.type=turns data.path=rows.jsonl data.thinking_field=thinking     (learns them)

It draws samples=8 answers to each question and keeps those that an exam counts as right, each reasoning once and keep=2 of a
question at most. After an interruption the same command goes on. `osler show distill --explain` says what each field means.

A model may also learn from a teacher's probabilities, as a run like any other, if both have the same tokenizer:
  osler sft init_from=runs/small teacher.path=runs/quickstart/sft     (or osler pretrain; teacher.weight, teacher.temperature)"""

EXPORT_HELP = """\
--to         what                                                                    --dtype
hf           a folder as Hugging Face's Qwen3, with a model card                     fp32, bf16
gguf         one file for llama.cpp                                                  f16, f32, bf16, q8_0, q4_0
onnx         a folder for ONNX Runtime, with a KV cache                              fp32, int8, int4
safetensors  one file: the model as it is, config and tokenizer in its metadata      fp32, bf16"""

QUANTIZE_HELP = """\
  osler eval runs/sft-int8 && osler eval runs/quickstart/sft && osler compare runs/quickstart/sft runs/sft-int8

Weights are rounded; where the model runs they are in full again, so the file is smaller and nothing is faster. What is
quantised cannot be trained: train first. bf16 can."""

PRUNE_HELP = """\
  osler prune runs/notes --intermediate-size 256 --data more-notes/ --out runs/notes-256     (both may be given)

A pruned model has forgotten something. It trains like any other, and the command that heals it is printed at the end."""

WATCH_HELP = """\
  osler watch runs/mine --once | less     (also where no terminal is: a log, a cron job)

Ctrl-C leaves; the run goes on. A run that is finished or was stopped can be watched as well."""

SERVE_HELP = """\
  osler serve runs/quickstart/grpo before=runs/quickstart/sft --port 9000     (several; a request chooses by name)
  curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
       -d '{"messages": [{"role": "user", "content": "A girl aged 17 has deep breathing, intense thirst and dry tongue. \
What is the best test? blood ketones (A) serum TSH (B) spirometry (C) IGF-1 level (D)"}]}'

It needs the extra `serve`. SIGTERM or Ctrl-C: no new requests, and those that run have --drain-seconds to end."""

TOKENIZER_HELP = """\
  osler tokenizer train notes/ --type superbpe tokenizer.vocab_size=32768 --out tokenizer.json     (tokens of up to four words)"""

SHORTER = """\
a shorter one, that learns less:
  osler quickstart pretrain.total_tokens=400000 sft.total_tokens=200000 grpo.steps=5 exam.task.limit=50 --run runs/short
  osler show quickstart --explain     every field, and what it means"""

COMMANDS: tuple[Command, ...] = (
    Command(
        "quickstart",
        "Train, examine and report a small model on this machine, in minutes",
        "osler quickstart --run runs/first",
        "osler.pipeline.run:quickstart",
        (OVERRIDES, *RUN_FOLDER),
        SHORTER,
    ),
    Command(
        "pipeline",
        "Carry out stages, each started from an earlier one, such as training, GRPO and an exam",
        "osler pipeline textbooks/medqa root=shared/data --run runs/medqa",
        "osler.pipeline.run:run",
        (RECIPE, *RUN_FOLDER),
        "Finished stages are skipped. --dry-run lists the stages, and checks what a later one needs, such as its files.",
    ),
    Command("recipes", "List the recipes: name, parameters, what it is", "osler recipes", "osler.cli.show:list_recipes"),
    Command(
        "show",
        "Print a recipe with every default filled in; --explain says what each field means",
        "osler show text-10min --explain",
        "osler.cli.show:show_recipe",
        (RECIPE, option("--explain", action="store_true", help="say behind each field what it means")),
    ),
    Command(
        "metrics",
        "Show what every logged number means, its unit, and what it takes",
        "osler metrics grad",
        "osler.monitor.metrics:table",
        (option("word", nargs="?", default="", metavar="WORD", help="only metrics whose name or meaning has it"),),
    ),
    Command(
        "tokenizer train",
        "Train a tokenizer on a recipe's data, or on a file or folder of text",
        "osler tokenizer train notes/ tokenizer.vocab_size=8192 --out tokenizer.json",
        "osler.data.from_recipe:tokenizer_train",
        (
            RECIPE,
            option("--type", choices=("bpe", "superbpe"), help="tokenizer.type; nothing else of the recipe's tokenizer changes"),
            option("--out", required=True, metavar="FILE", help="the tokenizer.json to write"),
        ),
        TOKENIZER_HELP,
    ),
    Command(
        "tokenizer inspect",
        "Show a tokenizer, and how it cuts a text",
        "osler tokenizer inspect tokenizer.json 'fever and a stiff neck'",
        "osler.data.from_recipe:tokenizer_inspect",
        (
            option("path", metavar="FILE", help=TOKENIZER),
            option("text", nargs="?", metavar="TEXT", help="text to cut into tokens"),
        ),
    ),
    Command(
        "tokenizer compare",
        "Compare tokenizers over texts: how many bytes of a text a token stands for",
        "osler tokenizer compare bpe.json superbpe.json --text notes/ book.txt",
        "osler.data.from_recipe:tokenizer_compare",
        (
            option("paths", nargs="+", metavar="TOKENIZER", help=TOKENIZER),
            option("--text", dest="texts", nargs="+", required=True, metavar="PATH", help="a file or folder of text"),
            option("--field", default="text", metavar="NAME", help="the column of text in tables (default: text)"),
        ),
        "Use text that no tokenizer was trained on. Models with different tokenizers are compared by bits per byte.",
    ),
    Command(
        "data prepare",
        "Tokenise a recipe's data, or a file or folder of text, into shards",
        "osler data prepare notes/ data.holdout_fraction=0.1 tokenizer.path=tokenizer.json --out shards/notes",
        "osler.data.from_recipe:data_prepare",
        (
            RECIPE,
            option("--out", metavar="DIR", help="the folder to write, to go on with, or to reuse (default: shards/RECIPE)"),
            option("--workers", dest="processes", type=int, metavar="N", help="processes (default: one for each core; 0: none)"),
        ),
        "Ctrl-C or a kill loses nothing: the same command goes on. `osler pretrain data.type=prepared data.path=shards/notes`\n"
        "trains on the shards, with the tokenizer that they were cut with; tokenizer.path=FILE chooses one, else it is trained.",
    ),
    Command(
        "data sources",
        "List the sources that Osler knows by name: size, licence, fields",
        "osler data sources",
        "osler.data.from_recipe:data_sources",
    ),
    Command(
        "data peek",
        "Show the first rows of a source or of a recipe's data, as documents and as tokens",
        "osler data peek medqa data.path=train.jsonl --tokenizer tokenizer.json",
        "osler.data.from_recipe:data_peek",
        (
            RECIPE,
            option("--tokenizer", dest="tokenizer_path", metavar="FILE", help="show the documents as its tokens too"),
            option("--documents", type=int, default=3, metavar="N", help="of each source (default: 3)"),
        ),
    ),
    Command(
        "data inspect",
        "Show what a folder of shards holds, and check every byte",
        "osler data inspect shards/ --tokenizer tokenizer.json",
        "osler.data.from_recipe:data_inspect",
        (
            option("folder", metavar="DIR", help="a folder that `osler data prepare` wrote"),
            option("--tokenizer", dest="tokenizer_path", metavar="FILE", help="show how each split begins"),
        ),
    ),
    Command(
        "pretrain",
        "Train a model from scratch on text",
        "osler pretrain text-10min data.path=notes/ --run runs/notes",
        "osler.train.run:run",
        (RECIPE, *RUN_FOLDER, *ORIGIN, EVAL_ONLY),
    ),
    Command(
        "sft",
        "Teach a pretrained model to reason and answer",
        "osler sft init_from=runs/notes data.type=turns data.path=cases.jsonl",
        "osler.train.run:run",
        (RECIPE, *RUN_FOLDER, *ORIGIN, EVAL_ONLY),
    ),
    Command(
        "grpo",
        "Improve a model by its own tries at exam questions (reinforcement learning)",
        "osler grpo init_from=runs/quickstart/sft algorithm.samples_per_prompt=16",
        "osler.rl.run:run",
        (RECIPE, *RUN_FOLDER, *ORIGIN),
    ),
    Command(
        "export",
        "Write a model for other programs: transformers, vLLM, llama.cpp, ONNX Runtime",
        "osler export runs/quickstart/grpo --to hf --out clinic-hf",
        "osler.export.run:run",
        (
            CHECKPOINT,
            option("--to", choices=("hf", "gguf", "onnx", "safetensors"), required=True, help="the form to write"),
            EXPORTED,
            option("--dtype", metavar="TYPE", help="the type of the weights; see below (default: the first, bf16 of bf16)"),
            option("--max-tokens", type=int, metavar="N", help="the context to write; sparse: top_k at most"),
        ),
        EXPORT_HELP,
    ),
    Command(
        "import",
        "Make a run folder of a published Qwen3 model, to start from",
        "osler import Qwen3-0.6B-Base --run runs/qwen",
        "osler.export.importing:run",
        (
            option("folder", metavar="HF_FOLDER", help="config.json, model.safetensors (one or several) and tokenizer.json"),
            option("--run", "--run-dir", dest="run_dir", required=True, metavar="DIR", help="the run folder to make, a new one"),
        ),
        "`osler eval`, `generate`, `chat`, and `osler sft`, `pretrain` and `grpo` with init_from=DIR take it like any other run.",
    ),
    Command(
        "verl",
        "Write model, questions, reward and options from which verl runs a recipe's GRPO",
        "osler verl init_from=runs/quickstart/sft steps=200 --out clinic-verl",
        "osler.rl.verl:write",
        (RECIPE, EXPORTED),
    ),
    Command(
        "quantize",
        "Write a checkpoint with smaller weights, which is used like the original",
        "osler quantize runs/quickstart/sft --to int8 --out runs/sft-int8",
        "osler.export.quantize:quantize",
        (
            CHECKPOINT,
            option("--to", required=True, choices=("int8", "int4", "bf16"), help="about 1/4, 1/7 and 1/2 of fp32's bytes"),
            option("--group-size", type=int, choices=(32, 64, 128), default=32, help="columns that share a scale (default: 32)"),
            EXPORTED,
        ),
        QUANTIZE_HELP,
    ),
    Command(
        "prune",
        "Write a smaller dense model: without its least useful layers, or with fewer neurons in every feed-forward layer",
        "osler prune runs/quickstart/sft --layers 3 --out runs/sft-3",
        "osler.export.prune:prune",
        (
            CHECKPOINT,
            option("--layers", type=int, metavar="N", help="this many layers stay"),
            option("--intermediate-size", type=int, metavar="M", help="this many neurons of a feed-forward layer stay"),
            option("--data", metavar="PATH", help="text that decides, or shards (default: what the run holds out)"),
            option("--field", default="text", metavar="NAME", help="the column of text in tables (default: text)"),
            option("--tokens", type=int, default=65_536, metavar="N", help="of the text, so many tokens (default: 65536)"),
            EXPORTED,
        ),
        PRUNE_HELP,
    ),
    Command(
        "eval",
        "Sit exams with a model: scores and their confidence intervals",
        "osler eval runs/quickstart/sft",
        "osler.eval.run:run",
        (
            CHECKPOINT,
            OVERRIDES,
            option("--json", dest="json_file", metavar="FILE", help="also write the scores as JSON"),
            option("--harness", metavar="OPTIONS", help="let lm-evaluation-harness ask instead, with these options of its own"),
            option("--needle", action="store_true", help="find a needle in long histories: short for task.type=needle"),
        ),
        EVAL_HELP,
    ),
    Command(
        "distill",
        "Write a teacher's right answers to questions as examples for a smaller model",
        "osler distill runs/quickstart/sft task=clinic:train --out rows.jsonl",
        "osler.eval.distill:run",
        (CHECKPOINT, OVERRIDES, option("--out", required=True, metavar="FILE", help="the rows to write, a .jsonl file")),
        DISTILL_HELP,
    ),
    Command(
        "generate",
        "Let a model continue a text",
        "osler generate runs/quickstart/pretrain --prompt 'A patient with fever'",
        "osler.inference.chat:generate",
        (CHECKPOINT, option("--prompt", required=True, metavar="TEXT", help="the text to continue"), *SAMPLING),
    ),
    Command(
        "chat",
        "Ask a model questions in the terminal",
        "osler chat runs/quickstart/grpo",
        "osler.inference.chat:chat",
        (
            CHECKPOINT,
            option("--no-reasoning", dest="reasoning", action="store_const", const=False, help="ask for the answer alone"),
            *SAMPLING,
        ),
    ),
    Command(
        "serve",
        "Answer requests to models over HTTP, as OpenAI's API",
        "osler serve runs/quickstart/grpo",
        "osler.serve.process:run",
        (
            option(
                "models",
                nargs="+",
                metavar="CHECKPOINT",
                help="a run, a checkpoint or a Hugging Face folder, or NAME=PATH; the first is the default",
            ),
            *SERVER,
        ),
        SERVE_HELP,
    ),
    Command(
        "report",
        "Write the report of a run, and print its summary",
        "osler report runs/quickstart",
        "osler.report.page:report",
        (RUN, option("--out", metavar="FILE", help="the page to write (default: report.html in the run folder)")),
    ),
    Command(
        "checkpoint list",
        "List the checkpoints of a run: step, tokens, size, which is the best",
        "osler checkpoint list runs/notes",
        "osler.runs.checkpoints:list_checkpoints",
        (RUN,),
    ),
    Command(
        "checkpoint verify",
        "Check every byte of a run's checkpoints, or of one; exit code 1 when one is damaged",
        "osler checkpoint verify runs/notes",
        "osler.runs.checkpoints:verify_checkpoints",
        (option("path", metavar="CHECKPOINT", help="a run folder, or a checkpoint in it"),),
    ),
    Command(
        "watch",
        "Show a run in the terminal while it runs: state, curves, newest values, events, checkpoints",
        "osler watch runs/mine",
        "osler.watch.screen:run",
        (
            option("folder", metavar="DIR", help="a run folder; of a pipeline, the stage that is running is shown"),
            option("--every", dest="every_seconds", type=float, default=2.0, metavar="S", help="seconds a frame (default: 2)"),
            option("--once", action="store_true", help="print one frame as plain text, and end"),
        ),
        WATCH_HELP,
    ),
    Command(
        "compare",
        "Compare runs or checkpoints: a page of curves, a table, and their exams question by question",
        "osler compare runs/mine runs/mine-lower-lr --out lower-lr.html",
        "osler.report.compare:compare",
        (
            option("folders", nargs="+", metavar="DIR", help="two run folders or more, or checkpoints in them"),
            option("--out", default="compare.html", metavar="FILE", help="the page to write (default: compare.html)"),
        ),
    ),
    Command(
        "bench",
        "Time a recipe's training step on this machine",
        "osler bench pure-tiny seq_len=512 batch_tokens=4096",
        "osler.bench:run",
        (RECIPE, option("--steps", type=int, default=12, metavar="N", help="timed steps (default: 12)")),
    ),
    Command(
        "doctor",
        "Find out what this machine can do",
        "osler doctor --json",
        "osler.doctor:run",
        (
            option("--json", dest="as_json", action="store_true", help="print one JSON object instead of a table"),
            option("--folder", default=".", metavar="DIR", help="where runs will be written (default: here)"),
        ),
    ),
)
