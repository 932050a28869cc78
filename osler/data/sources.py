"""From a data config to a corpus: one table from config class to the function that opens it."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from osler.clinic.exam import drills
from osler.clinic.textbook import cards, textbook
from osler.config.schema import encode
from osler.data.clean import Cleaner, check_clean
from osler.data.config import (
    HUB,
    AnySource,
    CleanConfig,
    ClinicData,
    FilesData,
    HubData,
    Preparation,
    Sources,
    TextData,
    TurnsData,
    sets_of,
    sources_of,
)
from osler.data.content import difference_of, other_data
from osler.data.documents import Corpus, Document, in_memory
from osler.data.holdout import find_limits, hold_out, keys_of
from osler.data.named import named_files, open_exam, open_hub
from osler.data.prepare import prepare
from osler.data.prepared import Prepared
from osler.data.readers import TextFiles, read_turns
from osler.data.shards import DATA_MANIFEST, read_data_manifest
from osler.files.find import ROW_ENDINGS
from osler.files.parts import Parts, find_local
from osler.runtime.errors import UserError
from osler.tasks.config import HubExam
from osler.tasks.item import ExamItem, render_answer, render_question
from osler.tasks.registry import exam_item, load_clinic
from osler.tokenizer.bpe import Tokenizer
from osler.tokenizer.chat import Turn
from osler.tokenizer.config import BPEConfig, SuperBPEConfig
from osler.tokenizer.train import train

logger = logging.getLogger(__name__)

SAMPLE_CHARS = 1 << 16  # characters of a piece; the sample for a tokenizer takes or leaves whole pieces
SAMPLE_PARTS, SAMPLE_PART_CHARS = 64, 1 << 24  # at most: parts of a source in the sample, and characters of each part
FIRST_DOCUMENTS, FIRST_CHARS = 32, 1 << 16  # how much of a source is read before anything starts, whichever is less
VALIDATION_SEED_SHIFT = 1_000_003  # large, so that no nearby seed of a training run gives the validation passages


def open_clinic(data: ClinicData, key: str) -> Corpus:
    """Render the clinic's textbook, exam questions with reasoning, cards and drills."""

    def documents(seed: int, passages: int, examples: Iterable[ExamItem]) -> list[Document]:
        texts = [Document(text=text, where="clinic textbook") for text in textbook(seed, passages)]
        return [*texts, *(_worked_example(item, data.reasoning) for item in examples)]

    learned = documents(data.seed, data.passages, load_clinic(split="train", limit=data.examples, seed=data.seed))
    learned += [Document(text=text, where="clinic cards") for text in cards(data.seed, data.cards)]
    learned += documents(data.seed, 0, map(exam_item, drills(data.seed, data.drills)))
    seed = data.seed + VALIDATION_SEED_SHIFT
    items = load_clinic(split="validation", limit=data.validation_examples, seed=seed)
    validation = documents(seed, data.validation_passages, items)
    return in_memory(learned, in_memory(validation, seed=data.seed) if validation else None, 0.0, data.seed)


def _worked_example(item: ExamItem, reasoning: bool) -> Document:
    turn = Turn(render_question(item), item.thinking if reasoning else None, render_answer(item))
    return Document(turn=turn, where=item.id)


def open_files(data: FilesData, key: str) -> Corpus:
    """Open the user's own text."""
    reader = TextFiles(data.path, data.field, f"{key}.path", f"{key}.field")
    return Corpus(Parts(reader.files()), reader.read, {"field": data.field}, None, data.holdout_fraction, data.seed)


def open_turns(data: TurnsData, key: str) -> Corpus:
    """Open the user's own questions and answers."""
    files = find_local(data.path, ROW_ENDINGS, f"{key}.path")
    options = {"fields": [data.question_field, data.thinking_field, data.answer_field]}
    return Corpus(Parts(files), partial(read_turns, data, key), options, None, data.holdout_fraction, data.seed)


# From the class of a source to the function that opens it. Its second argument is the source's place in the config.
CORPORA: dict[type, Callable[[Any, str], Corpus]] = {
    ClinicData: open_clinic,
    FilesData: open_files,
    TurnsData: open_turns,
    HubData: open_hub,
}


def open_corpora(data: TextData, validation: Sources = ()) -> dict[str, Corpus]:
    """Open the corpora of the sources in a config, by name; files are read only when a corpus is read.

    With `validation` sets, nothing is held out of the corpora, because the sets are evaluated instead.
    """
    cleaners: dict[CleanConfig, Cleaner] = {}
    return {source.title: _open(data, source, key, cleaners, validation) for key, source in _keyed(data)}


