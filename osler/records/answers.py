"""The answers of a model to an exam. Their file grows during the exam, so an interrupted exam continues where it stopped.

    answers/sft-medqa-letters.jsonl:
    {"label": "sft", "exam": "medqa", "method": "letters", "checkpoint": "step-000000400", "settings": {"permutations": 1, ...},
     "asked": 500, "identity": "3fd1..."}
    {"number": 0, "output": [[-1.25, 1, 1], ...], "id": "medqa-9e21aa", "question": "...", "correct": false, ...}

The first line names the model, the exam, the method and what else decides how questions are asked. ``identity`` is a hash of the
checkpoint, the questions as they are shown, and the settings. If the first line is the same and answers are missing, an exam
continues with the file. Otherwise it begins again, but a pipeline takes a full file as it is. ``output`` is what the model gave.
The report and `osler compare` read the fields after it.
"""

import logging
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from osler.records import jsonl
from osler.records.results import SampledAnswer
from osler.records.values import as_dict, as_text, from_json
from osler.runtime.errors import UserError
from osler.runtime.files import write_atomic

logger = logging.getLogger(__name__)


class AnswerLog:
    """The outputs of a model so far, by the number of the question. With ``path`` a file with the first line ``head`` keeps them.

    After each answer ``tell`` is called with the number of answers. A file that has all answers, or those of another exam, is
    begun again; if it cannot be written, the exam goes on without it. If ``takes_full``, a file that has all answers is taken as
    it is, and so is a ``lasting`` file, which is the product of its command. A lasting file with other answers is refused with
    UserError, and one that cannot be written raises OSError.
    """

    def __init__(
        self,
        path: Path | None = None,
        head: Mapping[str, Any] | None = None,
        tell: Callable[[int], None] | None = None,
        *,
        lasting: bool = False,
        takes_full: bool = False,
    ) -> None:
        self.outputs: dict[int, list[Any]] = {}
        self._path, self._tell, self._lasting = path, tell, lasting
        if path is None or head is None:
            return
        first, *rows = jsonl.read(path)[0] or [{}]
        known = {row["number"]: row["output"] for row in rows if {"number", "output"} <= row.keys()} if first == head else {}
        if lasting and rows and first != head:
            raise UserError(
                f"{path} has {len(rows):,} answers of another model, to other questions or with other settings, which would be "
                "lost: name another file to write, or delete this one."
            )
        most_known = head["asked"] if lasting or takes_full else head["asked"] - 1  # with more answers the file is begun again
        if 0 < len(known) <= most_known:
            self.outputs = known
            logger.info(f"Going on after {len(known):,} of {head['asked']:,} answers, which {path} has.")
        elif first != head or not lasting:  # a lasting file without answers may be one that another process has just begun
            self._write(lambda to: write_atomic(to, jsonl.to_line(head)))

    def add(self, number: int, output: list[Any], answer: SampledAnswer) -> None:
        """Keep the output of the model for the question of this number, and the answer that was read from it."""
        if number not in self.outputs:
            self.outputs[number] = output
            self._write(lambda to: jsonl.append(to, {"number": number, "output": output, **asdict(answer)}))
            if self._tell:
                self._tell(len(self.outputs))

    def _write(self, write: Callable[[Path], None]) -> None:
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(exist_ok=True)
            write(self._path)
        except OSError as error:
            if self._lasting:
                raise
            logger.warning(f"{self._path} cannot be written ({error.strerror}); an interrupted exam would begin again.")
            self._path = None


def answers_file(folder: Path, head: Mapping[str, str]) -> Path:
    """Return the file for the answers of the label, to the exam and by the method that ``head`` has, in this order."""
    name = re.sub(r"[^\w.]+", "-", " ".join(head.values()))
    return folder / f"{name}.jsonl"


def ids_asked(file: Path, checkpoint: str) -> set[str]:
    """Return the ids of the questions that a checkpoint has answered in a file; none if it has not, or is unreadable."""
    with suppress(UserError):
        head, *rows = jsonl.read(file)[0] or [{}]
        if head.get("checkpoint") == checkpoint:
            return {as_text(row.get("id")) for row in rows}
    return set()


def asked_differently(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Return in words the settings in which two exams differ. If it is empty, answers to the same question can be compared.

    A setting that one of the two lacks, because an older version did not write it, is left out.
    """
    differing = sorted(name for name in before.keys() & after if before[name] != after[name])
    return ", ".join(f"{name}={before[name]} and {name}={after[name]}" for name in differing)


class AnswerSheet(NamedTuple):
    """All answers of a checkpoint to an exam; ``checkpoint`` is the name of its folder."""

    label: str
    exam: str
    method: str
    checkpoint: str
    answers: list[SampledAnswer]
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The exam and how it was asked."""
        return self.exam if self.method == "generation" else f"{self.exam}, {self.method}"

    @property
    def is_of_run(self) -> bool:
        """Whether the run itself sat the exam, with its newest checkpoint, and not an earlier step of it."""
        return "," not in self.label


def read_sheets(folder: Path) -> list[AnswerSheet]:
    """Return the answers to all finished exams in the order of file names; raises UserError when a file cannot be read."""
    sheets = []
    for path in sorted(folder.glob("*.jsonl")):
        head, *rows = jsonl.read(path)[0] or [{}]
        answers = [from_json(SampledAnswer, row) for row in {as_text(row.get("number")): row for row in rows}.values()]
        if 0 < len(answers) == head.get("asked"):
            label, exam, method, checkpoint = (as_text(head.get(key)) for key in AnswerSheet._fields[:4])
            sheets.append(AnswerSheet(label, exam, method, checkpoint, answers, as_dict(head.get("settings"))))
    return sheets
