"""Recipes of runs that train in about a second, and runs to start from, for the tests of training and of faults."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores: what each of them starts, torch first, takes one
    os.environ["OMP_NUM_THREADS"] = "1"

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background job of a shell; the commands under test inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

MODEL = {
    "num_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16,
    "vocab_size": 512, "max_seq_len": 256, "residual_init": "scaled", "attention_init": "mirrored",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_fault_from_outside(monkeypatch):
    """A fault set in the caller's shell would strike in every test, and visits are counted anew in each."""
    from osler.runtime import faults

    monkeypatch.delenv(faults.VARIABLE, raising=False)
    faults.visits.clear()


@pytest.fixture
def fault(monkeypatch) -> Callable[[str], None]:
    """``fault(spec)`` sets the fault of this process, whose places are visited anew."""
    from osler.runtime import faults

    def set_fault(spec: str) -> None:
        faults.visits.clear()
        monkeypatch.setenv(faults.VARIABLE, spec)

    return set_fault


@pytest.fixture(autouse=True, scope="session")
def logs_on_the_terminal():
    """Messages of library functions that a test calls itself reach stderr as under the command line."""
    from osler.runtime.log import log_to_terminal

    log_to_terminal()


@pytest.fixture
def standard_handlers():
    """Signals are handled as in a terminal, although whoever runs the tests may ignore some: `nohup`, or `&` in a script."""
    from osler.runtime.stop import REQUESTS

    before = {number: signal.getsignal(number) for number in REQUESTS}
    for number in REQUESTS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def one_thread():
    """Small operators only wait for a second thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_compiled_code():
    """What other tests of this process have compiled counts towards torch's limit of versions and lends its constants."""
    import torch

    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def run_cases() -> Callable[..., int]:
    """``run_cases(program, *arguments, **environment)``: all cases of a program that forks succeed; returns their number."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")

    def run(program: str, *arguments: object, **environment: str) -> int:
        shared = [str(ROOT / "tests" / folder) for folder in ("distributed", "faults")]
        paths = [str(ROOT), *shared, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **environment}
        command = [sys.executable, str(ROOT / "tests" / program), *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = done.stdout.splitlines()
        assert [line for line in lines if not line.startswith("ok ")] == []
        return len(lines)

    return run


@pytest.fixture(scope="session")
def shared_data():
    """A function from the name of a shared file or folder to its path; where it is not there, the test is skipped."""
    root = Path(os.environ.get("OSLER_SHARED_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")

    def find(name: str) -> Path:
        if not (root / name).exists():
            pytest.skip(f"{root / name} is not here; set OSLER_SHARED_DATA to the folder that has {name}")
        return root / name

    return find


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> SimpleNamespace:
    """A folder with a tokenizer, questions with one-letter answers, and the recipes ``pretrain``, ``sft`` and ``grpo``.

    Twelve steps each; saving, logging and evaluating fall on different steps, so that a checkpoint finds half a log window.
    """
    from osler.data.config import ClinicData
    from osler.data.sources import train_tokenizer
    from osler.tasks.item import LETTERS, render_question
    from osler.tasks.registry import load_clinic
    from osler.tokenizer.config import BPEConfig

    root = tmp_path_factory.mktemp("tiny")
    tokenizer = train_tokenizer(ClinicData(passages=100, examples=100, cards=0, drills=0), BPEConfig(vocab_size=512))
    (root / "tokenizer.json").write_bytes(tokenizer.to_bytes())
    turns = [
        {"question": render_question(item), "why": "Clear.", "answer": f"({LETTERS[item.answer_index]})"}
        for item in load_clinic(split="train", limit=160)
    ]
    (root / "turns.jsonl").write_text("".join(json.dumps(turn) + "\n" for turn in turns), encoding="utf-8")
    common: dict[str, Any] = {"device": "cpu", "precision": "fp32"}
    supervised = {
        **common,
        "model": MODEL,
        "tokenizer": {"path": str(root / "tokenizer.json")},
        "seq_len": 64,
        "batch_tokens": 256,
        "total_tokens": 12 * 256,
        "log_every_steps": 5,
        "checkpoint": {"every_tokens": 4 * 256},
        "eval_every_tokens": 6 * 256,
        "schedule": {"warmup_tokens": 2 * 256},
        "compile": "never",
    }
    clinic = {"passages": 60, "examples": 40, "cards": 0, "drills": 0, "validation_passages": 6, "validation_examples": 6}
    turns_data = {"type": "turns", "path": str(root / "turns.jsonl"), "thinking_field": "why"}
    recipes: dict[str, dict[str, Any]] = {
        "pretrain": {**supervised, "kind": "pretrain", "data": clinic},
        "sft": {**supervised, "kind": "sft", "data": turns_data, "packing": "whole", "seq_len": 128, "batch_tokens": 512},
        "grpo": {
            **common,
            "kind": "grpo",
            "tasks": [{"task": {"type": "clinic", "split": "train", "limit": 60}}],
            "eval_task": {"type": "clinic", "split": "validation", "limit": 6},
            "algorithm": {"prompts_per_step": 3, "samples_per_prompt": 4, "max_new_tokens": 8, "reference_refresh_steps": 5},
            "optim": {"lr": 1.0e-3},
            "steps": 12,
            "checkpoint": {"every_steps": 4},
            "eval_every_steps": 6,
        },
    }
    recipes["sft"] |= {"total_tokens": 12 * 512, "checkpoint": {"every_tokens": 4 * 512}, "eval_every_tokens": 6 * 512}
    for name, recipe in recipes.items():
        (root / f"{name}.yaml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    names = {name: str(root / f"{name}.yaml") for name in recipes}
    return SimpleNamespace(root=root, tokenizer=root / "tokenizer.json", turns=root / "turns.jsonl", **names)


@pytest.fixture(scope="session")
def clinic_runs(tmp_path_factory) -> Path:
    """Runs of seconds: ``sft`` learned the clinic's questions, ``textbook`` read its textbook alone, ``notes`` some notes."""
    from osler.config.schema import decode
    from osler.runtime.files import RunFolder
    from osler.train.config import TrainConfig
    from osler.train.run import train

    root = tmp_path_factory.mktemp("clinic_runs")
    notes = [f"Day {day}. The fever is {'gone' if day % 2 else 'high'}; the patient sleeps – and eats well." for day in range(40)]
    (root / "notes.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in notes))
    common = {
        "model": {**MODEL, "num_layers": 1, "attention_init": "independent"},
        "tokenizer": {"vocab_size": 400},
        "batch_tokens": 512, "total_tokens": 4096, "eval_every_tokens": 4096, "checkpoint": {"every_tokens": 2048},
        "schedule": {"type": "constant"}, "compile": "never", "precision": "fp32", "device": "cpu", "too_long": "drop",
    }  # fmt: skip
    clinic = {"passages": 60, "examples": 60, "validation_passages": 5, "validation_examples": 5}
    for name, kind, data in (
        ("sft", "sft", clinic),
        ("textbook", "pretrain", {**clinic, "examples": 0, "validation_examples": 0}),
        ("notes", "pretrain", {"type": "files", "path": str(root / "notes.jsonl"), "holdout_fraction": 0.2}),
    ):
        assert train(decode(TrainConfig, {**common, "kind": kind, "data": data}), RunFolder.create(root / name))
    return root


@pytest.fixture(scope="session")
def runs(tiny) -> SimpleNamespace:
    """Finished runs: ``pretrain``, and ``sft``, which ends its answers and is right about every fourth time."""
    from osler.cli.main import main

    assert "OSLER_FAULT" not in os.environ
    folder = Path(tiny.root / "runs")
    assert main(["pretrain", tiny.pretrain, "--run", str(folder / "pretrain")]) == 0
    longer = ["total_tokens=61440", "optim.lr=1e-2", "eval_every_tokens=1000000", "checkpoint.every_tokens=1000000"]
    assert main(["sft", tiny.sft, *longer, "--run", str(folder / "sft")]) == 0
    return SimpleNamespace(pretrain=folder / "pretrain", sft=folder / "sft")


@pytest.fixture
def osler(monkeypatch) -> Callable[..., int]:
    """``osler(*words, fault=...)`` runs a command in this process and returns its exit code."""
    from osler.cli.main import main
    from osler.runtime import faults

    def run(*words: object, fault: str = "") -> int:
        faults.visits.clear()
        with monkeypatch.context() as environment:
            if fault:
                environment.setenv(faults.VARIABLE, fault)
            return main([str(word) for word in words])

    return run


@pytest.fixture(scope="session")
def commands(tiny, runs) -> dict[str, list[str]]:
    """The command that starts a run of each kind, but for its folder."""
    starts = {"pretrain": [], "sft": [f"init_from={runs.pretrain}"], "grpo": [f"init_from={runs.sft}"]}
    return {kind: [kind, getattr(tiny, kind), *start] for kind, start in starts.items()}


@pytest.fixture
def launch(osler, commands) -> Callable[..., int]:
    """``launch(kind, folder, *overrides, fault=..., resume=...)`` starts a run, or resumes it by its folder alone."""

    def start(kind: str, folder: Path, *overrides: str, fault: str = "", resume: bool = False) -> int:
        words = [kind, "--resume"] if resume else [*commands[kind], *overrides]
        return osler(*words, "--run", folder, fault=fault)

    return start
