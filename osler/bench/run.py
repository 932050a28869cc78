"""``osler bench``: how fast a recipe trains here, alone or beside nanochat and Hugging Face at the same shape, batch and dtype.

Every measurement is a fresh process and the contestants take turns, so that a machine that slows down slows all of them.
Numbers are medians over rounds; ratios are taken round by round. FLOPs are counted by the PaLM convention, non-causal. MFU is
relative to the GPU's data sheet (``runtime/device.py``); on a CPU the rate is relative to a matmul timed in the same rounds.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import operator
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from osler.config.recipe import load_recipe, parse_overrides
from osler.config.schema import decode, encode
from osler.runtime.errors import UserError
from osler.runtime.files import write_json
from osler.runtime.world import require_one_process
from osler.train.config import TrainConfig

logger = logging.getLogger(__name__)

CONVENTION = "PaLM: 6 x (matrices + head) + 12 x layers x heads x head_dim x seq_len FLOPs per token, non-causal"
STEPS_ALWAYS_COMPILED = 1_000_000
LAST_WORDS = 3000  # characters of a failed process's stderr that are worth showing


def run(
    recipe: str | None,
    overrides: Sequence[str] = (),
    *,
    peers: Sequence[str] = (),
    rounds: int = 3,
    steps: int = 12,
    out: str | None = None,
) -> int:
    """Run the command ``bench``: print one JSON object, and write it to ``out`` too."""
    require_one_process("osler bench")
    if rounds < 1 or steps < 1:
        raise UserError(f"--rounds {rounds} and --steps {steps} must be at least 1.")
    given = load_recipe(recipe, overrides) if recipe else parse_overrides(overrides)
    kind = given.get("kind", "pretrain")
    if kind not in ("pretrain", "sft"):
        raise UserError(f"`{recipe}` is a recipe of kind {kind}: give one of `osler pretrain` or `osler sft`, or a model family.")
    config = decode(TrainConfig, {**given, "kind": kind}, source=recipe or "")
    if config.parallel.type != "none":
        logger.info(f"osler bench times one process, on which parallel.type={config.parallel.type} changes nothing.")
    result = compare(config, recipe or "defaults", peers=peers, rounds=rounds, steps=steps)
    print(json.dumps(result, indent=2))
    if out is not None:
        write_json(Path(out), result)
    return 0


def compare(config: TrainConfig, name: str, *, peers: Sequence[str], rounds: int, steps: int) -> dict[str, Any]:
    """Measure Osler and its peers in turn and put the numbers together."""
    contestants = {"osler": "", **{contestant_of(peer): peer for peer in peers}}
    if peers and config.model.embed_rank is not None:  # a peer with a whole embedding would be a larger model
        raise UserError(
            f"No peer has a factorized embedding (model.embed_rank={config.model.embed_rank}): leave --peer out, or compare "
            "with model.embed_rank=null."
        )
    import torch

    from osler.runs.process import choose_machine
    from osler.runtime.device import describe_machine

    machine = choose_machine(config.device, config.precision, config.compile, steps=STEPS_ALWAYS_COMPILED)
    spec = {
        "config": encode(config),
        "device": str(machine.device),
        "dtype": str(machine.dtype).removeprefix("torch."),
        "compile": machine.compile,
        "warmup": 3,
        "steps": steps,
    }
    turns = [*contestants, "matmul"]
    measured: dict[str, list[dict[str, Any]]] = {contestant: [] for contestant in turns}
    for number in range(rounds):
        for contestant in turns if number % 2 == 0 else reversed(turns):
            done = in_fresh_process({**spec, "contestant": contestant, "peer": contestants.get(contestant, "")})
            measured[contestant].append(done)
            rate = f"{done['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in done else "timed"
            logger.info(f"round {number + 1} of {rounds}: {contestant} {rate}")
    matmul = [done["flops_per_second"] for done in measured.pop("matmul")]
    device = str(machine.device) if machine.device.type == "cpu" else torch.cuda.get_device_name(machine.device)
    return {
        "benchmark": "train",
        "recipe": name,
        "config": spec["config"],
        "dtype": spec["dtype"],
        "compiled": machine.compile,
        "machine": {**describe_machine(), "device": device},
        "rounds": rounds,
        "steps": steps,
        "flops_convention": CONVENTION,
        "matmul_flops_per_second": matmul,
        **{contestant: summary(runs, matmul) for contestant, runs in measured.items()},
        **{f"osler_over_{peer}": ratio(measured["osler"], measured[peer]) for peer in list(contestants)[1:]},
    }


def contestant_of(peer: str) -> str:
    """Return the name of a peer, given as ``hf`` or a checkout of nanochat. Raises UserError when it is not there."""
    if peer == "hf":
        if importlib.util.find_spec("transformers") is None:
            raise UserError("--peer hf needs transformers: make test installs it, or pip install -e '.[test]' does.")
        return peer
    if not (Path(peer) / "nanochat" / "gpt.py").exists():
        raise UserError(f"--peer {peer} is neither hf nor a checkout of nanochat: nanochat/gpt.py is missing there.")
    return "nanochat"


def in_fresh_process(spec: dict[str, Any]) -> dict[str, Any]:
    """Run one measurement in a process of its own."""
    command = [sys.executable, "-m", "osler.bench.measure", json.dumps(spec)]
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"Measuring {spec['contestant']} failed:\n{done.stderr[-LAST_WORDS:].strip()}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def summary(runs: Sequence[dict[str, Any]], matmul: Sequence[float]) -> dict[str, Any]:
    """Return the medians over the rounds, and each round's tokens per second; ``matmul`` are the rounds' FLOP/s of a matmul."""
    parts = {name: statistics.median(run["part_seconds"][name] for run in runs) for name in runs[0]["part_seconds"]}
    whole = sum(parts.values())
    peak = runs[0]["peak_flops_per_second"]
    achieved = [run["flops_per_second"] for run in runs]
    return {
        "tokens_per_second": statistics.median(run["tokens_per_second"] for run in runs),
        "step_milliseconds": {name: round(1000 * seconds, 3) for name, seconds in parts.items()},
        "step_share": {name: round(seconds / whole, 4) for name, seconds in parts.items()},
        "first_step_seconds": statistics.median(run["first_step_seconds"] for run in runs),
        "mfu": None if peak is None else statistics.median(achieved) / peak,
        "of_matmul_rate": statistics.median(map(operator.truediv, achieved, matmul)),
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
        "parameters": runs[0]["parameters"],
        "each_round": [round(run["tokens_per_second"], 1) for run in runs],
    }


def ratio(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compare tokens per second with a peer's, round by round."""
    each = [mine["tokens_per_second"] / other["tokens_per_second"] for mine, other in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(each), "each": [round(value, 3) for value in each]}
