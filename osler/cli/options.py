"""The options that several commands share, some of them in groups."""

from __future__ import annotations

import argparse

from osler.cli.command import option

OVERRIDES = option("overrides", nargs="*", metavar="key.path=value", help="fields to change")
RECIPE = option(
    "items",
    nargs="*",
    metavar="RECIPE | key.path=value",
    help="a recipe of `osler recipes` or a YAML file (or the defaults), and fields, which `osler show RECIPE --explain` explains",
)
RUN_FOLDER = (
    option("--run", "--run-dir", dest="run_dir", metavar="DIR", help="run folder (default: in runs/); torchrun needs --run-dir"),
    option("--resume", action="store_true", help="go on from the newest good checkpoint of --run DIR"),
    option("--dry-run", action="store_true", help="check the configuration and say what would happen, then stop"),
)
ORIGIN = (
    option("--from-step", type=int, metavar="N", help="go back to the checkpoint of step N; what came after it is set aside"),
    option("--branch", metavar="CHECKPOINT", help="start --run DIR at another run's checkpoint, with its optimizer and fields"),
)
EVAL_ONLY = option("--eval-only", action="store_true", help="measure --run DIR's newest checkpoint, or --from-step N, then stop")
CHECKPOINT = option("checkpoint", metavar="CHECKPOINT", help="a run folder, or a checkpoint in it")
EXPORTED = option("--out", required=True, metavar="PATH", help="what to write, which must be new")
RUN = option("path", metavar="DIR", help="a run folder")
TOKENIZER = "a tokenizer.json, GPT-2's vocab.bpe, or a folder with one"
SAMPLING = (
    option("--max-new-tokens", type=int, default=200, metavar="N", help="stop after this many tokens (default: 200)"),
    option("--temperature", type=float, default=0.7, metavar="T", help="0 always takes the likeliest (default: 0.7)"),
    option("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens (default: from all)"),
    option("--top-p", type=float, default=0.95, metavar="P", help="leave out the unlikely rest (default: 0.95)"),
    option("--min-p", type=float, default=0.0, metavar="P", help="leave out all below this share of the likeliest (default: 0)"),
    option("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1, repeat less (default: 1)"),
    option("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"),
    option("--seed", type=int, default=0, metavar="S", help="the same seed gives the same text (default: 0)"),
)

SERVER = (
    *(
        option(flag, type=kind, default=argparse.SUPPRESS, metavar=metavar, help=meaning)
        for flag, kind, metavar, meaning in (
            ("--host", str, "ADDRESS", "the address to listen on (default: 127.0.0.1, for this machine alone)"),
            ("--port", int, "N", "the port to listen on (default: 8000; 0: any that is free)"),
            ("--api-key-file", str, "FILE", "demand the key in FILE (default: in OSLER_API_KEY, or no key)"),
            ("--max-rows", int, "N", "completions of a model that are drawn together (default: 64)"),
            ("--max-waiting", int, "N", "completions of a model that may wait; 429 for the next (default: 256)"),
            ("--max-new-tokens", int, "N", "the most tokens of a completion (default: 1024)"),
            ("--max-prompt-tokens", int, "N", "the most tokens of a prompt (default: as many as the model reads)"),
            ("--max-body-bytes", int, "N", "the most bytes of a request (default: 1000000)"),
            ("--max-seconds", float, "S", "the longest time for a request, waiting included (default: 300)"),
            ("--drain-seconds", float, "S", "the time that running requests have after a signal to stop (default: 30)"),
            ("--device", str, "NAME", "auto, cpu, cuda or cuda:N (default: auto)"),
        )
    ),
    option("--log-requests", action="store_true", default=argparse.SUPPRESS, help="log path, status and tokens of each request"),
)

DEPLOYED = (
    option(
        "--target",
        required=True,
        choices=("k8s-job", "jobset", "trainjob", "k8s-server", "slurm", "skypilot", "dstack"),
        help="what the machines are driven by; see below",
    ),
    *(
        option(flag, type=kind, default=argparse.SUPPRESS, metavar=metavar, help=meaning)
        for flag, kind, metavar, meaning in (
            ("--name", str, "NAME", "of the run and of all that is made for it (default: the recipe's)"),
            ("--machines", int, "N", "machines that train together (default: 1)"),
            ("--gpus", int, "N", "GPUs of each machine; 0: CPU cores (default: 1)"),
            ("--processes", int, "N", "processes of each machine (default: one for each GPU)"),
            ("--gpu-name", str, "NAME", "what skypilot and dstack rent (default: H100)"),
            ("--cpus", int, "N", "cores of each machine (default: 8)"),
            ("--memory-gb", int, "N", "memory of each machine (default: 64)"),
            ("--shm-gb", int, "N", "shared memory, which is a part of it (default: 8)"),
            ("--disk-gb", int, "N", "size of the volume (default: 200)"),
            ("--volume", str, "NAME", "that holds runs and data, and outlives them (default: osler)"),
            ("--image", str, "IMAGE", "what the Dockerfile built, where the machines find it (default: osler:cuda)"),
            ("--namespace", str, "NAME", "of Kubernetes (default: default)"),
            ("--secret", str, "NAME", "of Kubernetes, which holds the tokens (default: osler-tokens)"),
            ("--grace-seconds", int, "S", "to finish a step and save when it is asked to stop (default: 120)"),
            ("--max-failures", int, "N", "crashes after which Kubernetes gives up; evictions are none (default: 3)"),
        )
    ),
    option(
        "--token",
        dest="tokens",
        action="append",
        default=argparse.SUPPRESS,
        metavar="VARIABLE",
        help="a variable with a token, such as HF_TOKEN; its name alone is written; may be given several times",
    ),
    option("--out", metavar="FILE", help="render: write the manifests there"),
    option("--follow", action="store_true", help="logs: go on until it ends"),
)