def open_validation(data: TextData, validation: Sources) -> dict[str, Corpus]:
    """Open validation sets by name. A source that has validation documents of its own gives these, any other all documents."""
    return {source.title: _open_set(source, key) for key, source in _keyed(data, validation)}


def _open(data: TextData, source: AnySource, key: str, cleaners: dict[CleanConfig, Cleaner], validation: Sources) -> Corpus:
    corpus = _described(source, key)
    if validation:
        corpus = replace(corpus, validation=None, holdout_fraction=0.0)
    return replace(corpus, clean=_open_cleaner(data, source, key, cleaners))


def _open_set(source: AnySource, key: str) -> Corpus:
    corpus = _described(source, key)
    return replace(corpus.validation or corpus, holdout_fraction=0.0, about=corpus.about)


def _described(source: AnySource, key: str) -> Corpus:
    corpus = CORPORA[type(source)](source, key)
    licence = {"licence": source.licence} if source.licence else {}
    return replace(corpus, about={"config": encode(source, defaults=False), **corpus.about, **licence})


def _open_cleaner(data: TextData, source: AnySource, key: str, cleaners: dict[CleanConfig, Cleaner]) -> Cleaner | None:
    """Return the cleaner of a source; sources that are cleaned alike share one, which reads its exams once."""
    clean, where = source.clean, _key_of_clean(data, source, key)
    if clean is not None and clean not in cleaners:
        root = getattr(data, "root", "")
        exams = (open_exam(exam, root, f"{where}.exams[{number}]") for number, exam in enumerate(clean.exams))
        cleaners[clean] = Cleaner(clean, tuple(exams))
    return None if clean is None else cleaners[clean]


def _key_of_clean(data: TextData, source: AnySource, key: str) -> str:
    return f"{'data' if source.clean == data.clean else key}.clean"


def _keyed(data: TextData, validation: Sources | None = None) -> Iterator[tuple[str, AnySource]]:
    """Yield the place of each source in the config, and the source; with `validation`, the same of the validation sets."""
    sources = sources_of(data) if validation is None else sets_of(validation, data)
    section = "validation" if validation is not None else "data.sources"
    for number, source in enumerate(sources.values()):
        yield "data" if source is data else f"{section}[{number}]", source


def check_present(data: TextData, validation: Sources, out: Path, consent: str) -> None:
    """Raise UserError when a source on this machine differs from that in `out`; it names `consent`, which allows that."""
    cleaners: dict[CleanConfig, Cleaner] = {}
    data, validation = at_known_commits(data, validation, out, is_known=True)
    learned = [_open(data, source, key, cleaners, validation) if is_there(source) else None for key, source in _keyed(data)]
    sets = [_open_set(source, key) if is_there(source) else None for key, source in _keyed(data, validation)]
    what, difference = difference_of(out, learned, sets)
    if difference:
        raise other_data(out, what, difference, consent)


def is_there(source: AnySource) -> bool:
    """Return whether a source is on this machine; a source on the hub is not."""
    return isinstance(source, ClinicData) or (source.place != HUB and Path(source.place).exists())


def check_sources(data: TextData, validation: Sources = ()) -> None:
    """Raise UserError when the files of a source do not exist, hold nothing, or their first documents cannot be read.

    Raises it also when cleaning cannot be done as the config says, or when a source has `no_benchmark_contamination` but does not
    drop the questions of any exam.
    """
    cleaners: dict[CleanConfig, Cleaner] = {}
    for key, source in _keyed(data):
        clean = source.clean
        if clean is not None:
            check_clean(clean, _key_of_clean(data, source, key))
            _open_cleaner(data, source, key, cleaners)
        if source.no_benchmark_contamination and (clean is None or not clean.exams or clean.exam_questions != "drop"):
            raise UserError(
                f"The recipe claims no_benchmark_contamination, but {key} ({source.title}) does not drop the questions "
                f"of any exam: list exams in {key}.clean.exams with exam_questions=drop, or leave the claim out."
            )
    for key, source in [*_keyed(data), *_keyed(data, validation)]:
        if isinstance(source, ClinicData):
            continue
        count, size, is_empty = 0, 0, True
        for count, document in enumerate(CORPORA[type(source)](source, key).documents(), 1):
            size, is_empty = size + sum(map(len, document.texts)), is_empty and document.is_empty
            if not is_empty and (count >= FIRST_DOCUMENTS or size >= FIRST_CHARS):
                break
        if is_empty:
            found = f"no text in any of {count:,} documents" if count else "no documents"
            what = "evaluate" if key.startswith("validation") else "learn from"
            raise UserError(f"There is nothing to {what}: {found} in {key} ({source.place}).")


