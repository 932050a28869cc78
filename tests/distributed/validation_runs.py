"""Runs with validation sets on two ranks, while their data stream and in bf16: the same scores as on one, in the run and alone.

validation_runs.py RECIPE FOLDER
"""

import json
import math
import sys
from pathlib import Path

import torch.distributed.fsdp  # noqa: F401 - loaded once for every fork
from forks import report, said, train
from run_folders import logged

import osler.train.run  # noqa: F401
from osler.clinic.textbook import textbook

NAMES = ("medicine", "general")


def evaluated(folder: Path) -> list[dict[str, float]]:
    """The losses of every evaluation of a run."""
    lines = [line for line in logged(folder) if "eval/loss" in line]
    return [{name: line[name] for name in line if name.startswith("eval/") and name.endswith("/loss")} for line in lines]


def near(found: dict[str, float], expected: dict[str, float], tolerance: float) -> bool:
    assert found.keys() == expected.keys() == {"eval/loss", *(f"eval/{name}/loss" for name in NAMES)}
    return all(math.isclose(found[name], expected[name], rel_tol=tolerance) for name in found)


def same(command: list[str], folder: Path, alone: Path, tolerance: float) -> None:
    """Two ranks find what one found, and measure their last checkpoint alone as they did in the run."""
    assert train(command, folder, 2) == [0, 0], said(folder, 0)[-2000:]
    assert said(folder, 1) == "", "another rank than 0 spoke"
    found, expected = evaluated(folder), evaluated(alone)
    assert len(found) == len(expected) == 2
    assert all(near(*pair, tolerance) for pair in zip(found, expected, strict=True)), f"{found} instead of {expected}"
    assert train(["pretrain", "--eval-only"], folder, 2) == [0, 0], said(folder, 0)[-2000:]
    [measured] = json.loads((folder / "evaluations.json").read_text()).values()
    losses = {f"eval/{name}/loss": values["loss"] for name, values in measured["sets"].items()}
    assert near({**losses, "eval/loss": measured["together"]["loss"]}, found[-1], 1e-6), f"{measured} instead of {found[-1]}"


def main(recipe: str, root: Path) -> None:
    general = [f"The ferry number {number} leaves the harbour at noon and returns at dusk. " * 3 for number in range(12)]
    for name, texts in {"book": textbook(0, 60), "medicine": textbook(1, 30), "general": general}.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sets = [{"name": name, "type": "files", "path": str(root / f"{name}.jsonl")} for name in NAMES]
    command = ["pretrain", recipe, "data.type=files", f"data.path={root / 'book.jsonl'}", f"validation={json.dumps(sets)}"]
    alone = root / "alone"
    assert train(command, alone, 1) == [0], said(alone, 0)[-2000:]
    report("ddp", same, [*command, "parallel.type=ddp", "data.streaming=true"], root / "ddp", alone, 1e-6)
    report("fsdp", same, [*command, "parallel.type=fsdp", "precision=bf16"], root / "fsdp", alone, 1e-2)


main(sys.argv[1], Path(sys.argv[2]))
