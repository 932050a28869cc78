"""From a data config to a corpus: one table from config class to the function that opens it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from osler.clinic.exam import drills
from osler.clinic.textbook import cards, textbook
from osler.data.config import ClinicData, FilesData, TurnsData
from osler.data.documents import Corpus, Document
from osler.data.prepare import Prepared, held_out, prepare
from osler.data.readers import TextFiles, TurnFiles
from osler.runtime.errors import UserError
from osler.tasks.item import ExamItem, render_answer, render_question
from osler.tasks.registry import exam_item, load_clinic
from osler.tokenizer.bpe import Tokenizer, train
from osler.tokenizer.chat import Turn

SAMPLE_CHARS = 1 << 16  # the sample for a tokenizer takes or leaves pieces of this length
VALIDATION_SEED_SHIFT = 1_000_003  # so that no nearby seed for training gives the passages of validation


def open_clinic(data: ClinicData) -> Corpus:
    """Render the clinic's textbook, exam questions with reasoning, and drills."""
    train = _clinic_documents(data.seed, data.passages, "train", data.examples)
    train += [Document(text=text, where="clinic cards", source="cards") for text in cards(data.seed, data.cards)]
    train += [_worked_example(exam_item(item), "drills") for item in drills(data.seed, data.drills)]
    seed = data.seed + VALIDATION_SEED_SHIFT
    validation = _clinic_documents(seed, data.validation_passages, "validation", data.validation_examples)
    return Corpus(train, validation or None, 0.0, data.seed)


def _clinic_documents(seed: int, passages: int, split: str, examples: int) -> list[Document]:
    items = load_clinic(split=split, limit=examples, seed=seed)
    return [
        *(Document(text=text, where="clinic textbook", source="textbook") for text in textbook(seed, passages)),
        *(_worked_example(item, "examples") for item in items),
    ]


def _worked_example(item: ExamItem, source: str) -> Document:
    turn = Turn(render_question(item), item.thinking, render_answer(item))
    return Document(turn=turn, where=item.id, source=source)


def open_files(data: FilesData) -> Corpus:
    """Read text of one's own."""
    return Corpus(TextFiles(data.path, data.field), None, data.holdout_fraction, data.seed)


def open_turns(data: TurnsData) -> Corpus:
    """Read questions and answers of one's own."""
    files = TurnFiles(data.path, data.question_field, data.thinking_field, data.answer_field)
    return Corpus(files, None, data.holdout_fraction, data.seed)


CORPORA: dict[type, Callable[[Any], Corpus]] = {ClinicData: open_clinic, FilesData: open_files, TurnsData: open_turns}


def open_corpus(data: ClinicData | FilesData | TurnsData) -> Corpus:
    """Open the corpus that a config describes; files are read when it is iterated."""
    return CORPORA[type(data)](data)


def check_source(data: ClinicData | FilesData | TurnsData) -> None:
    """Raise UserError when the files of a config do not exist, hold nothing, or their first document cannot be read."""
    if isinstance(data, ClinicData):
        return
    empty = 0
    for document in open_corpus(data).train:
        if not document.is_empty:
            return
        empty += 1
    found = f"of {empty:,} documents {empty:,} are empty" if empty else "there are no documents"
    raise UserError(f"There is nothing to learn from: {found} in data.path={data.path}.")


def prepare_source(
    data: ClinicData | FilesData | TurnsData, tokenizer: Tokenizer, out: str | Path, *, set_aside: bool = False, consent: str = ""
) -> Prepared:
    """Prepare the data of a config into the folder `out`; see `osler.data.prepare.prepare`."""
    check_source(data)
    return prepare(open_corpus(data), tokenizer, out, set_aside=set_aside, consent=consent)


def train_tokenizer(data: ClinicData | FilesData | TurnsData, vocab_size: int, *, max_bytes: int) -> Tokenizer:
    """Train a tokenizer on the training documents of a config, or on an even sample of about `max_bytes` of them.

    Documents that `prepare` will hold out are left out. The sample is the same every time.
    """
    check_source(data)
    corpus = open_corpus(data)
    held = held_out(corpus) if corpus.validation is None else frozenset()

    def documents() -> Iterator[Document]:
        return (document for document in corpus.train if document.split_key() not in held)

    total = sum(len(part.encode("utf-8", "replace")) for document in documents() for part in document.parts)
    return train(_sample(documents(), max_bytes / total), vocab_size)


def _sample(documents: Iterable[Document], share: float) -> Iterator[str]:
    """Yield about a share of the text, in pieces drawn by a hash of document and place; at least one piece."""
    taken = False
    for document in documents:
        digest = document.exact_digest()
        pieces = [part[i : i + SAMPLE_CHARS] for part in document.parts for i in range(0, len(part), SAMPLE_CHARS)]
        for number, piece in enumerate(document.parts if share >= 1 else pieces):
            draw = int.from_bytes(hashlib.sha256(digest + number.to_bytes(8, "big")).digest()[:8], "big") / 2**64
            if draw < share or not taken:
                taken = True
                yield piece
