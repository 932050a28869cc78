"""The table of metrics: names resolve, and the code logs nothing that the table does not declare."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import osler
from osler.monitor import history, rules
from osler.monitor.metrics import METRICS, declared_name, describe, table
from osler.runtime.errors import UserError

PACKAGE = Path(osler.__file__).parent if osler.__file__ else Path(next(iter(osler.__path__)))
AREAS = {name.split("/")[0] for name in METRICS if "/" in name}


def test_names_resolve_to_their_row() -> None:
    rows = {"kl": "kl", "eval/clinic-unseen_accuracy": "eval/<split>_accuracy", "rewards/correct/mean": "rewards/<name>/mean"}
    wrong = dict.fromkeys(("", "loss/train", "eval/a/b_accuracy", "train/losss", "eval/_accuracy"))
    for name, row in {**rows, **wrong}.items():
        assert declared_name(name) == row and describe(name) == METRICS.get(row or ""), name


def test_the_printed_table_has_every_row_or_those_with_a_word() -> None:
    assert [line.split()[0] for line in table().splitlines()] == list(METRICS)
    assert {line.split()[0] for line in table("Gradient").splitlines()} > {"train/grad_norm", "grad/mean", "train/skipped_steps"}
    assert all("full: weights" in line for line in table("effective").splitlines() if line.startswith("model/"))
    with pytest.raises(UserError, match="No metric has `nonsense`"):
        table("nonsense")


def test_the_rules_read_declared_metrics() -> None:
    """What the rules and the history ask for by name: a subscript, or the first argument of a call."""
    names = set(history.STEP_TIMES)
    for module in (history, rules):
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))):
            asked = [node.slice] if isinstance(node, ast.Subscript) else node.args[:1] if isinstance(node, ast.Call) else []
            names |= {arg.value for arg in asked if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    names -= {"d", "/"}
    assert {"grad/norm/", "model/dead_units_frac/", "answer/correct_frac"} < names
    assert [name for name in names if declared_name(f"{name}0" if name.endswith("/") else name) is None] == []


def logged_names(source: str) -> set[str]:
    """Texts of the form `area/...` that are keys of a dict or a subscript; a placeholder of an f-string reads as x."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        keys = node.keys if isinstance(node, ast.Dict) else [node.slice] if isinstance(node, ast.Subscript) else []
        for key in keys:
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                names.add(key.value)
            elif isinstance(key, ast.JoinedStr):
                names.add("".join(str(part.value) if isinstance(part, ast.Constant) else "x" for part in key.values))
    return {n for n in names if n.split("/")[0] in AREAS and re.fullmatch(r"[\w.\-]+(/[\w.\-]+)+", n)}


def test_every_metric_the_code_logs_is_declared() -> None:
    logged = {path: logged_names(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
    assert {"train/loss", "eval/x_unparsed_frac", "perf/other_cpus"} < set().union(*logged.values()), "the scan sees all forms"
    undeclared = [f"{path.relative_to(PACKAGE)}: {name}" for path in logged for name in logged[path] if not declared_name(name)]
    assert not undeclared, f"declare these in osler/monitor/metrics.py: {undeclared}"
