"""Files of JSON lines: what a kill tore costs itself only, and what a reader meets never stops it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from osler.records import jsonl
from osler.records.metrics import read_metrics
from osler.records.samples import read_samples
from osler.records.values import NAN, from_json, to_json
from osler.runtime.errors import UserError

ODD = b'[1]\n{}\n"text"\n\xff\xfe\n' + b"[" * 100_000 + b'\n{"step": 1e300}\n{"step": null}\n{"step": 2}\n{"step": 3'


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(ODD)
    return path


def test_what_is_no_object_is_passed_over(odd: Path) -> None:
    found, unreadable = jsonl.read(odd)
    assert found == [{}, {"step": 1e300}, {"step": None}, {"step": 2}] and unreadable == 4
    assert [line.step for line in read_metrics(odd)] == [2]
    assert jsonl.read(odd.with_name("none")) == ([], 0)
    with pytest.raises(UserError, match="cannot be read"):
        jsonl.read(odd.parent)


def test_a_sample_without_an_id_is_known_by_its_question(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text('{"id": null, "question": "a"}\n{"question": "b"}\n{"id": "c", "question": "d"}\n')
    assert [sample.id for sample in read_samples(tmp_path / "samples.jsonl")[0]] == ["a", "b", "c"]


def test_appending_ends_a_torn_line_first(odd: Path) -> None:
    jsonl.append(odd, {"step": 4, "name": "\udc80 é"})  # as of a file whose name is not UTF-8
    assert jsonl.read(odd)[0][-1] == {"step": 4, "name": "\udc80 é"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        jsonl.append(odd, {"step": 5, "loss": float("nan")})


def test_splitting_keeps_torn_lines_with_the_earlier_ones(odd: Path) -> None:
    jsonl.append(odd, {"step": 4})
    kept, later = jsonl.split(odd, 2)
    assert later == [b'{"step": 4}\n'] and b"".join(kept) == ODD + b"\n"


def test_only_lines_with_a_metric_are_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows: list[dict[str, object]] = [{"step": 1, "loss": 2.0}, {"step": 2, "eval": 1.0}, {"step": 3, "note": "eval"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [line.step for line in read_metrics(path, having="eval")] == [2]


@dataclass
class Record:
    name: str = ""
    score: float = NAN
    counts: dict[str, float] = field(default_factory=dict)
    options: list[str] = field(default_factory=list)
    right: bool | None = None


@pytest.mark.parametrize("raw", [None, 3, "text", [1], {"a": 1}, True, float("inf"), 10**400])
def test_a_record_takes_whatever_a_file_holds(raw: Any) -> None:
    record = from_json(Record, dict.fromkeys(("name", "score", "counts", "options", "right", "unknown"), raw))
    assert isinstance(record.name, str) and isinstance(record.score, float) and record.right in (None, True)
    assert from_json(Record, json.loads(json.dumps(to_json(record)))).name == record.name
    assert to_json(Record())["score"] is None
