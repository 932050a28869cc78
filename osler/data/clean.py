"""What a document must be like to be learned from. Worker processes look at each; what is left out is counted by reason.

The limits of length, symbols and repetition (after Gopher's, Rae et al. 2021) are of texts. Languages, copies and exam questions
are looked for in questions with answers as well.
"""

from __future__ import annotations

import functools
import locale
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from osler.config.schema import encode
from osler.data.config import CleanConfig
from osler.data.contamination import ExamIndex
from osler.data.duplicates import SHINGLE_WORDS, Rows, signature
from osler.data.ngrams import prefix_sums, sequences, words_of
from osler.files.find import ROW_ENDINGS, find_files
from osler.runtime.errors import UserError
from osler.runtime.files import fingerprint, sha256_file
from osler.tasks.exam_files import load_exam_file

LANGUAGE_CHARACTERS = 400  # from the start of a document, by which its language is told
LANGUAGE_WORDS = 20  # the language of fewer is a guess
EXAM = "exam question"  # the reason why a document that contains one is dropped


class Look(NamedTuple):
    """What was found of a document: why it is left out ("" keeps it), and the ids of the exam items in it.

    `signature` is what near copies of it are found by, None where they are not looked for.
    """

    reason: str
    exam_items: Sequence[str]
    signature: Rows | None


@dataclass(frozen=True)
class Cleaner:
    """Looks at documents as a config says; each process reads exams and models when it first needs them."""

    config: CleanConfig

    @functools.cached_property
    def exams(self) -> ExamIndex:
        """Return the items that are looked for."""
        return ExamIndex(item for task in self.config.exams for item in load_exam_file(task))

    @functools.cached_property
    def options(self) -> dict[str, Any]:
        """Return what decides the outcome: the config, and the content of the files of exams."""
        options = encode(self.config)
        for task, entry in zip(self.config.exams, options["exams"], strict=True):
            files = find_files(task.path, ROW_ENDINGS, key="clean.exams.path")
            entry["path"] = fingerprint([sha256_file(file) for file in files])
        return options

    def look(self, parts: Sequence[str]) -> Look:
        """Judge a document by its text, or by its question, reasoning and answer."""
        config, text = self.config, "\n".join(parts)
        words = words_of(text)
        sums = prefix_sums(words)
        items = self.exams.find(words, sums) if config.exams else []
        shingles = sequences(sums, min(SHINGLE_WORDS, max(1, len(words))))
        reason = self._quality(text, words, shingles) if len(parts) == 1 else ""
        if not reason and config.languages and len(words) >= LANGUAGE_WORDS:
            language = _language(text[:LANGUAGE_CHARACTERS])
            reason = f"language {language}" if language not in config.languages else ""
        if not reason and items and config.exam_questions == "drop":
            reason = EXAM
        return Look(reason, items, signature(shingles) if config.duplicates == "near" and not reason else None)

    def _quality(self, text: str, words: Sequence[str], shingles: np.ndarray[Any, np.dtype[np.uint64]]) -> str:
        config = self.config
        if len(words) < config.min_words:
            return "too short"
        if config.max_words is not None and len(words) > config.max_words:
            return "too long"
        if config.max_symbols < 1:
            visible = len(text) - sum(map(text.count, " \n\t\r\u00a0"))
            if visible - sum(map(len, words)) > config.max_symbols * visible:
                return "too many symbols"
        if config.max_repetition < 1 and len(shingles) - len(np.unique(shingles)) > config.max_repetition * len(shingles):
            return "repetitive"
        return ""


def check_clean(config: CleanConfig, key: str) -> None:
    """Raise UserError when a package that cleaning needs is missing, or a language is none that can be told.

    ``key`` is where the config has it.
    """
    if config.duplicates == "near":
        signature(np.zeros(1, np.uint64))
    if not config.languages:
        return
    _language("")
    import py3langid

    known = sorted(code for code, _ in py3langid.rank(""))
    for name in config.languages:
        if name not in known:
            code = locale.locale_alias.get(name.lower(), "")[:2]  # such as en_EN.ISO8859-1 for english
            told = f"; did you mean `{code}`?" if code in known else f"; known: {', '.join(known)}"
            raise UserError(f"{key}.languages: `{name}` is not the ISO 639-1 code of a language that can be told{told}")


def _language(text: str) -> str:
    """Return the ISO 639-1 code of the language of a text."""
    try:
        import py3langid
    except ImportError:
        raise UserError("Languages are told by py3langid: pip install 'osler[clean]', or leave clean.languages out.") from None
    return str(py3langid.classify(text)[0])
