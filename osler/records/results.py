"""The results of a run, in the files that the report reads. A field that a file of an older version lacks is NaN or empty.

``exams.json`` is {label of a checkpoint: {split: score}}, ``comparison.json`` a list of pairs of checkpoints, ``samples.jsonl``
the answers of checkpoints to a few questions, ``stages.json`` the finished stages of a pipeline in their order. Accuracies,
intervals and differences are fractions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from osler.records import jsonl
from osler.records.values import NAN, as_dict, from_json
from osler.runtime.errors import UserError
from osler.runtime.files import read_json, write_json


class HasInterval:
    """A record with an ``interval``, by the names of its ends."""

    interval: tuple[float, float]

    @property
    def low(self) -> float:
        return self.interval[0]

    @property
    def high(self) -> float:
        return self.interval[1]


@dataclass(frozen=True)
class ExamScore(HasInterval):
    """The accuracy of a checkpoint on a split: ``n`` questions, asked ``presentations`` times in all option orders together."""

    label: str = ""  # the label of the checkpoint; it and the split are empty until the score is saved
    split: str = ""
    method: str = ""  # how the questions were asked
    n: float = NAN
    presentations: float = NAN  # ``correct`` and the other counts count these
    correct: float = NAN
    accuracy: float = NAN
    interval: tuple[float, float] = (NAN, NAN)  # 95 %, aware of clusters
    unparsed: float = NAN  # answers that ended by themselves, but cannot be read
    cut: float = NAN  # answers that met the length limit before they could be read
    too_long: float = NAN  # questions that did not fit into the model's context
    max_seq_len: float = NAN  # tokens that a question had to share with its answer; 0: not known
    letters: dict[str, float] = field(default_factory=dict)  # how often each letter was answered
    constant_letter: str = ""  # the letter that would score best if it were always said, and its accuracy
    constant_letter_baseline: float = NAN
    chance: float = NAN
    groups: dict[str, Any] = field(default_factory=dict)  # n, correct, accuracy and interval of each group of questions
    measures: dict[str, Any] = field(default_factory=dict)  # value, interval and n of pass@k, accuracy at coverage and so on


@dataclass(frozen=True)
class Comparison(HasInterval):
    """Two checkpoints on the same questions: the paired difference and its interval."""

    split: str = ""
    before: float = NAN
    after: float = NAN
    difference: float = NAN
    interval: tuple[float, float] = (NAN, NAN)
    n: float = NAN
    before_label: str = ""
    after_label: str = ""
    branch: bool = False  # whether ``after`` started from another checkpoint than the newest of the stage before it


@dataclass(frozen=True)
class SampledAnswer:
    """One question, and the answer of one checkpoint."""

    id: str = ""  # the question's
    stage: str = ""  # label of the checkpoint
    question: str = ""
    options: list[str] = field(default_factory=list)
    thinking: str = ""
    answer: str = ""
    correct_answer: str = ""
    correct: bool | None = None  # None: nobody judged it
    confidence: float = NAN  # the probability that the model gives its answer among the options
    cluster: str = ""  # questions that depend on each other have the same cluster


@dataclass(frozen=True)
class FinishedStage:
    """A stage that is done: how long it took, and what it did."""

    name: str = ""
    seconds: float = NAN
    what: str = ""


def read_exams(path: Path) -> list[ExamScore]:
    """Return the scores of an ``exams.json`` in its order, none when there is no file; raises UserError when it is damaged."""
    table = as_dict(read_json(path)) if path.exists() else {}
    return [
        replace(from_json(ExamScore, row), label=label, split=split)
        for label, splits in table.items()
        for split, row in as_dict(splits).items()
        if isinstance(row, dict)
    ]


def add_exams(path: Path, label: str, scores: Mapping[str, ExamScore], *, last: str = "") -> None:
    """Add a checkpoint's scores by split to an ``exams.json``, beside those that the file holds.

    The checkpoint labelled ``last``, if there is one, moves to the end of the table, because the report leads with the last one.
    Raises UserError when the file is damaged.
    """
    table = read_json(path) if path.exists() else {}
    if not isinstance(table, dict):
        raise UserError(f"{path} is not a table of scores; move it away and evaluate again.")
    names = [name for name in ExamScore.__dataclass_fields__ if name not in ("label", "split")]
    rows = {split: {name: getattr(score, name) for name in names} for split, score in scores.items()}
    table[label] = as_dict(table.get(label)) | rows
    if last in table:
        table[last] = table.pop(last)
    write_json(path, table)


def read_samples(path: Path) -> tuple[list[SampledAnswer], int]:
    """Return the answers of a file, and how many of its lines before the last are unreadable."""
    rows, unreadable = jsonl.read(path)
    return [from_json(SampledAnswer, row) for row in rows], unreadable
