"""Is a run that is killed and resumed the same run? Bit for bit, at moments nobody chose.

    python benchmarks/torture_resume.py [--rounds 200] [--kinds pretrain sft grpo ranks] [--seed 0] [--folder DIR] [--out FILE]

For each kind of training (tiny, fp32, one CPU thread, not compiled; ``ranks`` is pretraining on two processes by DDP) one run
goes through undisturbed. Then every round starts the same command in an empty folder and breaks it one to three times: SIGKILL or
SIGTERM at a random moment, SIGKILL at a random visit of a random stage of a save, or an evaluation that crashes; of two ranks a
random one is hit. The last start goes through to the end. A round that nothing struck is made again. Compared with the
undisturbed run: the bytes of the last weights, optimizer moments and reference model, what the trainer recorded, which checkpoint
is marked best, and every line of metrics.jsonl without times and speeds.

One process imports everything once and forks for every start. With ``--folder`` the rounds that were made are kept in
``rounds.jsonl`` there, and the same command goes on after them. Prints one JSON object; exits with 1 when anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KINDS = ["pretrain", "sft", "grpo", "ranks"]
STEPS, SAVE_EVERY, EVAL_EVERY = 18, 3, 6
PATIENCE_SECONDS = 120
GRACE_SECONDS = 10
TENSORS = ("model.safetensors", "optimizer.safetensors", "reference.safetensors")
STAGES = ("save-tensors", "save-state", "save-files", "save-manifest", "save-rename", "save-verify", "save-best", "rotate")
MOST_VISITS = 12  # of a stage: several fall on one save, and a visit that never comes strikes nothing
WAYS = {"kill": 0.4, "stage": 0.4, "term": 0.15, "crash": 0.05}
MODEL = {
    "num_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16,
    "vocab_size": 512, "max_seq_len": 256, "residual_init": "scaled", "attention_init": "mirrored",
}  # fmt: skip


def recipes(folder: Path) -> dict[str, list[str]]:
    """Write the recipes; returns the command of each kind, and of ``start``, the model that GRPO begins with."""
    from osler.tasks.item import LETTERS, render_question
    from osler.tasks.registry import load_clinic

    turns = [
        {"question": render_question(item), "why": "Clear.", "answer": f"({LETTERS[item.answer_index]})"}
        for item in load_clinic(split="train", limit=160)
    ]
    (folder / "turns.jsonl").write_text("".join(json.dumps(turn) + "\n" for turn in turns), encoding="utf-8")
    common = {"device": "cpu", "precision": "fp32"}
    batch = 512
    supervised = {
        **common, "compile": "never", "model": MODEL, "tokenizer": {"vocab_size": 512}, "seq_len": 128, "batch_tokens": batch,
        "total_tokens": STEPS * batch, "checkpoint": {"every_tokens": SAVE_EVERY * batch},
        "eval_every_tokens": EVAL_EVERY * batch, "log_every_steps": 4, "schedule": {"warmup_tokens": 5 * batch},
    }  # fmt: skip
    answers = {"type": "turns", "path": str(folder / "turns.jsonl"), "thinking_field": "why"}
    clinic = {"passages": 60, "examples": 40, "cards": 0, "drills": 0, "validation_passages": 6, "validation_examples": 6}
    long = {"total_tokens": 120 * batch, "checkpoint": {"every_tokens": 10**9}, "eval_every_tokens": 10**9, "optim": {"lr": 1e-2}}
    exam = {"every_tokens": EVAL_EVERY * batch, "items": 4}
    grpo = {
        **common, "steps": STEPS, "checkpoint": {"every_steps": SAVE_EVERY}, "eval_every_steps": EVAL_EVERY,
        "optim": {"lr": 1e-3},
        "tasks": [{"task": {"type": "clinic", "split": "train", "limit": 60}}],
        "eval_task": {"type": "clinic", "split": "validation", "limit": 6},
        "algorithm": {"prompts_per_step": 3, "samples_per_prompt": 4, "max_new_tokens": 8, "reference_refresh_steps": 7},
    }  # fmt: skip
    written = {
        "pretrain": {**supervised, "data": clinic, "exam": exam},
        "ranks": {**supervised, "data": clinic, "exam": exam, "parallel": {"type": "ddp"}},
        "sft": {**supervised, "data": answers, "packing": "whole"},
        "start": {**supervised, **long, "data": answers, "packing": "whole"},
        "grpo": grpo,
    }
    for name, recipe in written.items():
        (folder / f"{name}.yaml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    verbs = {"pretrain": "pretrain", "ranks": "pretrain", "sft": "sft", "start": "sft", "grpo": "grpo"}
    commands = {name: [verb, str(folder / f"{name}.yaml")] for name, verb in verbs.items()}
    commands["sft"].append(f"init_from={folder / 'whole-pretrain'}")
    commands["grpo"].append(f"init_from={folder / 'whole-start'}")
    return commands


def launch(command: list[str], run: Path, size: int = 1, fault: str = "", hit: int = 0) -> list[int]:
    """Fork the ranks of a run, rank ``hit`` with a fault; returns their process ids. Messages go to ``<run>.log``."""
    from osler.cli.main import main
    from osler.runtime import faults

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(size):
        child = os.fork()
        if child:
            children.append(child)
            continue
        log = os.open(run.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if size > 1:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}}
        if fault and rank == hit:
            os.environ[faults.VARIABLE] = fault
        code = 1
        try:
            code = main([*command, "--run", str(run)])
        finally:
            sys.stderr.flush()
            os._exit(code)
    return children


def ended(children: list[int], run: Path) -> list[int]:
    """The exit codes, a signal as its negative number; a run that does not end is an error.

    As torchrun does, a rank is told to end when another has: one that was killed before it joined is waited for otherwise.
    """
    codes: dict[int, int] = {}
    deadline, ask_at = time.monotonic() + PATIENCE_SECONDS, None
    while len(codes) < len(children):
        if any(codes.values()) and ask_at is None:
            ask_at = time.monotonic() + GRACE_SECONDS
        if ask_at is not None and time.monotonic() > ask_at:
            ask_at = math.inf
            for child in set(children) - codes.keys():
                os.kill(child, signal.SIGTERM)
        for child in set(children) - codes.keys():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for child in set(children) - codes.keys():
                os.kill(child, signal.SIGKILL)
            raise SystemExit(f"{run} did not end in {PATIENCE_SECONDS} s; see {run.with_suffix('.log')}")
        time.sleep(0.002)
    return [codes[child] for child in children]


def undisturbed(command: list[str], run: Path, size: int) -> float:
    """Run to the end; returns the seconds that it took."""
    began = time.monotonic()
    if any(ended(launch(command, run, size), run)):
        raise SystemExit(f"{' '.join(command)} failed; see {run.with_suffix('.log')}")
    return time.monotonic() - began


def struck(command: list[str], run: Path, size: int, seconds: float, rng: random.Random) -> str:
    """Start the run and break it in a random way; returns the way, or nothing when the run was over before."""
    way = rng.choices(list(WAYS), list(WAYS.values()))[0]
    hit, delay, visit = rng.randrange(size), rng.uniform(0.0, seconds), rng.randint(1, MOST_VISITS)
    faults = {"stage": f"{rng.choice(STAGES)}:kill:{visit}", "crash": f"evaluate:crash:{rng.randint(1, 3)}"}
    # Rank 0 alone writes, so a stage of a save is its own.
    children = launch(command, run, size, faults.get(way, ""), 0 if way == "stage" else hit)
    if way in ("kill", "term"):
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):
            os.kill(children[hit], signal.SIGKILL if way == "kill" else signal.SIGTERM)
    codes = ended(children, run)
    if not any(codes):
        return ""
    # What a way may end a process with: by the signal, after a save, by the crash, and 75 when another rank was lost.
    allowed = {"kill": {-signal.SIGKILL}, "stage": {-signal.SIGKILL}, "term": {130, -signal.SIGTERM}, "crash": {1}}[way]
    if codes[0 if way == "stage" else hit] not in allowed or not set(codes) <= {*allowed, 75, -signal.SIGTERM}:
        raise SystemExit(f"{way} ended {run} with {codes}; see {run.with_suffix('.log')}")
    return f"{way} {faults[way].partition(':')[0]}" if way == "stage" else way


def outcome(run: Path) -> dict[str, Any]:
    """What must be equal."""

    def untimed(values: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in values.items() if k not in ("time", "seconds", "eval/seconds") and not k.startswith("perf/")}

    last = max((run / "checkpoints").glob("step-*"))
    found: dict[str, Any] = {name: (last / name).read_bytes() for name in TENSORS if (last / name).exists()}
    found["last"] = last.name
    found["state"] = untimed(json.loads((last / "state.json").read_text(encoding="utf-8")))
    found["best"] = json.loads((run / "checkpoints" / "best.json").read_text(encoding="utf-8"))
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found["metrics"] = [untimed(json.loads(line)) for line in lines]
    return found


def one_round(number: int, kinds: list[str], seed: int, commands: dict[str, list[str]], wholes: dict[str, Any]) -> dict[str, Any]:
    """Break a run at least once, let it finish and compare."""
    rng = random.Random(f"{seed} {number}")
    kind = kinds[number % len(kinds)]
    command, size, whole = commands[kind], 2 if kind == "ranks" else 1, wholes[kind]
    run = whole["run"].with_name(f"{kind}-{number}")
    ways: list[str] = []
    while not ways:
        shutil.rmtree(run, ignore_errors=True)
        for _ in range(rng.randint(1, 3)):
            way = struck(command, run, size, whole["seconds"], rng)
            if not way:
                break
            ways.append(way)
    if any(ended(launch(command, run, size), run)):
        raise SystemExit(f"the last start of {run} failed; see {run.with_suffix('.log')}")
    expected, found = whole["outcome"], outcome(run)
    different = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    if not different:
        shutil.rmtree(run)
        run.with_suffix(".log").unlink()
    return {"round": number, "kind": kind, "ways": ways, "different": different}


def measure(kinds: list[str], rounds: int, seed: int, folder: Path) -> list[dict[str, Any]]:
    """All rounds; those that an earlier start made in this folder are read."""
    from osler.cli.main import main

    commands = recipes(folder)
    needed = {"pretrain", *kinds} if "sft" in kinds else {*kinds}  # fine-tuning and GRPO begin with the others
    wanted = [name for name in commands if name in needed or (name == "start" and "grpo" in kinds)]
    wholes: dict[str, Any] = {}
    for name in wanted:
        run, size = folder / f"whole-{name}", 2 if name == "ranks" else 1
        shutil.rmtree(run, ignore_errors=True)
        with contextlib.redirect_stdout(io.StringIO()):  # reads the recipe once for every fork
            main([*commands[name], "--dry-run"])
        seconds = undisturbed(commands[name], run, size)
        wholes[name] = {"run": run, "seconds": seconds, "outcome": outcome(run) if name != "start" else None}
        print(f"{name}: {seconds:.2f} s undisturbed", file=sys.stderr)
    kept = folder / "rounds.jsonl"
    results = [json.loads(line) for line in kept.read_text().splitlines()][:rounds] if kept.exists() else []
    for number in range(len(results), rounds):
        result = one_round(number, kinds, seed, commands, wholes)
        results.append(result)
        with kept.open("a") as file:
            file.write(json.dumps(result) + "\n")
        verdict = f"differs in {', '.join(result['different'])}" if result["different"] else "identical"
        print(f"round {number + 1}/{rounds}: {result['kind']}, {', '.join(result['ways'])}: {verdict}", file=sys.stderr)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--seed", type=int, default=0, help="of what strikes when")
    parser.add_argument("--folder", type=Path, help="work here, and go on with the rounds that are there")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    os.environ |= {"OMP_NUM_THREADS": "1"}
    os.environ.pop("OSLER_FAULT", None)
    import torch._dynamo  # noqa: F401 - torch.optim loads it, for seconds; here it is loaded once for every fork

    import osler.rl.run
    import osler.train.run  # noqa: F401

    began = time.monotonic()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="torture-resume-"))
    folder.mkdir(parents=True, exist_ok=True)
    results = measure(arguments.kinds, arguments.rounds, arguments.seed, folder)
    identical = sum(not result["different"] for result in results)
    from importlib.metadata import version

    from osler.runtime.device import describe_machine

    report = {
        "what": "interrupted in random ways and resumed by the same command, against an uninterrupted run",
        "rounds": len(results),
        "identical": identical,
        "different": [result for result in results if result["different"]],
        "kinds": Counter(result["kind"] for result in results),
        "interruptions": sum(len(result["ways"]) for result in results),
        "ways": Counter(way for result in results for way in result["ways"]),
        "seed": arguments.seed,
        "steps": STEPS,
        "save_every_steps": SAVE_EVERY,
        "eval_every_steps": EVAL_EVERY,
        "seconds": round(time.monotonic() - began),
        "machine": {**describe_machine(), "threads": 1},
        "versions": {name: version(name) for name in ("numpy", "tokenizers")},
    }
    text = json.dumps(report, indent=2) + "\n"
    print(text, end="")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text, encoding="utf-8")
    if identical < len(results):
        print(f"The runs that differ are kept in {folder}.", file=sys.stderr)
        return 1
    if arguments.folder is None:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
