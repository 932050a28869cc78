"""From a data config to documents: one table from config class to the function that opens it.

A source gives train documents and either validation documents of its own (the clinic, whose exam splits are disjoint by
construction) or None, and then `holdout_fraction` of the train documents is held out by `osler.data.prepare`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osler.clinic.drills import cards, drills
from osler.clinic.textbook import textbook
from osler.data.config import ClinicData, FilesData, TurnsData
from osler.data.documents import Document
from osler.data.prepare import Prepared, held_out, prepare
from osler.data.readers import TextFiles, TurnFiles
from osler.errors import UserError
from osler.tasks.clinic import convert
from osler.tasks.clinic import load as load_clinic_exam
from osler.tasks.item import ExamItem, render_answer, render_question
from osler.tokenizer.bpe import Tokenizer
from osler.tokenizer.chat import Turn
from osler.tokenizer.train import train

SAMPLE_CHARS = 1 << 16  # a sample for the tokenizer takes or leaves so many characters at a time
VALIDATION_SEED_SHIFT = 1_000_003  # other passages for validation than any nearby train seed gives


@dataclass(frozen=True)
class Source:
    """Documents of a config; both iterables can be iterated again and give the same."""

    train: Iterable[Document]
    validation: Iterable[Document] | None
    holdout_fraction: float
    seed: int


def open_clinic(data: ClinicData) -> Source:
    """Render the clinic's textbook, exam samples and drills."""
    train = clinic_documents(data.seed, data.passages, "train", data.examples)
    train += [Document(text=text, source="clinic cards", collection="cards") for text in cards(data.seed, data.cards)]
    train += [worked(convert(item), "drills") for item in drills(data.seed, data.drills)]
    validation = clinic_documents(
        data.seed + VALIDATION_SEED_SHIFT, data.validation_passages, "validation", data.validation_examples
    )
    return Source(train, validation or None, 0.0, data.seed)


def clinic_documents(seed: int, passages: int, split: str, examples: int) -> list[Document]:
    """Return `passages` of textbook and `examples` of an exam split, each example a turn with its reasoning."""
    book = textbook(seed, passages)
    documents = [Document(text=text, source="clinic textbook", collection="textbook") for text in book]
    for item in load_clinic_exam(split=split, limit=examples, seed=seed):
        documents.append(worked(item, "examples"))
    return documents


def worked(item: ExamItem, collection: str) -> Document:
    """An exam item with its reasoning and answer, as a document to learn from."""
    turn = Turn(render_question(item), item.thinking, render_answer(item))
    return Document(turn=turn, source=item.id, collection=collection)


def open_files(data: FilesData) -> Source:
    """Read text of one's own."""
    return Source(TextFiles(data.path, data.field), None, data.holdout_fraction, data.seed)


def open_turns(data: TurnsData) -> Source:
    """Read questions and answers of one's own."""
    files = TurnFiles(data.path, data.question_field, data.thinking_field, data.answer_field)
    return Source(files, None, data.holdout_fraction, data.seed)


SOURCES: dict[type, Callable[[Any], Source]] = {
    ClinicData: open_clinic,
    FilesData: open_files,
    TurnsData: open_turns,
}


def open_source(data: ClinicData | FilesData | TurnsData) -> Source:
    """Open the source that a config describes; files are read when it is iterated."""
    return SOURCES[type(data)](data)


def check_source(data: ClinicData | FilesData | TurnsData) -> None:
    """Raise UserError when the files of a config are not there, hold nothing, or their first document cannot be read."""
    if isinstance(data, ClinicData):
        return
    empty = 0
    for document in open_source(data).train:
        if not document.is_empty:
            return
        empty += 1
    found = f"of {empty:,} documents {empty:,} are empty" if empty else "there are no documents"
    raise UserError(f"There is nothing to learn from: {found} in data.path={data.path}.")


def prepare_source(
    data: ClinicData | FilesData | TurnsData,
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    set_aside: bool = False,
    consent: str = "",
) -> Prepared:
    """Prepare the data of a config into the folder `out`; see `osler.data.prepare.prepare`."""
    check_source(data)
    source = open_source(data)
    return prepare(
        source.train,
        tokenizer,
        out,
        validation=source.validation,
        holdout_fraction=source.holdout_fraction,
        seed=source.seed,
        set_aside=set_aside,
        consent=consent,
    )


def train_tokenizer(data: ClinicData | FilesData | TurnsData, vocab_size: int, *, max_bytes: int) -> Tokenizer:
    """Train a tokenizer on a source's train documents, on about `max_bytes` of them when they are more.

    What `prepare` will hold out is left out here too. The sample is spread evenly and the same every time.
    """
    check_source(data)
    source = open_source(data)
    held = frozenset() if source.validation is not None else held_out(source.train, source.holdout_fraction, source.seed)
    total = sum(
        len(part.encode("utf-8", "replace"))
        for document in source.train
        if document.split_key() not in held
        for part in document.parts
    )
    kept = (document for document in source.train if document.split_key() not in held)
    return train(_sample(kept, max_bytes / total), vocab_size)


def _sample(documents: Iterable[Document], share: float) -> Iterator[str]:
    """About a share of the text, in pieces drawn by a hash of their document's content and place; at least one piece."""
    taken = False
    for document in documents:
        digest = document.exact_digest()
        pieces = [part[i : i + SAMPLE_CHARS] for part in document.parts for i in range(0, len(part), SAMPLE_CHARS)]
        for number, piece in enumerate(document.parts if share >= 1 else pieces):
            draw = int.from_bytes(hashlib.sha256(digest + number.to_bytes(8, "big")).digest()[:8], "big") / 2**64
            if draw < share or not taken:
                taken = True
                yield piece
