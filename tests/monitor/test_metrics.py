"""The table of metrics: names resolve, and the code logs nothing that the table does not declare."""

import re
from pathlib import Path

import pytest

import osler
from osler.monitor.metrics import METRICS, declared_name, describe, table
from osler.runtime.errors import UserError

PACKAGE = Path(osler.__file__).parent if osler.__file__ else Path(next(iter(osler.__path__)))


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


def test_every_metric_that_the_code_names_is_declared() -> None:
    """Texts of the form `area/...`: of what is logged, and of what rules and charts ask for, by name or by its beginning."""
    areas = "|".join({name.split("/")[0] for name in METRICS if "/" in name})
    rows = [re.sub("<.*?>", "x", row) for row in METRICS]
    named = {
        (path.relative_to(PACKAGE), name)
        for path in PACKAGE.rglob("*.py")
        for name in re.findall(rf'"((?:{areas})/[^"\s*]*)"', path.read_text(encoding="utf-8"))
    }
    assert {"train/loss", "eval/{self.exam_name}_unparsed_frac", "perf/other_cpus", "grad/norm/"} < {name for _, name in named}
    for path, name in named:
        pattern = re.sub(r"\\{.*?\\}", ".+", re.escape(re.sub("<.*?>", "x", name))) + (".*" if name.endswith("/") else "")
        assert declared_name(name) or any(re.fullmatch(pattern, row) for row in rows), f"{path}: {name} is not in METRICS"
