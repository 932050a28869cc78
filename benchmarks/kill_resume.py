"""Is a run that is killed and resumed the same run? Bit for bit, at moments nobody chose.

    python benchmarks/kill_resume.py [--rounds 10] [--kinds pretrain sft grpo] [--seed 0] [--out FILE]

For each kind of training (tiny, fp32, one CPU thread, not compiled) one run goes through undisturbed. Then, in every round, the
same command is started in a process of its own, killed with SIGKILL after a random delay, and started again, until it finishes.
The delay counts from the process's first sign of training and is drawn over the first half of the time that an undisturbed run
takes from there; every second kill then waits for the next save to begin and strikes within its first moments. So kills fall into
steps, evaluations and saves alike. Compared with the undisturbed run: the bytes of the last
weights, optimizer moments and reference model, what the trainer recorded, which checkpoint is marked best, and every line of
metrics.jsonl without times and speeds. Prints one JSON object; exits with 1 when anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STEPS, SAVE_EVERY, EVAL_EVERY = 30, 3, 10
MOST_STARTS = 200
SAVE_SECONDS = 0.02
TENSORS = ("model.safetensors", "optimizer.safetensors", "reference.safetensors")
MODEL = {
    "num_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32,
    "vocab_size": 512, "max_seq_len": 256, "residual_init": "scaled", "attention_init": "mirrored",
}  # fmt: skip


def recipes(folder: Path) -> dict[str, list[str]]:
    """Write the recipes; returns the command of each kind, and of ``start``, the model that GRPO begins with."""
    from osler.tasks.clinic import load
    from osler.tasks.item import LETTERS, render_question

    turns = [
        {"question": render_question(item), "why": "Clear.", "answer": f"({LETTERS[item.answer_index]})"}
        for item in load(split="train", limit=160)
    ]
    (folder / "turns.jsonl").write_text("".join(json.dumps(turn) + "\n" for turn in turns), encoding="utf-8")
    common = {"device": "cpu", "precision": "fp32", "keep_last": 2}
    batch = 512
    supervised = {
        **common, "compile": "never", "model": MODEL, "tokenizer": {"vocab_size": 512}, "seq_len": 128, "batch_tokens": batch,
        "total_tokens": STEPS * batch, "save_every_tokens": SAVE_EVERY * batch, "eval_every_tokens": EVAL_EVERY * batch,
        "log_every_steps": 4, "schedule": {"warmup_tokens": 5 * batch},
    }  # fmt: skip
    answers = {"type": "turns", "path": str(folder / "turns.jsonl"), "thinking_field": "why"}
    clinic = {"passages": 200, "examples": 200, "cards": 0, "validation_passages": 20, "validation_examples": 20}
    long = {"total_tokens": 120 * batch, "save_every_tokens": 10**9, "eval_every_tokens": 10**9, "optim": {"lr": 1e-2}}
    exam = {"every_tokens": EVAL_EVERY * batch, "items": 10}
    grpo = {
        **common, "steps": STEPS, "save_every_steps": SAVE_EVERY, "eval_every_steps": EVAL_EVERY, "optim": {"lr": 1e-3},
        "tasks": [{"task": {"type": "clinic", "split": "train", "limit": 100}}],
        "eval_task": {"type": "clinic", "split": "validation", "limit": 10},
        "algorithm": {"prompts_per_step": 3, "samples_per_prompt": 4, "max_new_tokens": 8, "reference_refresh_steps": 7},
    }  # fmt: skip
    written = {
        "pretrain": {**supervised, "data": clinic, "exam": exam},
        "sft": {**supervised, "data": answers, "packing": "whole"},
        "start": {**supervised, **long, "data": answers, "packing": "whole"},
        "grpo": grpo,
    }
    for name, recipe in written.items():
        (folder / f"{name}.yaml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    begin = {"pretrain": "pretrain", "sft": "sft", "start": "sft", "grpo": "grpo"}
    commands = {name: [verb, str(folder / f"{name}.yaml")] for name, verb in begin.items()}
    commands["sft"].append(f"init_from={folder / 'whole-pretrain'}")
    commands["grpo"].append(f"init_from={folder / 'whole-start'}")
    return commands


def launch(command: list[str], run: Path) -> subprocess.Popen[str]:
    """Start a run in a process of its own, with its messages in ``<run>.log``."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("OSLER_FAULT", None)
    with open(run.with_suffix(".log"), "a", encoding="utf-8") as log:
        words = [sys.executable, "-m", "osler.cli", *command, "--run", str(run)]
        return subprocess.Popen(words, env=environment, stdout=log, stderr=log, text=True)


def trace(run: Path) -> tuple[int, ...]:
    """Changes as soon as the run logs a line or begins to write a checkpoint."""
    metrics, checkpoints = run / "metrics.jsonl", run / "checkpoints"
    size = metrics.stat().st_size if metrics.exists() else 0
    return size, checkpoints.stat().st_mtime_ns if checkpoints.exists() else 0


