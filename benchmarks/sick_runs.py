"""Runs that are made sick on purpose: what a person is told, at which step, and what the loss showed by then.

    python benchmarks/sick_runs.py [--steps 120] [--only NAME ...] [--folder DIR] [--out FILE]

Every run is the same small pretraining on the clinic (4 layers x 128, 2,048 tokens a step, a line every 5 steps, everything
looked at every 20), and one thing is wrong with it: the learning rate is ten times too high, the loader is slow, one batch or
many in a row are poisoned, a layer is dead from the start. ``healthy`` is the run that nothing is wrong with; whatever it is told
is a false alarm. Each is a fresh process. Prints one JSON object; exits with 1 when a run is not told what it should be, or the
healthy one is told anything.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring import ROOT, publish

RUN = [
    *("model.num_layers=4", "model.hidden_size=128", "model.intermediate_size=352", "model.num_heads=4", "model.num_kv_heads=2"),
    *("model.head_dim=32", "model.vocab_size=2048", "model.max_seq_len=128", "tokenizer.vocab_size=2048", "seq_len=128"),
    *("batch_tokens=2048", "log_every_steps=5", "schedule.warmup_tokens=40960", "checkpoint.every_tokens=81920"),
    *("eval_every_tokens=100000000", "precision=fp32", "compile=never", "monitor.level=full", "monitor.full_every_steps=20"),
]
LR = 0.02  # near the best for this model
TOLD = ("step", "from_step", "kind", "name", "message")  # of an event
TOO_FAST = {"learning-rate", "swinging-loss", "exploding-gradient", "dead-layers"}
# name: (fields of the run, fault, names of events of which one must be told)
CASES: dict[str, tuple[list[str], str, set[str]]] = {
    "healthy": ([], "", set()),
    "learning rate x 10": ([f"optim.lr={10 * LR}"], "", TOO_FAST),
    "starved loader": (["loader_workers=0"], "load-batch:slow:60-", {"starved-loader"}),
    "poisoned batch": ([], "train-loss:nan:101", {"skipped-step"}),
    "poisoned window": (["recovery.max_skipped_steps=5"], "train-loss:nan:101-105", {"rollback"}),
    "dead layer": ([], "", {"dead-layers"}),
}


def dead_from(healthy: Path, folder: Path) -> str:
    """A checkpoint of the healthy run in which the feed-forward units of one layer give nothing."""
    from osler.checkpoint import store

    loaded = store.load(store.resolve(healthy))
    for name in ("gate_proj", "up_proj"):
        loaded.tensors["model"][f"layers.2.mlp.{name}.weight"].zero_()
    return str(store.save(folder / "dead", loaded.step, tensors=loaded.tensors, state=loaded.state, files=loaded.files))


def run(name: str, steps: int, folder: Path) -> dict[str, Any]:
    """Make one run; returns what it was told and the course of its loss."""
    from osler.records.jsonl import LIFETIME, read_events, read_metrics

    fields, fault, _ = CASES[name]
    out = folder / name.replace(" ", "-")
    if name == "dead layer":
        fields = [f"init_from={dead_from(folder / 'healthy', folder)}"]
    command = [sys.executable, "-m", "osler.cli", "pretrain", *RUN, f"optim.lr={LR}", f"total_tokens={2048 * steps}", *fields]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **({"OSLER_FAULT": fault} if fault else {})}
    done = subprocess.run([*command, "--run", str(out)], env=environment, stdout=subprocess.DEVNULL, check=False)
    events = [event for event in read_events(out / "events.jsonl") if event.kind not in LIFETIME]
    return {
        "exit_code": done.returncode,
        "told": [{key: fields[key] for key in TOLD if key in fields} for fields in ({**vars(e), **e.details} for e in events)],
        "loss": {line.step: line.values["train/loss"] for line in read_metrics(out / "metrics.jsonl", having="train/loss")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--only", nargs="*", choices=CASES, help="these runs; healthy is always made")
    parser.add_argument("--folder", type=Path, help="keep the run folders here")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    wanted = [name for name in CASES if not args.only or name in ("healthy", *args.only)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        runs = {name: run(name, args.steps, folder) for name in wanted}
    cases, wrong = {}, []
    for name, made in runs.items():
        first = next((event for event in made["told"] if event["name"] in CASES[name][2]), None)
        if (first is None) != (name == "healthy") or (name == "healthy" and made["told"]) or made["exit_code"] == 1:
            wrong.append(name)
        step = first.get("from_step", first["step"]) if first else None  # a rollback's step is the one gone back to
        then = {"loss_then": made["loss"].get(step), "healthy_loss_then": runs["healthy"]["loss"].get(step)} if first else {}
        ended = {"last_loss": made["loss"][max(made["loss"])], "exit_code": made["exit_code"]}
        cases[name] = {"first_told_at_step": step, **then, **ended, "told": made["told"]}
    result = {"benchmark": "sick-runs", "steps": args.steps, "cases": cases, "wrong": wrong}
    publish(result, args.out)
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
