"""What a document must be like to be learned from. Worker processes judge each; those left out are counted by reason.

The limits of length, symbols and repetition (after Gopher's, Rae et al. 2021) apply to texts only. Languages, copies and exam
questions are looked for in questions with answers as well.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from osler.config.schema import encode
from osler.data.config import CleanConfig
from osler.data.contamination import ExamIndex
from osler.data.duplicates import SHINGLE_WORDS, Rows, signatures
from osler.data.languages import check_languages, languages_of
from osler.data.ngrams import Hashes, Words
from osler.files.parts import File, LocalFile, Part
from osler.files.rows import read_rows
from osler.runtime.files import fingerprint, sha256_file
from osler.tasks.config import ExamFile
from osler.tasks.exam_files import read_exam
from osler.tasks.item import ExamItem

RULES = 2  # version of the rules; rules that judge in another way get another number, and so make other data
NEWER_FIELDS = {"fold": "all"}  # fields of exams that are left out at these values, at which they change nothing: for old shards
LANGUAGE_CHARACTERS = 400  # the start of a document, which decides its language
LANGUAGE_WORDS = 20  # in a document of fewer words the language would be a guess, so the document is kept
EXAM = "exam question"  # the reason why a document that contains one is dropped


class Look(NamedTuple):
    """What was found in a document: why it is left out ("" keeps it), and the ids of the exam items in it.

    Near copies are found by its `signature`, which is None where they are not looked for or the document is left out.
    """

    reason: str = ""
    exam_items: Sequence[str] = ()
    signature: Rows | None = None


KEEP = Look()


@dataclass(frozen=True)
class Exam:
    """An exam and the files that hold it, with their commit if they are from the hub."""

    task: ExamFile
    files: tuple[File, ...]
    commit: str = ""

    @property
    def items(self) -> list[ExamItem]:
        """Return the items, which are read from the files each time."""
        return read_exam(self.task, (row for file in self.files for row in read_rows(Part(file))))


@dataclass(frozen=True)
class Cleaner:
    """Looks at documents as a config says.

    Exams are read when they are first needed; once made, their index is sent along to other processes.
    """

    config: CleanConfig
    exams: tuple[Exam, ...] = ()  # those of the config

    @functools.cached_property
    def index(self) -> ExamIndex:
        """Return the items that are looked for."""
        return ExamIndex(item for exam in self.exams for item in exam.items)

    @functools.cached_property
    def options(self) -> dict[str, Any]:
        """Return what decides the outcome: the rules, the config, and the content of the files of exams."""
        exams = [
            {
                **{name: value for name, value in encode(exam.task).items() if NEWER_FIELDS.get(name, ...) != value},
                "path": fingerprint(
                    [sha256_file(file.path) if isinstance(file, LocalFile) else file.stamp for file in exam.files]
                ),
            }
            for exam in self.exams
        ]
        return {"rules": RULES, **encode(self.config), "exams": exams}

    def looks(self, documents: Sequence[Sequence[str]]) -> list[Look]:
        """Judge documents, each given by its texts: one text, or question, reasoning (if any) and answer."""
        config, texts = self.config, ["\n".join(document) for document in documents]
        words = Words(texts)
        items = self.index.find(words) if self.exams else {}
        counts, letters = words.counts.tolist(), words.letters.tolist()
        shingles = [words.sequences_of(number, SHINGLE_WORDS) for number in range(len(texts))]
        reasons = [
            self._quality(*judged) if len(document) == 1 else ""
            for document, *judged in zip(documents, texts, counts, letters, shingles, strict=True)
        ]
        if config.languages:
            long = [number for number, reason in enumerate(reasons) if not reason and counts[number] >= LANGUAGE_WORDS]
            languages = languages_of([texts[number][:LANGUAGE_CHARACTERS] for number in long])
            for number, language in zip(long, languages, strict=True):
                reasons[number] = "" if language in config.languages else f"language {language}"
        if config.exam_questions == "drop":
            reasons = [reason or (EXAM if number in items else "") for number, reason in enumerate(reasons)]
        kept = [own for own, reason in zip(shingles, reasons, strict=True) if not reason]
        rows = iter(signatures(kept) if config.duplicates == "near" else ())
        return [
            Look(reason, items.get(number, ()), None if reason else next(rows, None)) for number, reason in enumerate(reasons)
        ]

    def _quality(self, text: str, count: int, letters: int, shingles: Hashes) -> str:
        """Return why a text with `count` words, and `letters` letters in them, is left out; "" when it is kept."""
        config = self.config
        if count < config.min_words:
            return "too short"
        if config.max_words is not None and count > config.max_words:
            return "too long"
        if config.max_symbols < 1:
            visible = len(text) - sum(map(text.count, " \n\t\r\u00a0"))
            if visible - letters > config.max_symbols * visible:
                return "too many symbols"
        if config.max_repetition < 1:
            ordered = np.sort(shingles)
            if np.count_nonzero(ordered[1:] == ordered[:-1]) > config.max_repetition * len(shingles):
                return "repetitive"
        return ""


def check_clean(config: CleanConfig, key: str) -> None:
    """Raise UserError when a package that cleaning needs is missing, or a language is unknown.

    ``key`` is the section's place in the config.
    """
    if config.duplicates == "near":
        signatures([np.zeros(1, np.uint64)])
    if config.languages:
        check_languages(config.languages, f"{key}.languages")