def wait_until_training(process: subprocess.Popen[str], run: Path) -> None:
    before = trace(run)
    while process.poll() is None and trace(run) == before:
        time.sleep(0.002)


def undisturbed(command: list[str], run: Path) -> float:
    """Run to the end; returns the seconds from the first sign of training on."""
    process = launch(command, run)
    wait_until_training(process, run)
    began = time.monotonic()
    if process.wait() != 0:
        raise SystemExit(f"{' '.join(command)} failed; see {run.with_suffix('.log')}")
    return time.monotonic() - began


def killed_until_done(command: list[str], run: Path, seconds: float, rng: random.Random) -> dict[str, int]:
    """Start, kill and start again until the run finishes; returns how often, and how many kills hit a save."""
    counts = {"starts": 0, "kills": 0, "kills_during_a_save": 0}
    while counts["starts"] < MOST_STARTS:
        counts["starts"] += 1
        left_behind = unfinished_saves(run)
        process = launch(command, run)
        wait_until_training(process, run)
        time.sleep(rng.uniform(0.0, seconds / 2))
        if rng.random() < 0.5:
            while process.poll() is None and not unfinished_saves(run) - left_behind:
                time.sleep(0.0005)
            time.sleep(rng.uniform(0.0, SAVE_SECONDS))
        process.kill()
        if process.wait() == -signal.SIGKILL:
            counts["kills"] += 1
            counts["kills_during_a_save"] += bool(unfinished_saves(run) - left_behind)
        elif process.returncode == 0:
            return counts
        else:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}; see {run.with_suffix('.log')}")
    raise SystemExit(f"{' '.join(command)} did not finish in {MOST_STARTS} starts; see {run.with_suffix('.log')}")


def unfinished_saves(run: Path) -> set[tuple[str, int]]:
    """The folders that a save is writing, or that a killed one left, by name and inode."""
    found = set()
    for path in (run / "checkpoints").glob(".tmp-*"):
        with contextlib.suppress(FileNotFoundError):  # it has just got its name
            found.add((path.name, path.stat().st_ino))
    return found


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


def measure(kinds: list[str], rounds: int, seed: int, folder: Path) -> dict[str, Any]:
    """All rounds of all kinds."""
    commands = recipes(folder)
    wanted = {"pretrain", *(["start"] if "grpo" in kinds else []), *kinds}  # fine-tuning and GRPO begin with the others
    seconds = {name: undisturbed(commands[name], folder / f"whole-{name}") for name in commands if name in wanted}
    results: dict[str, Any] = {}
    for kind in kinds:
        expected = outcome(folder / f"whole-{kind}")
        rng = random.Random(f"{seed} {kind}")
        counts = dict.fromkeys(("identical", "starts", "kills", "kills_during_a_save"), 0)
        result: dict[str, Any] = {"rounds": rounds, **counts, "different": []}
        for number in range(rounds):
            run = folder / f"{kind}-{number}"
            for name, count in killed_until_done(commands[kind], run, seconds[kind], rng).items():
                result[name] += count
            found = outcome(run)
            different = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
            result["identical"] += not different
            result["different"] += [{"round": number, "what": different}] if different else []
            verdict = f"differs in {', '.join(different)}" if different else "identical"
            print(f"{kind} round {number + 1}/{rounds}: {verdict}", file=sys.stderr)
            if not different:
                shutil.rmtree(run)
        result["metrics_lines"] = len(expected["metrics"])
        result["undisturbed_seconds"] = round(seconds[kind], 2)
        results[kind] = result
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--kinds", nargs="+", choices=["pretrain", "sft", "grpo"], default=["pretrain", "sft", "grpo"])
    parser.add_argument("--seed", type=int, default=0, help="of the kills' moments")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="kill-resume-"))
    results = measure(arguments.kinds, arguments.rounds, arguments.seed, folder)
    identical = all(result["identical"] == result["rounds"] for result in results.values())
    from importlib.metadata import version

    report = {
        "what": "SIGKILL at random moments and resume by the same command, against an uninterrupted run",
        "identical": identical,
        "seed": arguments.seed,
        "steps": STEPS,
        "save_every_steps": SAVE_EVERY,
        "eval_every_steps": EVAL_EVERY,
        "kinds": results,
        "seconds": round(time.monotonic() - began),
        "machine": {"system": f"{platform.system()} {platform.machine()}", "cpus": os.cpu_count(), "threads": 1},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "numpy", "tokenizers")},
    }
    text = json.dumps(report, indent=2) + "\n"
    print(text, end="")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text, encoding="utf-8")
    if identical:
        shutil.rmtree(folder)
    else:
        print(f"The runs that differ are kept in {folder}.", file=sys.stderr)
    return 0 if identical else 1


if __name__ == "__main__":
    sys.exit(main())