def prepare_sources(
    data: TextData,
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    validation: Sources = (),
    consent: str | None = "",
    **options: Any,
) -> Prepared:
    """Prepare the data of a config into the folder `out`; see `osler.data.prepare.prepare`, also for the options."""
    data, validation = at_known_commits(data, validation, out)
    check_sources(data, validation)
    weights, sets = [source.weight for source in sources_of(data).values()], open_validation(data, validation)
    corpora = open_corpora(data, validation)
    return prepare(corpora, tokenizer, out, weights=weights, validation=sets, consent=consent, **options)


def at_known_commits(data: TextData, validation: Sources, out: str | Path, *, is_known: bool = False) -> tuple[TextData, Sources]:
    """Return a config and its validation sets with commits in place of the hub's `main`: those in `out`, else the newest.

    So every process uses the same texts and looks for the same exams, even if it is restarted after `main` moved on the hub. If
    `is_known`, the hub is not asked, because `out` has all commits already.
    """
    root = getattr(data, "root", "")
    begun = read_data_manifest(out) if Path(out, DATA_MANIFEST).exists() else {"sources": {}, "validation": {}}
    configs = [entry["about"].get("config", {}) for kind in ("sources", "validation") for entry in begun[kind].values()]
    exams = [exam for config in configs for exam in (config.get("clean") or {}).get("exams", ())]
    known = {
        (kind, given["name"]): given["revision"]
        for kind, entries in ((HubData, configs), (HubExam, exams))
        for given in entries
        if given.get("type") == "hub" and "revision" in given
    }

    def pinned(value: Any, key: str) -> Any:
        """Return a part of the config, with a commit for every source and exam that is read from `main` of the hub."""
        if isinstance(value, tuple):
            return tuple(pinned(item, f"{key}[{number}]") for number, item in enumerate(value))
        if isinstance(value, (Preparation, CleanConfig)):
            given = {field.name: getattr(value, field.name) for field in fields(value)}
            value = replace(value, **{name: pinned(item, f"{key}.{name}") for name, item in given.items()})
        follows_main = isinstance(value, (HubData, HubExam)) and value.revision == HubData.revision
        if not follows_main or value.path or value.root or root:
            return value
        commit = known.get((type(value), value.name), "")
        if not commit and not is_known:
            commit = named_files(value, key)[0] if isinstance(value, HubData) else open_exam(value, root, key).commit
        return replace(value, revision=commit or value.revision)

    return pinned(data, "data"), pinned(validation, "validation")


def train_tokenizer(data: TextData, wanted: BPEConfig | SuperBPEConfig, validation: Sources = ()) -> Tokenizer:
    """Train a tokenizer on the training documents of a config, or on an even sample of about `wanted.max_bytes`.

    Sources share the sample by their weights. Of a large source only some parts are read. Documents that `prepare` will hold
    out, and copies of documents in `validation`, are left out. The sample is the same every time.
    """
    check_sources(data, validation)
    weights = [source.weight for source in sources_of(data).values()]
    # The sample is that of whole ranges: dealt out they would be read again for each part, and a sample of some would differ.
    corpora = {name: corpus.cut(min_parts=1) for name, corpus in open_corpora(data, validation).items()}
    sets = [*open_validation(data, validation).values(), *(corpus.validation for corpus in corpora.values())]
    keys = keys_of(document for corpus in sets if corpus is not None for document in corpus.documents())
    held = hold_out(corpora, find_limits(corpora), keys)
    logger.info(f"Training a tokenizer of {wanted.vocab_size:,} tokens on the text; tokenizer.path=FILE takes a trained one.")

    def texts() -> Iterator[str]:
        for corpus, weight in zip(corpora.values(), weights, strict=True):
            total = sum(len(text.encode("utf-8", "replace")) for document in some(corpus) for text in document.texts)
            yield from _sample(some(corpus), wanted.max_bytes * weight / sum(weights) / max(1, total))

    def some(corpus: Corpus) -> Iterator[Document]:
        for number in corpus.order()[:SAMPLE_PARTS].tolist():
            characters = 0
            for document in corpus.kept(number):
                if not held.has(document):
                    yield document
                characters += sum(map(len, document.texts))
                if characters >= SAMPLE_PART_CHARS:
                    break

    return train(texts(), wanted)


def _sample(documents: Iterable[Document], share: float) -> Iterator[str]:
    """Yield about this share of the text, in pieces drawn by a hash of document and place; at least one piece."""
    taken = False
    for document in documents:
        digest = document.exact_digest()
        pieces = [text[i : i + SAMPLE_CHARS] for text in document.texts for i in range(0, len(text), SAMPLE_CHARS)]
        for number, piece in enumerate(document.texts if share >= 1 else pieces):
            draw = int.from_bytes(hashlib.sha256(digest + number.to_bytes(8, "big")).digest()[:8], "big") / 2**64
            if draw < share or not taken:
                taken = True
                yield piece
